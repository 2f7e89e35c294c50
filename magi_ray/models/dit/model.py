"""The DiT: noisy latents of some chunks, and what they may see → their velocity (spec §3).

R chunks of one forward; S = T · H · W tokens of a chunk; D hidden width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from magi_ray.forward import Forward
from magi_ray.models.dit.attention import KERNELS
from magi_ray.models.dit.block import Block, Context, LayerNorm
from magi_ray.models.dit.embeddings import CaptionEmbedder, TimestepEmbedder
from magi_ray.models.dit.kv_cache import KVCache
from magi_ray.models.dit.rope import Rope
from magi_ray.models.files import weight_files
from magi_ray.models.weights import load_into
from magi_ray.settings import ModelConfig
from magi_ray.timeline import LATENTS_PER_CHUNK


class Blocks(nn.Module):
    """All layers and the norm after them: [R, S, D] → float32."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, *, fp8: bool) -> None:
        super().__init__()
        # The first and the last layer of an fp8 checkpoint are ordinary ones.
        self.layers = nn.ModuleList(
            Block(config, dtype, layer=i, fp8=fp8 and 0 < i < config.num_layers - 1) for i in range(config.num_layers)
        )
        self.final_layernorm = LayerNorm(config.hidden_size, config, one_plus=True, dtype=torch.float32)

    def forward(self, x_RSD: Tensor, context: Context) -> Tensor:
        for layer in self.layers:
            x_RSD = layer(x_RSD, context)
        out_RSD: Tensor = self.final_layernorm(x_RSD)
        return out_RSD


class FinalLinear(nn.Module):
    """Token → the values of its patch. A module of its own for the published name."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        values = config.t_patch_size * config.patch_size**2 * config.out_channels
        self.linear = nn.Linear(config.hidden_size, values, bias=False)


class DiT(nn.Module):
    """The network. config: the published model_config; parameter names are the published ones (spec §2).

    attention: a name in ``attention.KERNELS``.  fp8: build the layers of an fp8 checkpoint. Embedders, RoPE, norms
    after a branch and the final layers are float32, everything else ``config.params_dtype``.
    """

    def __init__(self, config: ModelConfig, *, attention: str = "plain", fp8: bool = False) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype = getattr(torch, config.params_dtype.removeprefix("torch."))
        self.attend = KERNELS[attention]
        width, condition = config.hidden_size, int(config.hidden_size * config.cond_hidden_ratio)
        patch = (config.t_patch_size, config.patch_size, config.patch_size)
        self.x_embedder = nn.Conv3d(config.in_channels, width, patch, stride=patch, bias=False)
        self.rope = Rope(width // config.num_attention_heads // 8)
        self.t_embedder = TimestepEmbedder(condition, rounded_to=dtype)
        self.y_embedder = CaptionEmbedder(
            caption_channels=config.caption_channels,
            max_length=config.caption_max_length,
            xattn_width=int(width * config.xattn_cond_hidden_ratio),
            adaln_width=condition,
        )
        self.videodit_blocks = Blocks(config, dtype, fp8=fp8)
        self.final_linear = FinalLinear(config)

    @property
    def device(self) -> torch.device:
        return self.rope.bands.device

    def tokens_per_chunk(self, height: int, width: int) -> int:
        """S for latents of ``height`` × ``width``."""
        c = self.config
        return LATENTS_PER_CHUNK // c.t_patch_size * (height // c.patch_size) * (width // c.patch_size)

    def new_cache(self, *, depth: int, height: int, width: int) -> KVCache:
        """An empty ring for ``depth`` chunks of latents ``height`` × ``width``."""
        config, tokens = self.config, self.tokens_per_chunk(height, width)
        return KVCache(
            depth=depth, layers=config.num_layers, tokens=tokens, groups=config.num_query_groups,
            head_dim=config.kv_channels, dtype=self.dtype, device=self.device,
        )  # fmt: skip

    @torch.no_grad()
    def forward(self, forward: Forward[Tensor], cache: KVCache | None) -> Tensor:
        """Velocity [R, 16, 6, h, w] float32 of ``forward.latents``. All tensors are on the device of the weights.

        cache: None will do for a Forward that neither reads nor writes it.
        """
        config = self.config
        x = forward.latents.float() * config.x_rescale_factor
        if config.half_channel_vae:
            x = torch.cat([x, x], dim=1)
        x = self.x_embedder(x)  # [R, D, T, H, W]
        frames, height, width = x.shape[2:]
        x = x.flatten(2).transpose(1, 2).to(self.dtype)  # [R, S, D]

        condition = self.t_embedder(forward.t.float()) + self.y_embedder.adaln(dropped=forward.dropped)
        if forward.dt is not None:
            condition = condition + self.t_embedder(forward.t.new_full((1,), forward.dt))
        caption = self.y_embedder.xattn(torch.cat([caption.float() for caption in forward.captions]))
        sin, cos = self.rope(forward.positions, frames=frames, height=height, width=width)
        context = Context(
            condition=condition.to(self.dtype),
            caption=caption.to(self.dtype),
            caption_lengths=[len(caption) for caption in forward.captions],
            sin=sin,
            cos=cos,
            chunks=forward.chunks,
            kv_ranges=forward.kv_ranges,
            cache=cache if forward.reads_cache else None,
            writes_cache=forward.writes_cache,
            attend=self.attend,
        )
        x = self.final_linear.linear(self.videodit_blocks(x, context))
        return self._unpatchify(x, frames, height, width) / config.x_rescale_factor

    def _unpatchify(self, x_RSP: Tensor, frames: int, height: int, width: int) -> Tensor:
        pt, p, channels = self.config.t_patch_size, self.config.patch_size, self.config.out_channels
        x = torch.unflatten(torch.unflatten(x_RSP, -1, (pt, p, p, channels)), 1, (frames, height, width))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [R, C, T, pT, H, pH, W, pW]
        x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return x[:, : channels // 2] if self.config.half_channel_vae else x


def load_dit(
    config: ModelConfig, folder: Path, *, device: torch.device | str = "cpu", attention: str, fp8: bool = False
) -> DiT:
    """The DiT with the weights of ``folder`` (spec §2). ``fp8``: it is an fp8 checkpoint. Raises WeightsError."""
    with torch.device("meta"):
        model = DiT(config, attention=attention, fp8=fp8)
    load_into(model, weight_files(folder), device=device)
    return model
