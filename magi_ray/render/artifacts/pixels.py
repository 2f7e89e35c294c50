"""From the pixels of images to those of the VAE, and back (spec §6)."""

from __future__ import annotations

import torch
from torch import Tensor

from magi_ray.media.reader import Pixels


def pixels_to_tensor(frames: Pixels) -> Tensor:
    """uint8 [T, H, W, 3] → float32 [1, 3, T, H, W] in −1…1."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def tensor_to_pixels(pixels: Tensor) -> Pixels:
    """float [1, 3, T, H, W] in −1…1 → uint8 [T, H, W, 3]; values outside are clamped."""
    scaled = (pixels[0].float() * 127.5 + 127.5).clamp(0, 255).to(torch.uint8)
    frames: Pixels = scaled.permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return frames
