"""Published videos: the records beside their mp4 files, and whether they are what a plan asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magi_ray.errors import ObjectDamaged, ObjectMissing
from magi_ray.events import PublishedVideo
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.storage import keys
from magi_ray.storage.records import file_sha256, holds, read_record, require_readable
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


def is_video(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the file is the video of ``record``."""
    right_size = path.is_file() and path.stat().st_size == record["bytes"]
    return right_size and file_sha256(path) == record["sha256"]


def copy_video(store: Store, run_id: str, job_id: str, record: Mapping[str, Any], path: Path) -> None:
    """Copy the video of ``record`` to ``path``, whole or not at all; what came before an interruption is not copied
    again. Raises ObjectDamaged if the store's is not what was published; StoreError, OSError."""
    video, part = keys.video(run_id, job_id), path.with_name(f"{path.name}.part")
    with part.open("ab") as file:  # here, since a store would blame itself for a folder that cannot be written
        came = file.tell()
    for start in dict.fromkeys((came, 0)):  # the part may be of another take
        if start > record["bytes"]:
            continue
        if start < record["bytes"]:
            store.get_to_file(video, part, start=start)
        if is_video(part, record):
            part.replace(path)
            return
    part.unlink()
    raise ObjectDamaged(
        f"The video of job {job_id} in {store.uri} is damaged: it is not what was published.",
        remedy="Retry the row: its video is made again, without denoising.",
    )


def video_sizes(store: Store, run_id: str) -> dict[str, int]:
    """Bytes of everything under ``videos/``, by key: one listing for a whole run. Raises StoreError."""
    return {entry.key: entry.size for entry in store.entries(keys.videos(run_id))}
