"""Encoding and decoding in overlapping tiles, so that attention never sees more than one tile (spec §6).

Tiles overlap in space, where they are blended linearly, but not in time. A tile is blended with the tile above it, then
with the tile on its left, then cut to its stride. The published order is kept on purpose: encoding blends with
neighbours that are blended themselves, decoding with neighbours as they were decoded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from magi_ray.models.vae.model import VAE
from magi_ray.settings import TileSettings


def encode_tiled(vae: VAE, pixels_BCTHW: Tensor, *, tiles: TileSettings) -> Tensor:
    """As ``vae.encode``, tile by tile. A last tile of one frame is encoded as an image."""
    config = vae.config
    tile_THW = (tiles.frames, tiles.height, tiles.width)
    out_tile_HW = (tiles.height // config.patch_size, tiles.width // config.patch_size)
    return _run_tiled(
        vae.encode, pixels_BCTHW, tile_THW=tile_THW, out_tile_HW=out_tile_HW, overlap=tiles.overlap,
        blend_with_blended=True,
    )  # fmt: skip


def decode_tiled(vae: VAE, latent_BCTHW: Tensor, *, tiles: TileSettings) -> Tensor:
    """As ``vae.decode``, tile by tile. A tile of one latent frame gives one frame: 4 latents in tiles of 3 give 13."""
    config = vae.config
    height, width = tiles.height // config.patch_size, tiles.width // config.patch_size
    tile_THW = (tiles.frames // config.patch_length, height, width)
    out_tile_HW = (height * config.patch_size, width * config.patch_size)
    return _run_tiled(
        vae.decode, latent_BCTHW, tile_THW=tile_THW, out_tile_HW=out_tile_HW, overlap=tiles.overlap,
        blend_with_blended=False,
    )  # fmt: skip


def _run_tiled(
    run: Callable[[Tensor], Tensor], x_BCTHW: Tensor, *, tile_THW: tuple[int, int, int], out_tile_HW: tuple[int, int],
    overlap: float, blend_with_blended: bool,
) -> Tensor:  # fmt: skip
    """``run`` of every tile of ``x_BCTHW``, put together. overlap: share of a tile's height and width."""
    T, H, W = tile_THW
    step_H, step_W = int(H * (1 - overlap)), int(W * (1 - overlap))
    blend_H, blend_W = int(out_tile_HW[0] * overlap), int(out_tile_HW[1] * overlap)
    keep_H, keep_W = out_tile_HW[0] - blend_H, out_tile_HW[1] - blend_W
    periods = []
    for x in torch.split(x_BCTHW, T, dim=2):
        above: list[Tensor] = []
        rows = []
        for top in range(0, x.shape[3], step_H):
            row: list[Tensor] = []  # what the tiles below and to the right blend with
            cut = []
            for column, left in enumerate(range(0, x.shape[4], step_W)):
                raw = tile = run(x[:, :, :, top : top + H, left : left + W])
                if above:
                    tile = _blend(above[column], tile, dim=3, extent=blend_H)
                if row:
                    tile = _blend(row[-1], tile, dim=4, extent=blend_W)
                row.append(tile if blend_with_blended else raw)
                cut.append(tile[:, :, :, :keep_H, :keep_W])
            above = row
            rows.append(torch.cat(cut, dim=4))
        periods.append(torch.cat(rows, dim=3))
    return torch.cat(periods, dim=2)


def _blend(before: Tensor, after: Tensor, *, dim: int, extent: int) -> Tensor:
    """``after`` with its first ``extent`` rows fading in over the last ``extent`` rows of ``before``."""
    extent = min(extent, before.shape[dim], after.shape[dim])
    shape = [1] * after.dim()
    shape[dim] = extent
    fade = (torch.arange(extent, device=after.device, dtype=after.dtype) / extent).view(shape)
    seam = before.narrow(dim, before.shape[dim] - extent, extent) * (1 - fade) + after.narrow(dim, 0, extent) * fade
    return torch.cat([seam, after.narrow(dim, extent, after.shape[dim] - extent)], dim=dim)
