"""Published videos: the records beside their mp4 files, and whether they are what a plan asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from magi_ray.errors import ObjectDamaged, ObjectMissing
from magi_ray.events import PublishedVideo
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.storage import keys
from magi_ray.storage.records import holds, read_record, require_readable
from magi_ray.storage.store import Store

FORMAT = 2  # of the record


def read_video_record(store: Store, run_id: str, job_id: str) -> dict[str, Any] | None:
    """The record of a published video: everything that made it. None if there is none, or it is damaged.

    Raises InputError when a newer magi-ray wrote it; StoreError.
    """
    try:
        record = read_record(store.get(keys.video_record(run_id, job_id)))
    except (ObjectMissing, ObjectDamaged):
        return None
    require_readable(f"Video {job_id} of run {run_id}", record["format"], FORMAT)
    # Without a seal (format 1) a damaged record may have lost a field.
    return record if record.keys() >= {"stage_keys", "bytes", "sha256"} else None


def published(
    store: Store, run_id: str, plan: RowPlan, *, sizes: Mapping[str, int] | None = None, reread: bool = False
) -> dict[str, Any] | None:
    """The record of ``plan``'s video; None unless it is published, made of the plan's stages and of its full size.

    sizes: ``video_sizes``, if the caller has them.  reread: also read the whole video and compare its digest.
    Raises as ``read_video_record``.
    """
    video = keys.video(run_id, plan.job_id)
    if sizes is not None and video not in sizes:
        return None  # no call to the store for a row that is still to be rendered
    record = read_video_record(store, run_id, plan.job_id)
    if record is None or record["stage_keys"] != list(plan.stage_keys):
        return None
    if sizes is None:
        sizes = {entry.key: entry.size for entry in store.entries(video)}
    if sizes.get(video) != record["bytes"] or (reread and not holds(store, video, record["sha256"])):
        return None
    return record


def published_video(record: Mapping[str, Any]) -> PublishedVideo:
    """What ``record`` says of the video's cost."""
    cost = {name: record.get(name) for name in ("render_seconds", "forwards_spent", "forwards_reused")}
    return PublishedVideo(sha256=record["sha256"], **cost)


def video_sizes(store: Store, run_id: str) -> dict[str, int]:
    """Bytes of everything under ``videos/``, by key: one listing for a whole run. Raises StoreError."""
    return {entry.key: entry.size for entry in store.entries(keys.videos(run_id))}
