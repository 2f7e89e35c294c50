"""What a render keeps between two stages: far smaller than the keys and values, which are rebuilt from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from magi_ray.timeline import LATENT_CHANNELS, LATENTS_PER_CHUNK, SPATIAL_FACTOR


def chunk_shape(*, height: int, width: int) -> tuple[int, int, int, int, int]:
    """[1, 16, 6, h, w] of one chunk's latents for a video of ``height`` × ``width`` pixels."""
    return 1, LATENT_CHANNELS, LATENTS_PER_CHUNK, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR


@dataclass(frozen=True, kw_only=True)
class WindowState:
    """The window *before* ``stage`` begins.

    latents: the chunks under way (``window.chunks_under_way``), numbered from 0 among the denoised ones, each
    [1, 16, 6, h, w] float32 on the CPU and exactly ``stage − chunk`` stages advanced. The chunk that enters at
    ``stage`` is not in it: it is noise.
    """

    stage: int
    latents: Mapping[int, Tensor]
