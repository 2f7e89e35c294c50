"""Finish: the segments of a video to one verified mp4, published with a record of what made it."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from magi_ray.errors import ObjectDamaged, ObjectMissing
from magi_ray.media.encoder import encode_segment, find_ffmpeg
from magi_ray.media.joiner import join, verify
from magi_ray.render.artifacts.commits import committed, segment_pre_image
from magi_ray.render.artifacts.prefix import prefix_pixels
from magi_ray.render.artifacts.provenance import provenance
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.storage import keys
from magi_ray.storage.records import digest, holds, payload_to_file, read_record, record_bytes, require_readable
from magi_ray.storage.store import Store
from magi_ray.timeline import FRAMES_PER_CHUNK

FORMAT = 2


def finish(store: Store, run_id: str, plan: RowPlan, encoder: str) -> None:
    """Join, verify and publish: first the mp4, then its JSON, which makes it count.

    Where the video is published already, or one of a newer take, nothing is changed: whoever comes late wastes time.
    Memory does not grow with the video: segments go through files. Raises StoreError, MediaError, OutputError.
    """
    begun = time.monotonic()
    if _is_late(store, run_id, plan):
        return
    runtime, timeline = plan.settings.runtime, plan.timeline
    with tempfile.TemporaryDirectory(prefix="magi-ray-") as folder:
        segments = _prefix_segments(store, plan, Path(folder))
        for chunk in range(timeline.num_chunks):
            key = digest(segment_pre_image(store, plan, chunk, encoder))
            segments.append(Path(folder) / f"{chunk:08d}.mp4")
            payload_to_file(store, committed(store, "segment", key), "segment", segments[-1])
        video = Path(folder) / "video.mp4"
        join(segments, out=video, ffmpeg=find_ffmpeg())
        verify(
            video,
            frames=timeline.num_frames,
            width=runtime.video_size_w,
            height=runtime.video_size_h,
            fps=runtime.fps,
        )
        with video.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        # Joining took its time: looked at again, so that a late one all but never reaches the mp4.
        if _is_late(store, run_id, plan):
            return
        store.put_file(keys.video(run_id, plan.job_id), video)
        size = video.stat().st_size
    record = _what_made_it(plan, encoder) | {"sha256": sha256, "bytes": size}
    record["provenance"] = provenance(seconds=time.monotonic() - begun)
    data = record_bytes(record)
    if not store.put_if_absent(keys.video_record(run_id, plan.job_id), data) and not _is_late(store, run_id, plan):
        store.put(keys.video_record(run_id, plan.job_id), data)


def _is_late(store: Store, run_id: str, plan: RowPlan) -> bool:
    """Whether this plan's video, or one of a newer take of it, is published."""
    record = read_video_record(store, run_id, plan.job_id)
    if record is None or not holds(store, keys.video(run_id, plan.job_id), record["sha256"]):
        return False
    return record["stage_keys"] == list(plan.stage_keys) or len(record.get("takes", ())) > len(plan.takes)


def _prefix_segments(store: Store, plan: RowPlan, folder: Path) -> list[Path]:
    """The frames of a clip that the video is to begin with, in segments of a chunk's length. They are not kept in the
    store: encoding them again costs no more than reading them."""
    segments: list[Path] = []
    if not plan.timeline.included_frames:
        return segments
    pixels = prefix_pixels(store, plan)
    for first in range(0, len(pixels), FRAMES_PER_CHUNK):
        segments.append(folder / f"prefix-{first:08d}.mp4")
        encode_segment(
            pixels[first : first + FRAMES_PER_CHUNK],
            ffmpeg=find_ffmpeg(),
            fps=plan.settings.runtime.fps,
            frame_offset=first,
            settings=plan.settings.encoder,
            out=segments[-1],
        )
    return segments


def published(
    store: Store, run_id: str, plan: RowPlan, *, sizes: Mapping[str, int] | None = None, reread: bool = False
) -> dict[str, Any] | None:
    """The record of ``plan``'s video, if it is published, made of these very stages, and as long as it was.

    sizes: ``video_sizes``, if the caller has them.  reread: read the whole video and compare its digest, too.
    Raises InputError when a newer magi-ray published it.
    """
    video = keys.video(run_id, plan.job_id)
    if sizes is not None and video not in sizes:
        return None  # spares the store a call for every row that is still to be rendered
    record = read_video_record(store, run_id, plan.job_id)
    if record is None or record["stage_keys"] != list(plan.stage_keys):
        return None
    if sizes is None:
        sizes = {entry.key: entry.size for entry in store.entries(video)}
    if sizes.get(video) != record["bytes"] or (reread and not holds(store, video, record["sha256"])):
        return None
    return record


def video_sizes(store: Store, run_id: str) -> dict[str, int]:
    """Bytes of everything under ``videos/``, by key: one listing for a whole run."""
    return {entry.key: entry.size for entry in store.entries(keys.videos(run_id))}


def read_video_record(store: Store, run_id: str, job_id: str) -> dict[str, Any] | None:
    """What made the published video; None when there is none, or the record is damaged. Raises InputError when a newer
    magi-ray wrote it."""
    try:
        record = read_record(store.get(keys.video_record(run_id, job_id)))
    except (ObjectMissing, ObjectDamaged):
        return None
    require_readable(f"Video {job_id} of run {run_id}", record["format"], FORMAT)
    # Without a seal (format 1) a damaged record may have lost a field.
    return record if record.keys() >= {"stage_keys", "bytes", "sha256"} else None


def _what_made_it(plan: RowPlan, encoder: str) -> dict[str, Any]:
    runtime, timeline = plan.settings.runtime, plan.timeline
    return {
        "format": FORMAT,
        "job_id": plan.job_id,
        "row": plan.row,
        "frames": timeline.num_frames,
        "prefix_frames": timeline.included_frames,
        "chunks": timeline.num_chunks,
        "width": runtime.video_size_w,
        "height": runtime.video_size_h,
        "fps": runtime.fps,
        "duration_s": timeline.num_frames / runtime.fps,
        "seed": runtime.seed,
        "captions": list(plan.captions),
        "controls": {str(c): control.model_dump(exclude_none=True) for c, control in plan.controls.items()},
        "media": None if plan.media is None else {"kind": plan.media.kind, "sha256": plan.media.sha256},
        "encoder": encoder,
        "settings": plan.settings.model_dump(mode="json"),
        "weights": asdict(plan.digests),
        "takes": list(plan.takes),
        "stage_keys": list(plan.stage_keys),
    }
