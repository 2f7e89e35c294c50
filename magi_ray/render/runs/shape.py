"""The size of a video that begins from an image or clip, where nobody gave one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from math import floor, log, sqrt
from pathlib import Path
from typing import Any

from magi_ray.errors import MediaError
from magi_ray.manifest import Defaults, Manifest, manifest_of
from magi_ray.media.reader import shown_size
from magi_ray.render.runs.media import MediaFiles
from magi_ray.settings import Settings
from magi_ray.timeline import SIZE_MULTIPLE


def manifest_in_shape(
    rows: Sequence[Mapping[str, Any]], settings: Settings, files: MediaFiles, *, base: Path
) -> Manifest:
    """``manifest_of`` these rows, which begin from the same image or clip, or from none: the videos have its shape.

    What the rows do not say of their size follows, with about as many pixels as ``settings`` say; a note tells.
    files: where the image or clip is fetched.  Problems are in the manifest. Raises StoreUnavailable.
    """
    defaults = Defaults.of(settings)
    manifest = manifest_of(rows, defaults, base=base, strict=False)
    given = {side: value for side in ("width", "height") if (value := rows[0].get(side)) is not None}
    if not manifest.rows or manifest.rows[0].prefix_location is None or len(given) == 2:
        return manifest
    first, location = manifest.rows[0], manifest.rows[0].prefix_location
    size = first.width, first.height
    with suppress(MediaError, OSError):  # told when the run is prepared
        size = size_like(shown_size(files.fetch(location)), first.width * first.height, **given)
    if size == (first.width, first.height):
        return manifest
    shaped = [{**row, "width": size[0], "height": size[1]} for row in rows]
    manifest = manifest_of(shaped, defaults, base=base, strict=False)
    note = f"{size[0]}×{size[1]}, after the {'image' if first.image is not None else 'clip'}'s shape."
    return replace(manifest, notes=(note, *manifest.notes))


def size_like(
    shown: tuple[int, int], pixels: int, *, width: int | None = None, height: int | None = None
) -> tuple[int, int]:
    """Width and height, multiples of 16, nearest to the shape of ``shown`` (its width and height).

    pixels: about so many, unless ``width`` or ``height`` is given.
    """
    shape = shown[0] / shown[1]
    if width is not None:
        return width, min(_around(width / shape), key=lambda side: abs(log(width / side / shape)))
    if height is not None:
        return min(_around(height * shape), key=lambda side: abs(log(side / height / shape))), height
    longest = pixels / SIZE_MULTIPLE
    sizes = product(_around(min(sqrt(pixels * shape), longest)), _around(min(sqrt(pixels / shape), longest)))
    return min(sizes, key=lambda size: 2 * abs(log(size[0] / size[1] / shape)) + abs(log(size[0] * size[1] / pixels)))


def _around(side: float) -> tuple[int, int]:
    """The multiples of 16 on both sides of ``side``."""
    low = max(1, floor(side / SIZE_MULTIPLE))
    return low * SIZE_MULTIPLE, (low + 1) * SIZE_MULTIPLE
