"""Rotary position embedding with learned bands over absolute (T, H, W) positions (spec §3, 2). All in float32."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn


class Rope(nn.Module):
    """``bands``: [hidden / heads / 8] learned frequencies, shared by the three axes."""

    bands: Tensor

    def __init__(self, num_bands: int) -> None:
        super().__init__()
        self.register_buffer("bands", torch.empty(num_bands, dtype=torch.float32))

    def forward(self, positions: Sequence[int], *, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """sin and cos, each [R, S, 3 · bands], of R chunks of S = frames · height · width tokens.

        positions: of each chunk, in chunks from the start of the video (a clean prefix included).
        height, width: in patches.
        """
        device = self.bands.device
        start_R = torch.tensor(positions, dtype=torch.float32, device=device) * frames
        t_RT = start_R[:, None] + torch.arange(frames, dtype=torch.float32, device=device)
        scale = sqrt(height * width / 256)
        h_H, w_W = (_centred(n, n / scale, device) for n in (height, width))
        grid = (len(positions), frames, height, width)
        coordinates = torch.stack(
            [t_RT[:, :, None, None].expand(grid), h_H[:, None].expand(grid), w_W.expand(grid)], dim=-1
        )
        angles = (coordinates[..., None] * self.bands).reshape(len(positions), frames * height * width, -1)
        return angles.sin(), angles.cos()


def _centred(n: int, reference: float, device: torch.device) -> Tensor:
    """Patch indices around 0, stretched as if the frame had the area of 16 × 16 patches."""
    index = torch.arange(n, dtype=torch.float32, device=device) - (n - 1) / 2
    return index / max(n - 1, 1) * (reference - 1)


def rotate(x_RSHK: Tensor, sin_RSB: Tensor, cos_RSB: Tensor) -> Tensor:
    """Rotate the first 2·B dimensions of a head in halves, (a, b) → (a·cos − b·sin, b·cos + a·sin); the rest pass."""
    half = sin_RSB.shape[-1]
    sin, cos = sin_RSB[:, :, None], cos_RSB[:, :, None]
    a, b, rest = torch.split(x_RSHK, [half, half, x_RSHK.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
