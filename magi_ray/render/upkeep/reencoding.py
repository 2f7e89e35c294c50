"""What another ffmpeg on this machine costs a run: segments that an earlier driver made are encoded again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from magi_ray.errors import ObjectMissing
from magi_ray.render.artifacts.commits import segment_pre_image
from magi_ray.render.artifacts.videos import published, read_video_record, video_sizes
from magi_ray.render.driving.reports import read_progress
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.runs.record import Run
from magi_ray.storage import keys
from magi_ray.storage.records import digest
from magi_ray.storage.store import Store


@dataclass(frozen=True, kw_only=True)
class Reencoding:
    """``chunks`` that are still needed were encoded by ``before``; the ffmpeg here is ``here``. Both are
    ``media.encoder.encoder_identity``."""

    before: str
    here: str
    chunks: int

    def __str__(self) -> str:
        return (
            f"This machine has {self.here}, but {self.before} encoded what there is of videos that are not done."
            f" Other versions give other bytes, so chunks are decoded and encoded again: {self.chunks}. Nothing is"
            " denoised again. To avoid it, put the ffmpeg of before first on the PATH, or go on where it is."
        )


def reencoding(store: Store, run: Run, encoder: str, *, retry: Collection[str] = ()) -> Reencoding | None:
    """What ``encoder`` will do again; None if nothing, or if nobody noted which ffmpeg there was before.

    retry: rows that are made again though they are done.
    Raises StoreError; InputError when a newer magi-ray wrote a video.
    """
    reported = read_progress(store, run.run_id)
    if reported is None:
        return None
    sizes = video_sizes(store, run.run_id)
    before = reported.encoder or _of_a_video(store, run.run_id, sizes)
    if before is None or before == encoder:
        return None
    chunks = 0
    for job_id, video in reported.progress.videos.items():
        plan = run.plans.get(job_id)
        if plan is None or not video.chunks_done:
            continue
        if plan.job_id in retry or published(store, run.run_id, plan, sizes=sizes) is None:
            chunks += sum(
                _has_segment(store, plan, chunk, before) and not _has_segment(store, plan, chunk, encoder)
                for chunk in range(plan.timeline.num_chunks)
            )
    return Reencoding(before=before, here=encoder, chunks=chunks) if chunks else None


def _of_a_video(store: Store, run_id: str, names: Mapping[str, int]) -> str | None:
    """The encoder of a published video: earlier drivers noted it nowhere else."""
    job_id = next(filter(None, map(keys.job_of, names)), None)
    record = None if job_id is None else read_video_record(store, run_id, job_id)
    return None if record is None else record.get("encoder")


def _has_segment(store: Store, plan: RowPlan, chunk: int, encoder: str) -> bool:
    try:
        return store.exists(keys.commit("segment", digest(segment_pre_image(store, plan, chunk, encoder))))
    except ObjectMissing:  # it is not clean yet
        return False
