"""How much memory a run needs, from its settings alone, so that what cannot fit is refused before weights are loaded.

An upper estimate, in bytes of one rank, which has everything in this version:

- networks: each parameter at its dtype; T5 by its config;
- cache: keys and values of the clean chunks that are still seen (``cache_depth``), all layers;
- forward: the widest one, with a full window (a distilled model sends one chunk twice): what a layer holds at once for
  each token, in float32: its input, two norms and sums, queries, keys, values and outputs of both attentions, the MLP
  inside; the layers run one after the other, so one layer counts;
- decode: the tiles of one slab and the pixels they become, before and after blending.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
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
class Need:
    """Bytes. text: 0 where T5 computes somewhere else."""

    dit: int
    vae: int
    text: int
    cache: int
    forward: int
    decode: int

    @property
    def total(self) -> int:
        return self.dit + self.vae + self.text + self.cache + self.forward + self.decode

    def __str__(self) -> str:
        parts = {"DiT": self.dit, "VAE": self.vae, "T5": self.text, "cache": self.cache, "forward": self.forward,
                 "decoding": self.decode}  # fmt: skip
        return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())


def estimate(plan: RowPlan) -> Need:
    """What rendering ``plan`` needs. Reads the VAE's config and the size of T5's files. Raises WeightsError."""
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
    return Need(
        dit=_bytes(dit),
        vae=_bytes(vae),
        text=_text_bytes(settings) if runtime.t5_device.split(":")[0] == settings.numeric.device else 0,
        cache=cache,
        forward=forward,
        decode=int(4 * pixels + tile_tokens * width * _FLOAT32),
    )


def require(plans: Iterable[RowPlan], available: int) -> None:
    """Raises SettingsError, with both numbers, for the first of ``plans`` that needs more than ``available`` bytes."""
    seen = set()
    for plan in plans:
        runtime = plan.settings.runtime
        in_flight = min(runtime.window_size, plan.timeline.num_chunks)
        size = runtime.video_size_h, runtime.video_size_w
        shape = (*size, in_flight, plan.timeline.offset, repr(sorted(plan.controls.items())))
        if shape not in seen:
            seen.add(shape)
            _require(plan, available)


def _require(plan: RowPlan, available: int) -> None:
    need = estimate(plan)
    if need.total <= available:
        return
    runtime = plan.settings.runtime
    raise SettingsError(
        f"Row {plan.row} (job {plan.job_id}), {runtime.video_size_w}×{runtime.video_size_h} with window_size "
        f"{runtime.window_size}, needs some {need.total / GIB:.1f} GiB ({need}), "
        f"but {plan.settings.numeric.device} has {available / GIB:.1f} GiB.",
        remedy="Use a smaller size, window_size 1, an fp8 or a smaller checkpoint, or a larger device.",
    )


def available(settings: Settings) -> int:
    """Bytes that the device has in all, or that the cgroup allows."""
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
    """The encoder, by its config: embeddings, and per layer four projections and a gated MLP of three."""
    c = text_encoder_sizes(settings.weights.t5)
    layer = 4 * c["d_model"] * c["num_heads"] * c["d_kv"] + 3 * c["d_model"] * c["d_ff"]
    itemsize = getattr(torch, settings.text.dtype).itemsize
    return (c["vocab_size"] * c["d_model"] + c["num_layers"] * layer) * int(itemsize)
