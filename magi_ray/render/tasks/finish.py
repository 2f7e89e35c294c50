"""Finish: the segments of a video to one verified mp4, published with a record of what made it. No torch here."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from magi_ray.events import StageCommitted, StepDone
from magi_ray.media.encoder import encode_segment, find_ffmpeg
from magi_ray.media.joiner import join, verify
from magi_ray.render.artifacts.commits import committed, segment_pre_image
from magi_ray.render.artifacts.prefix import prefix_pixels
from magi_ray.render.artifacts.provenance import provenance
from magi_ray.render.artifacts.videos import FORMAT, read_video_record
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.storage import keys
from magi_ray.storage.records import digest, holds, payload_to_file, record_bytes
from magi_ray.storage.store import Store
from magi_ray.system import System
from magi_ray.timeline import FRAMES_PER_CHUNK


class Joiner(Protocol):
    """What a Finisher makes mp4 files with."""

    def make(self, plan: RowPlan, segments: Sequence[Path], out: Path) -> None:
        """Write ``plan``'s video to ``out`` and verify it: the frames of its clip, if it is to begin with them, then
        ``segments``, one for each chunk. Raises MediaError, OutputError, WorkerLost, StoreError."""
        ...


class Finisher:
    """The finish task of run ``run_id``. ``encoder``: ``media.encoder.encoder_identity`` of the run's ffmpeg."""

    def __init__(self, store: Store, run_id: str, *, encoder: str, joiner: Joiner, system: System = System()) -> None:
        self._store, self._run_id, self._encoder, self._joiner, self._system = store, run_id, encoder, joiner, system

    def carry_out(self, plan: RowPlan, index: int = 0) -> Iterator[StepDone | StageCommitted]:
        """Join, verify and publish: first the mp4, then its record, which makes it count. Yields nothing.

        Changes nothing where the video is published already, or one of a newer take. Memory does not grow with the
        video: segments go through files. Raises StoreError, MediaError, OutputError, WorkerLost.
        """
        begun = self._system.clock()
        if self._is_late(plan):
            return
        with tempfile.TemporaryDirectory(prefix="magi-ray-") as folder:
            video = Path(folder) / "video.mp4"
            self._joiner.make(plan, self._segments(plan, Path(folder)), video)
            with video.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            # Joining took its time: looked at again, so that a late one all but never reaches the mp4.
            if self._is_late(plan):
                return
            self._store.put_file(keys.video(self._run_id, plan.job_id), video)
            size = video.stat().st_size
        record = _what_made_it(plan, self._encoder) | {"sha256": sha256, "bytes": size}
        seconds = self._system.clock() - begun
        record["provenance"] = provenance(seconds=seconds, system=self._system)
        data, key = record_bytes(record), keys.video_record(self._run_id, plan.job_id)
        if not self._store.put_if_absent(key, data) and not self._is_late(plan):
            self._store.put(key, data)
        yield from ()

    def _is_late(self, plan: RowPlan) -> bool:
        """Whether this plan's video, or one of a newer take of it, is published."""
        record = read_video_record(self._store, self._run_id, plan.job_id)
        if record is None or not holds(self._store, keys.video(self._run_id, plan.job_id), record["sha256"]):
            return False
        return record["stage_keys"] == list(plan.stage_keys) or len(record.get("takes", ())) > len(plan.takes)

    def _segments(self, plan: RowPlan, folder: Path) -> list[Path]:
        """The segments of all chunks, as files in ``folder``."""
        paths = []
        for chunk in range(plan.timeline.num_chunks):
            key = digest(segment_pre_image(self._store, plan, chunk, self._encoder))
            paths.append(folder / f"{chunk:08d}.mp4")
            payload_to_file(self._store, committed(self._store, "segment", key), "segment", paths[-1])
        return paths


class FfmpegJoiner:
    """The Joiner of real runs. ``store`` holds the clips."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def make(self, plan: RowPlan, segments: Sequence[Path], out: Path) -> None:
        """As ``Joiner``."""
        runtime, ffmpeg = plan.settings.runtime, find_ffmpeg()
        with tempfile.TemporaryDirectory(prefix="magi-ray-") as folder:
            join([*self._clip(plan, ffmpeg, Path(folder)), *segments], out=out, ffmpeg=ffmpeg)
        verify(
            out,
            frames=plan.timeline.num_frames,
            width=runtime.video_size_w,
            height=runtime.video_size_h,
            fps=runtime.fps,
        )

    def _clip(self, plan: RowPlan, ffmpeg: Path, folder: Path) -> Iterator[Path]:
        """The frames of the clip that the video is to begin with, as segments of a chunk's length. They are not kept in
        the store: encoding them again costs no more than reading them."""
        if not plan.timeline.included_frames:
            return
        frames = prefix_pixels(self._store, plan)
        for first in range(0, len(frames), FRAMES_PER_CHUNK):
            path = folder / f"prefix-{first:08d}.mp4"
            encode_segment(
                frames[first : first + FRAMES_PER_CHUNK],
                ffmpeg=ffmpeg,
                fps=plan.settings.runtime.fps,
                frame_offset=first,
                settings=plan.settings.encoder,
                out=path,
            )
            yield path


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
