"""Encoding and decoding in overlapping tiles, so that attention never sees more than one tile (spec §6).

Tiles overlap in space and are blended linearly there; in time they only stand one after the other. A tile is blended
with the tile above it, then with the tile on its left, then cut to its stride. The published order is kept on purpose:
encoding blends with neighbours that are blended themselves, decoding with neighbours as they were decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from magi_ray.models.vae.model import VAE


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Size of a tile in pixels and frames."""

    height: int = 256
    width: int = 256
    frames: int = 12
    overlap: float = 0.25
    """Share of a tile's height and width that it has in common with its neighbour."""


RunAll = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Encodes or decodes tiles, in order. Tiles do not know each other, so they may be spread over several VAEs."""


def encode_tiled(vae: VAE, pixels_BCTHW: Tensor, *, tiles: Tiles, run_all: RunAll | None = None) -> Tensor:
    """As ``vae.encode``, tile by tile. A last tile of one frame is encoded as an image.

    run_all: encodes the tiles of some frames; default: ``vae`` does, one after the other.
    """
    config = vae.config
    return _run_tiled(
        run_all or (lambda cut: [vae.encode(tile) for tile in cut]),
        pixels_BCTHW,
        tile_THW=(tiles.frames, tiles.height, tiles.width),
        out_tile_HW=(tiles.height // config.patch_size, tiles.width // config.patch_size),
        overlap=tiles.overlap,
        blend_with_blended=True,
    )


def decode_tiled(vae: VAE, latent_BCTHW: Tensor, *, tiles: Tiles, run_all: RunAll | None = None) -> Tensor:
    """As ``vae.decode``, tile by tile. A tile of one latent frame gives one frame: 4 latents in tiles of 3 give 13.

    run_all: decodes the tiles of some latent frames; default: ``vae`` does, one after the other.
    """
    config = vae.config
    height, width = tiles.height // config.patch_size, tiles.width // config.patch_size
    return _run_tiled(
        run_all or (lambda cut: [vae.decode(tile) for tile in cut]),
        latent_BCTHW,
        tile_THW=(tiles.frames // config.patch_length, height, width),
        out_tile_HW=(height * config.patch_size, width * config.patch_size),
        overlap=tiles.overlap,
        blend_with_blended=False,
    )


def _run_tiled(
    run_all: RunAll,
    x_BCTHW: Tensor,
    *,
    tile_THW: tuple[int, int, int],
    out_tile_HW: tuple[int, int],
    overlap: float,
    blend_with_blended: bool,
) -> Tensor:
    T, H, W = tile_THW
    step_H, step_W = int(H * (1 - overlap)), int(W * (1 - overlap))
    blend_H, blend_W = int(out_tile_HW[0] * overlap), int(out_tile_HW[1] * overlap)
    keep_H, keep_W = out_tile_HW[0] - blend_H, out_tile_HW[1] - blend_W
    slabs = []
    for slab in x_BCTHW.split(T, dim=2):
        tops, lefts = range(0, slab.shape[3], step_H), range(0, slab.shape[4], step_W)
        done = iter(run_all([slab[:, :, :, top : top + H, left : left + W] for top in tops for left in lefts]))
        above: list[Tensor] = []
        strips = []
        for _ in tops:
            row: list[Tensor] = []  # what the tiles below and to the right blend with
            cut = []
            for column in range(len(lefts)):
                raw = tile = next(done)
                if above:
                    tile = _blend(above[column], tile, dim=3, extent=blend_H)
                if row:
                    tile = _blend(row[-1], tile, dim=4, extent=blend_W)
                row.append(tile if blend_with_blended else raw)
                cut.append(tile[:, :, :, :keep_H, :keep_W])
            above = row
            strips.append(torch.cat(cut, dim=4))
        slabs.append(torch.cat(strips, dim=3))
    return torch.cat(slabs, dim=2)


def _blend(before: Tensor, after: Tensor, *, dim: int, extent: int) -> Tensor:
    """``after`` with its first ``extent`` rows fading in over the last ``extent`` rows of ``before``."""
    extent = min(extent, before.shape[dim], after.shape[dim])
    shape = [1] * after.dim()
    shape[dim] = extent
    fade = (torch.arange(extent, device=after.device, dtype=after.dtype) / extent).view(shape)
    seam = before.narrow(dim, before.shape[dim] - extent, extent) * (1 - fade) + after.narrow(dim, 0, extent) * fade
    return torch.cat([seam, after.narrow(dim, extent, after.shape[dim] - extent)], dim=dim)
