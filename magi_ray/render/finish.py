"""Finish: the segments of a video to one verified mp4, published with a record of what made it."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from magi_ray.media.encoder import encode_segment, find_ffmpeg
from magi_ray.media.joiner import join, verify
from magi_ray.render.durable import committed, segment_pre_image
from magi_ray.render.plan import RowPlan
from magi_ray.render.prefix import prefix_pixels
from magi_ray.render.provenance import provenance
from magi_ray.storage import keys
from magi_ray.storage.records import digest, payload_to_file
from magi_ray.storage.store import Store
from magi_ray.timeline import FRAMES_PER_CHUNK

FORMAT = 1


def finish(store: Store, run_id: str, plan: RowPlan, encoder: str) -> None:
    """Join, verify and publish: first the mp4, then its JSON, which makes it count.

    Memory does not grow with the video: segments go through files. Raises StoreError, MediaError, OutputError.
    """
    begun = time.monotonic()
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
        store.put_file(keys.video(run_id, plan.job_id), video)
        size = video.stat().st_size
    record = _what_made_it(plan, encoder) | {"sha256": sha256, "bytes": size}
    record["provenance"] = provenance(seconds=time.monotonic() - begun)
    store.put(keys.video_record(run_id, plan.job_id), json.dumps(record, indent=1, allow_nan=False).encode())


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


def published(store: Store, run_id: str, plan: RowPlan) -> dict[str, Any] | None:
    """The record of ``plan``'s video, if it is published and made of these very stages."""
    key = keys.video_record(run_id, plan.job_id)
    if not store.exists(key) or not store.exists(keys.video(run_id, plan.job_id)):
        return None
    record: dict[str, Any] = json.loads(store.get(key))
    return record if record.get("stage_keys") == list(plan.stage_keys) else None


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
        "stage_keys": list(plan.stage_keys),
    }
