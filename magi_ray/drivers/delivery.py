"""The files that `magi-ray render` was asked for: noted on this machine, so that whatever finishes the run here writes
them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from magi_ray.drivers.status_file import machine_folder
from magi_ray.render.artifacts.videos import copy_video, read_video_record
from magi_ray.settings import Frozen
from magi_ray.storage.store import Store


class _Delivery(Frozen):
    """files: absolute, by job_id.  done: they were written; what becomes of them then is the user's."""

    files: dict[str, Path]
    done: bool = False


def note_files(store: Store, run_id: str, files: Mapping[str, Path]) -> None:
    """``deliver`` is to write these, by job_id. Losing the note loses no work: `render` writes it again."""
    path = _note(store, run_id)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_Delivery(files={job: file.absolute() for job, file in files.items()}).model_dump_json())


def deliver(store: Store, run_id: str, published: Collection[str]) -> dict[str, Path]:
    """Write those noted files of the run whose videos are ``published``, each whole or not at all, unless they were
    written before. Returns those that are there, by job_id. Raises StoreError (also if a video is damaged), OSError."""
    path = _note(store, run_id)
    try:
        note = _Delivery.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return {}
    ready = {job: file for job, file in note.files.items() if job in published}
    if not note.done:
        for job, file in ready.items():
            if (record := read_video_record(store, run_id, job)) is not None:
                copy_video(store, run_id, job, record, file)
        if len(ready) == len(note.files):
            with suppress(OSError):
                path.write_text(note.model_copy(update={"done": True}).model_dump_json())
    return {job: file for job, file in ready.items() if file.exists()}


def _note(store: Store, run_id: str) -> Path:
    return machine_folder(store) / "render" / f"{run_id}.json"
