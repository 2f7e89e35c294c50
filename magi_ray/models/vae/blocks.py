"""The transformer of the VAE: the same blocks in encoder and decoder (spec §6).

Shapes: B batch · S tokens · D embed_dim · N heads · h head dimension · T, H, W tokens along each axis.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magi_ray.models.vae.config import VAEConfig

AttentionKind = Literal["plain", "sdpa"]
LAYERNORM_EPSILON = 1e-5


def attend(q_BNSh: Tensor, k_BNSh: Tensor, v_BNSh: Tensor, *, kind: AttentionKind) -> Tensor:
    """Softmax attention of every token to every token. ``plain`` is the specification, ``sdpa`` torch's fast path."""
    if kind == "sdpa":
        return F.scaled_dot_product_attention(q_BNSh, k_BNSh, v_BNSh)
    scores_BNSS = (q_BNSh * q_BNSh.shape[-1] ** -0.5) @ k_BNSh.transpose(-2, -1)
    out_BNSh: Tensor = scores_BNSS.softmax(dim=-1) @ v_BNSh
    return out_BNSh


def normalise_head(x_BNSh: Tensor) -> Tensor:
    """(x − mean) / (population std + 1e-5) over the head dimension. Not LayerNorm: epsilon is added to the std."""
    std, mean = torch.std_mean(x_BNSh, dim=-1, correction=0, keepdim=True)
    return (x_BNSh - mean) / (std + LAYERNORM_EPSILON)


class Attention(nn.Module):
    def __init__(self, config: VAEConfig, attention: AttentionKind) -> None:
        super().__init__()
        self.num_heads, self.kind, self.normalise = config.num_heads, attention, config.ln_in_attn
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        qkv = self.qkv(x_BSD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, N, S, h]
        if self.normalise:
            qkv = normalise_head(qkv)
        out_BNSh = attend(*qkv.unbind(0), kind=self.kind)
        out_BSD: Tensor = self.proj(out_BNSh.transpose(1, 2).flatten(2))
        return out_BSD


class MLP(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        hidden = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, config.embed_dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        out_BSD: Tensor = self.fc2(F.gelu(self.fc1(x_BSD)))
        return out_BSD


class Block(nn.Module):
    def __init__(self, config: VAEConfig, attention: AttentionKind) -> None:
        super().__init__()
        # With ln_in_attn the published weights hold no norm1.
        self.norm1 = nn.Identity() if config.ln_in_attn else nn.LayerNorm(config.embed_dim, eps=LAYERNORM_EPSILON)
        self.attn = Attention(config, attention)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=LAYERNORM_EPSILON)
        self.mlp = MLP(config)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attn(self.norm1(x_BSD))
        x_BSD = x_BSD + self.mlp(self.norm2(x_BSD))
        return x_BSD


class Transformer(nn.Module):
    """cls token, learned positions, blocks, final norm: the common trunk of encoder and decoder."""

    def __init__(self, config: VAEConfig, attention: AttentionKind) -> None:
        super().__init__()
        self.learned_grid = config.learned_grid
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim)) if config.with_cls_token else None
        positions = math.prod(self.learned_grid) + config.with_cls_token
        self.pos_embed = nn.Parameter(torch.empty(1, positions, config.embed_dim))
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=LAYERNORM_EPSILON)

    def positions(self, grid_THW: tuple[int, int, int]) -> Tensor:
        """Position embeddings [1, cls + T·H·W, D]; another grid than the learned one is interpolated trilinearly."""
        if grid_THW == self.learned_grid:
            return self.pos_embed
        extra = 0 if self.cls_token is None else 1
        learned = torch.unflatten(self.pos_embed[:, extra:].transpose(1, 2), -1, self.learned_grid)  # [1, D, T, H, W]
        resized = F.interpolate(learned, size=grid_THW, mode="trilinear", align_corners=False)
        return torch.cat([self.pos_embed[:, :extra], resized.flatten(2).transpose(1, 2)], dim=1)

    def transform(self, x_BTHWD: Tensor) -> Tensor:
        """Run tokens through the blocks and the final norm. In and out: [B, T, H, W, D]."""
        batch, *grid, _ = x_BTHWD.shape
        x = x_BTHWD.flatten(1, 3)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(batch, -1, -1), x], dim=1)
        x = x + self.positions((grid[0], grid[1], grid[2]))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.cls_token is not None:
            x = x[:, 1:]
        return torch.unflatten(x, 1, grid)
