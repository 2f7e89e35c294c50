"""What conditions a chunk: its time and its caption (spec §3, 3 and 4). All in float32."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor, nn

SINUSOID = 256
MAX_PERIOD = 10000
# Rows of the null caption that stand for "dropped" and "kept" in the AdaLN path.
DROPPED, KEPT = -1, -2


class TimestepEmbedder(nn.Module):
    """t in 0…1 → [R, c]. ``rounded_to``: the dtype the sinusoid passes through, as in training."""

    def __init__(self, width: int, *, rounded_to: torch.dtype) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOID, width), nn.SiLU(), nn.Linear(width, width))
        self.rounded_to = rounded_to

    def forward(self, t_R: Tensor) -> Tensor:
        half = SINUSOID // 2
        frequency = torch.exp(-log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t_R.device) / half)
        angle = t_R[:, None] * frequency * 1000
        sinusoid = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.rounded_to)
        embedding: Tensor = self.mlp(sinusoid.float())
        return embedding


class CaptionEmbedder(nn.Module):
    """Caption embeddings → what cross-attention reads; the AdaLN path only learns whether the caption was dropped."""

    def __init__(self, *, caption_channels: int, max_length: int, xattn_width: int, adaln_width: int) -> None:
        super().__init__()
        self.y_proj_xattn = nn.Sequential(nn.Linear(caption_channels, xattn_width), nn.SiLU())
        self.y_proj_adaln = nn.Sequential(nn.Linear(caption_channels, adaln_width))
        self.null_caption_embedding = nn.Parameter(torch.empty(max_length, caption_channels))

    def xattn(self, caption_NC: Tensor) -> Tensor:
        projected: Tensor = self.y_proj_xattn(caption_NC)
        return projected

    def adaln(self, *, dropped: bool) -> Tensor:
        projected: Tensor = self.y_proj_adaln(self.null_caption_embedding[DROPPED if dropped else KEPT])
        return projected
