"""The frames of the image or clip that a video begins from, read from the store's copy. No tensors."""

from __future__ import annotations

import hashlib

from magi_ray.errors import MediaError
from magi_ray.media.reader import Pixels, read_image, read_video
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.storage import keys
from magi_ray.storage.store import Store
from magi_ray.system import temporary_folder
from magi_ray.timeline import FRAMES_PER_LATENT


def prefix_pixels(store: Store, plan: RowPlan) -> Pixels:
    """uint8 RGB [T, height, width, 3]: the image (T = 1), or the part of the clip that ``plan`` continues.

    A clip is cut to whole latent frames of 4 frames each; what is left over is dropped, far from the join.
    Raises MediaError (the copy is damaged or cannot be read), StoreError.
    """
    media, runtime, prefix = plan.media, plan.settings.runtime, plan.settings.prefix
    assert media is not None
    with temporary_folder() as folder:
        path = folder / "media"
        store.get_to_file(keys.media(media.sha256), path)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != media.sha256:
            raise MediaError.about(
                f"The {media.kind} kept by {store.uri}",
                f"has sha256 {found[:12]}…, not {media.sha256[:12]}…",
                remedy="Submit the manifest again, with the same file: the store's copy is then replaced.",
            )
        width, height = runtime.video_size_w, runtime.video_size_h
        if media.kind == "image":
            return read_image(path, width=width, height=height, fit=prefix.fit)[None]
        end, limit = prefix.clip_end, prefix.max_frames
        frames = read_video(
            path, width=width, height=height, fps=runtime.fps, max_frames=limit, part=end, fit=prefix.fit
        )
    whole = media.latents * FRAMES_PER_LATENT
    return frames[:whole] if end == "start" else frames[-whole:]
