"""Pixels as files have them against pixels as the VAE has them (spec §6)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Frames = npt.NDArray[np.uint8]


def pixels_to_tensor(frames: Frames) -> Tensor:
    """uint8 [T, H, W, 3] → float32 [1, 3, T, H, W] in −1…1."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def tensor_to_pixels(pixels: Tensor) -> Frames:
    """float [1, 3, T, H, W] in −1…1 → uint8 [T, H, W, 3]; what lies outside is clamped."""
    scaled = (pixels[0].float() * 127.5 + 127.5).clamp(0, 255).to(torch.uint8)
    frames: Frames = scaled.permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return frames
