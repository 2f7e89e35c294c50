"""The frames and the sound of the image or clip that a video begins from, read from the store's copy. No tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from magi_ray.errors import MediaError, ObjectMissing
from magi_ray.media.clips import Taken
from magi_ray.media.reader import Pixels, read_clip, read_image
from magi_ray.media.sound import Sound, read_sound
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.settings import PrefixSettings
from magi_ray.storage import keys
from magi_ray.storage.records import file_sha256
from magi_ray.storage.store import Store
from magi_ray.system import temporary_folder
from magi_ray.timeline import FRAMES_PER_LATENT

_AGAIN = "Submit the manifest again, with the same file: the store's copy is then replaced and the row tried again."


def prefix_pixels(store: Store, plan: RowPlan) -> Pixels:
    """uint8 RGB [T, height, width, 3]: the image (T = 1), or the part of the clip that ``plan`` continues.

    Raises as ``stored_medium``.
    """
    with stored_medium(store, plan) as path:
        return pixels_of(path, plan)


@contextmanager
def stored_medium(store: Store, plan: RowPlan) -> Iterator[Path]:
    """The store's copy of ``plan``'s image or clip, as a file.

    Raises MediaError (the copy is gone or damaged, or cannot be read in the block inside), StoreError.
    """
    media = plan.media
    assert media is not None
    kept = f"The {media.kind} kept by {store.uri}"
    with temporary_folder() as folder:
        path = folder / "media"
        try:
            store.get_to_file(keys.media(media.sha256), path)
        except ObjectMissing as exc:
            raise MediaError.about(kept, f"is gone ({keys.media(media.sha256)})", remedy=_AGAIN) from exc
        if (found := file_sha256(path)) != media.sha256:
            raise MediaError.about(kept, f"has sha256 {found[:12]}…, not {media.sha256[:12]}…", remedy=_AGAIN)
        try:
            yield path
        except MediaError as exc:
            remedy = "It was read when it was submitted: use the same versions of magi-ray and PyAV on every machine."
            raise MediaError.about(kept, exc.reason, remedy=remedy) from exc


def pixels_of(path: Path, plan: RowPlan) -> Pixels:
    """As ``prefix_pixels``, of the file at ``path``. Raises MediaError, also if these are not the pixels submitted."""
    media, runtime, prefix = plan.media, plan.settings.runtime, plan.settings.prefix
    assert media is not None
    width, height, fps = runtime.video_size_w, runtime.video_size_h, runtime.fps
    frames, _ = read_prefix(path, media.kind, width=width, height=height, fps=fps, prefix=prefix)
    if media.pixels is not None and (found := pixels_digest(frames)) != media.pixels:
        raise MediaError.about(path, f"gives pixels of sha256 {found[:12]}… here, not {media.pixels[:12]}…")
    return frames


def read_prefix(
    path: Path, kind: Literal["image", "video"], *, width: int, height: int, fps: int, prefix: PrefixSettings
) -> tuple[Pixels, int]:
    """The frames of an image (T = 1) or clip that a video begins from, uint8 RGB [T, height, width, 3]; and of how many
    they were taken: as ``read_clip`` counts them.

    A clip is cut to whole latent frames of 4 frames each; what is left over is dropped, far from the join. T may be 0.
    Raises MediaError.
    """
    if kind == "image":
        return read_image(path, width=width, height=height, fit=prefix.fit)[None], 1
    part, limit = prefix.clip_end, prefix.max_frames
    frames, found = read_clip(path, width=width, height=height, fps=fps, max_frames=limit, part=part, fit=prefix.fit)
    whole = len(frames) // FRAMES_PER_LATENT * FRAMES_PER_LATENT
    return (frames[:whole] if part == "start" else frames[len(frames) - whole :]), found


def pixels_digest(frames: Pixels) -> str:
    """sha256 of uint8 [T, height, width, 3]."""
    return hashlib.sha256(np.ascontiguousarray(frames).data).hexdigest()


def sound_of(path: Path, taken: Taken, fps: int) -> Sound | None:
    """What is heard with the frames that are taken from the clip at ``path``. Raises MediaError."""
    return read_sound(path, begin=Fraction(taken.first, fps), end=Fraction(taken.last + 1, fps))
