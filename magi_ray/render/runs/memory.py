"""How much memory a run needs, from its settings alone, so that what cannot fit is refused before weights are loaded.

An upper estimate, in bytes, for one rank, which holds everything in this version:

- networks: each parameter at its dtype; T5 by its config;
- cache: keys and values of the clean chunks that are still seen (``cache_depth``), all layers;
- forward: the widest one, with a full window (a distilled model sends one chunk twice): what one layer holds at once
  for each token, in float32: input, two norms and sums, queries, keys, values and outputs of both attentions, the
  inside of the MLP. Layers run one after the other, so one of them counts;
- decode: the tiles of one slab and their pixels, before and after blending.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import nn

from magi_ray.errors import SettingsError
from magi_ray.models.dit.model import DiT
from magi_ray.models.files import text_encoder_sizes
from magi_ray.models.vae.config import VAEConfig
from magi_ray.models.vae.model import VAE
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.sampling.ranges import KVRanges, cache_depth
from magi_ray.settings import Settings
from magi_ray.timeline import FRAMES_PER_CHUNK, SPATIAL_FACTOR

GIB = 1024**3
_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """Bytes on the device. text: 0 if T5 computes on another one."""

    dit: int
    vae: int
    text: int
    cache: int
    forward: int
    decode: int

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def __str__(self) -> str:
        names = "DiT", "VAE", "T5", "cache", "forward", "decoding"
        return ", ".join(f"{name} {size / GIB:.1f}" for name, size in zip(names, astuple(self), strict=True))


def estimate(plan: RowPlan) -> MemoryNeed:
    """What rendering ``plan`` needs. Reads the configs of the VAE and of T5. Raises WeightsError."""
    settings = plan.settings
    model, runtime, engine = settings.model, settings.runtime, settings.engine
    with torch.device("meta"):
        dit = DiT(model, attention=settings.numeric.attention, fp8=engine.fp8_quant)
        vae_config = VAEConfig.load(settings.weights.vae / "config.json")
        vae = VAE(vae_config, attention=settings.numeric.attention)
    tokens = dit.tokens_per_chunk(runtime.video_size_h // SPATIAL_FACTOR, runtime.video_size_w // SPATIAL_FACTOR)
    depth = cache_depth(plan.timeline, KVRanges.of(runtime, plan.controls, offset=plan.timeline.offset))
    groups = model.num_query_groups * model.kv_channels
    cache = depth * tokens * model.num_layers * 2 * groups * dit.dtype.itemsize

    in_flight = min(runtime.window_size, plan.timeline.num_chunks) + engine.distill
    queries = model.num_attention_heads * model.kv_channels
    inside = model.ffn_hidden_size * (4 if model.gated_linear_unit else 3)
    forward = in_flight * tokens * (8 * model.hidden_size + 10 * queries + 4 * groups + inside) * _FLOAT32
    if settings.numeric.attention == "plain":
        reach = max((*runtime.noise2clean_kvrange, depth + in_flight))
        forward += tokens * tokens * reach * model.num_attention_heads * _FLOAT32

    tiles = settings.tiles
    pixels = FRAMES_PER_CHUNK * runtime.video_size_h * runtime.video_size_w * 3 * _FLOAT32
    tile_tokens = tiles.frames // vae_config.patch_length * (tiles.height // 8) * (tiles.width // 8)
    tile_tokens = min(tile_tokens, tokens * model.patch_size**2 * tiles.frames // FRAMES_PER_CHUNK)
    width = vae_config.embed_dim * (8 + 2 * vae_config.mlp_ratio)
    return MemoryNeed(
        dit=_bytes(dit),
        vae=_bytes(vae),
        text=_text_bytes(settings) if runtime.t5_device.split(":")[0] == settings.numeric.device else 0,
        cache=cache,
        forward=forward,
        decode=int(4 * pixels + tile_tokens * width * _FLOAT32),
    )


def require(plans: Iterable[RowPlan], available: int) -> None:
    """Raises SettingsError, with both numbers, for the first of ``plans`` that needs more than ``available`` bytes."""
    estimated = set()
    for plan in plans:
        runtime = plan.settings.runtime
        width, height, window_size = runtime.video_size_w, runtime.video_size_h, runtime.window_size
        in_flight = min(window_size, plan.timeline.num_chunks)
        shape = (height, width, in_flight, plan.timeline.offset, repr(sorted(plan.controls.items())))
        if shape in estimated:
            continue
        estimated.add(shape)
        need = estimate(plan)
        if need.total > available:
            raise SettingsError(
                f"Row {plan.row} (job {plan.job_id}), {width}×{height} with window_size {window_size}, needs some "
                f"{need.total / GIB:.1f} GiB ({need}), but {plan.settings.numeric.device} has "
                f"{available / GIB:.1f} GiB.",
                remedy="Use a smaller size, window_size 1, an fp8 or a smaller checkpoint, or a larger device.",
            )


def available(settings: Settings) -> int:
    """Bytes of the device in all; on the CPU, of the machine or as the cgroup allows."""
    if settings.numeric.device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def _text_bytes(settings: Settings) -> int:
    """T5's encoder: embeddings, and for each layer four projections and a gated MLP of three."""
    c = text_encoder_sizes(settings.weights.t5)
    layer = 4 * c["d_model"] * c["num_heads"] * c["d_kv"] + 3 * c["d_model"] * c["d_ff"]
    itemsize = getattr(torch, settings.text.dtype).itemsize
    return (c["vocab_size"] * c["d_model"] + c["num_layers"] * layer) * int(itemsize)
