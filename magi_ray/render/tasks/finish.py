"""Finish: the segments of a video to one verified mp4, published with a record of what made it. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from magi_ray.events import StageCommitted, StepDone
from magi_ray.media.encoder import encode_segment
from magi_ray.media.joiner import join, verify
from magi_ray.media.reader import Pixels
from magi_ray.media.sound import Sound
from magi_ray.render.artifacts.commits import committed, segment_pre_image
from magi_ray.render.artifacts.prefix import pixels_of, sound_of, stored_medium
from magi_ray.render.artifacts.provenance import provenance
from magi_ray.render.artifacts.videos import FORMAT, read_video_record
from magi_ray.render.plans.row_plan import Media, RowPlan
from magi_ray.render.plans.takes import BackTo
from magi_ray.storage import keys
from magi_ray.storage.records import Commit, digest, file_sha256, holds, payload_to_file, read_commit, record_bytes
from magi_ray.storage.store import Store
from magi_ray.system import System, temporary_folder
from magi_ray.timeline import FRAMES_PER_CHUNK

Joiner = Callable[[RowPlan, Sequence[Path], Path], None]
"""(plan, segments, out): writes the plan's video to ``out`` and verifies it. It holds the frames of the clip, if it is
to begin with them, then the segments, one for each chunk. Raises MediaError, OutputError, WorkerLost, StoreError."""


def load_finisher(store: Store, run_id: str, *, ffmpeg: Path, encoder: str) -> Finisher:
    """A Finisher that joins with ``ffmpeg``, whose identity is ``encoder``."""
    return Finisher(store, run_id, encoder=encoder, joiner=partial(_make_video, store, ffmpeg))


class Finisher:
    """The finish task of run ``run_id``. ``encoder``: ``media.encoder.encoder_identity`` of the run's ffmpeg."""

    def __init__(self, store: Store, run_id: str, *, encoder: str, joiner: Joiner, system: System = System()) -> None:
        self._store, self._run_id, self._encoder, self._joiner, self._system = store, run_id, encoder, joiner, system

    def carry_out(self, plan: RowPlan, index: int = 0) -> Iterator[StepDone | StageCommitted]:
        """Join, verify and publish: first the mp4, then its record, which makes it count. Yields nothing.

        Does nothing if the video, or one of a newer take, is published already. Segments go through files, so memory
        does not grow with the video. Raises StoreError, MediaError, OutputError, WorkerLost.
        """
        begun = self._system.clock()
        if self._already_published(plan):
            return
        with temporary_folder() as folder:
            video = folder / "video.mp4"
            segments, decoding_s = self._segments(plan, folder)
            self._joiner(plan, segments, video)
            sha256 = file_sha256(video)
            cost = self._cost(plan, decoding_s)
            # Joining takes long. Checked again, so that a late worker all but never replaces a newer mp4.
            if self._already_published(plan):
                return
            self._store.put_file(keys.video(self._run_id, plan.job_id), video)
            size = video.stat().st_size
        made_by = provenance(seconds=self._system.clock() - begun, system=self._system)
        what = {"sha256": sha256, "bytes": size, "provenance": made_by}
        record = _record(plan, self._encoder) | cost | what
        data, key = record_bytes(record), keys.video_record(self._run_id, plan.job_id)
        if not self._store.put_if_absent(key, data) and not self._already_published(plan):
            self._store.put(key, data)
        yield from ()

    def _already_published(self, plan: RowPlan) -> bool:
        """Whether this plan's video, or one of a newer take of it, is published."""
        record = read_video_record(self._store, self._run_id, plan.job_id)
        if record is None or not holds(self._store, keys.video(self._run_id, plan.job_id), record["sha256"]):
            return False
        return record["stage_keys"] == list(plan.stage_keys) or len(record.get("takes", ())) > len(plan.takes)

    def _cost(self, plan: RowPlan, decoding_s: float) -> dict[str, Any]:
        """What computing ``plan`` took, as ``PublishedVideo`` says it: of several drivers, none knows it all."""
        stages = (self._own_seconds(plan, read_commit(self._store, "stage", key)) for key in plan.stage_keys)
        seconds = [own for own in stages if own is not None]
        return {
            "render_seconds": round(sum(seconds) + decoding_s, 3),
            "forwards_spent": len(seconds) * plan.forwards_per_stage,
            "forwards_reused": (len(plan.stage_keys) - len(seconds)) * plan.forwards_per_stage,
        }

    def _segments(self, plan: RowPlan, folder: Path) -> tuple[list[Path], float]:
        """The segments of all chunks, as files in ``folder``; and the seconds it took to make those that were made for
        this row."""
        paths, seconds = [], 0.0
        for chunk in range(plan.timeline.num_chunks):
            key = digest(segment_pre_image(self._store, plan, chunk, self._encoder))
            segment = committed(self._store, "segment", key)
            paths.append(folder / f"{chunk:08d}.mp4")
            payload_to_file(self._store, segment, "segment", paths[-1])
            seconds += self._own_seconds(plan, segment) or 0.0
        return paths, seconds

    def _own_seconds(self, plan: RowPlan, commit: Commit | None) -> float | None:
        """What computing it took; None if it was not computed for this row of this run."""
        row = {"run_id": self._run_id, "job_id": plan.job_id}
        if commit is None or not row.items() <= commit.provenance.items():
            return None
        return float(commit.provenance["seconds"])


def _make_video(store: Store, ffmpeg: Path, plan: RowPlan, segments: Sequence[Path], out: Path) -> None:
    runtime = plan.settings.runtime
    width, height, fps = runtime.video_size_w, runtime.video_size_h, runtime.fps
    with temporary_folder() as folder:
        clip, wav = list[Path](), None
        sound_s = 0.0
        if plan.timeline.included_frames:
            with stored_medium(store, plan) as path:
                frames, sound = pixels_of(path, plan), _sound(path, plan)
            clip = list(_clip_segments(ffmpeg, plan, frames, folder))
            if sound is not None:
                wav, sound_s = folder / "sound.wav", len(sound.samples) / sound.rate
                sound.write(wav)
        join([*clip, *segments], out=out, ffmpeg=ffmpeg, sound=wav)
    verify(out, frames=plan.timeline.num_frames, width=width, height=height, fps=fps, sound_s=sound_s)


def _sound(path: Path, plan: RowPlan) -> Sound | None:
    """What is heard with the clip's frames, if the video is to carry it."""
    if plan.taken is None or plan.media is None or plan.media.sound is None:
        return None
    return sound_of(path, plan.taken, plan.settings.runtime.fps)


def _clip_segments(ffmpeg: Path, plan: RowPlan, frames: Pixels, folder: Path) -> Iterator[Path]:
    """``frames`` of the clip as segments of a chunk's length. The store does not keep them: encoding them again costs
    no more than reading them."""
    fps, settings = plan.settings.runtime.fps, plan.settings.encoder
    for first in range(0, len(frames), FRAMES_PER_CHUNK):
        path, part = folder / f"prefix-{first:08d}.mp4", frames[first : first + FRAMES_PER_CHUNK]
        encode_segment(part, ffmpeg=ffmpeg, fps=fps, frame_offset=first, settings=settings, out=path)
        yield path


def _record(plan: RowPlan, encoder: str) -> dict[str, Any]:
    runtime, timeline = plan.settings.runtime, plan.timeline
    return {
        "format": FORMAT, "job_id": plan.job_id, "row": plan.row,
        "frames": timeline.num_frames, "prefix_frames": timeline.included_frames, "chunks": timeline.num_chunks,
        "width": runtime.video_size_w, "height": runtime.video_size_h,
        "fps": runtime.fps, "duration_s": timeline.num_frames / runtime.fps, "seed": runtime.seed,
        "captions": list(plan.captions),
        "controls": {str(c): control.model_dump(exclude_none=True) for c, control in plan.controls.items()},
        "media": None if plan.media is None else _media_record(plan.media),
        "encoder": encoder, "settings": plan.settings.model_dump(mode="json"), "weights": asdict(plan.digests),
        "takes": [asdict(wish) if isinstance(wish, BackTo) else wish for wish in plan.takes],
        "stage_keys": list(plan.stage_keys),
    }  # fmt: skip


def _media_record(media: Media) -> dict[str, str]:
    named = {"kind": media.kind, "sha256": media.sha256, "pixels": media.pixels, "sound": media.sound}
    return {name: value for name, value in named.items() if value is not None}
