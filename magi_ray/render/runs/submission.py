"""Submission: ``prepare`` checks everything that can be checked before anything is written; ``create`` writes the run
with its own copy of the manifest, settings and media."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from magi_ray.errors import MediaError, ObjectDamaged, Problem
from magi_ray.manifest import Manifest, Row
from magi_ray.manifest.messages import manifest_error
from magi_ray.media.reader import count_frames, inspect_clip, inspect_image
from magi_ray.render.plans.identity import run_digest
from magi_ray.render.plans.row_plan import Media
from magi_ray.render.runs import memory, preflight
from magi_ray.render.runs.media import MediaFiles
from magi_ray.render.runs.record import Run, RunRecord, read_run
from magi_ray.render.runs.weights import make_weights, weight_digests
from magi_ray.settings import Settings
from magi_ray.storage import keys
from magi_ray.storage.records import holds, record_bytes
from magi_ray.storage.store import Store
from magi_ray.timeline import FRAMES_PER_LATENT


def prepare(manifest: Manifest, *, name: str, settings: Settings) -> tuple[Run, MediaFiles]:
    """The run of ``manifest``, which was checked against these ``settings``, and the media files it needs.

    name: of the manifest.  Writes nothing but made weights, and copies of media in S3 for as long as the MediaFiles
    exist.
    Raises ManifestError with every row whose media cannot be used; SettingsError, WeightsError, MediaError as
    ``preflight.check`` and ``memory.require``; StoreUnavailable when media cannot be downloaded now.
    """
    media, files, notes = _inspect_media(manifest, name)
    manifest = replace(manifest, notes=(*manifest.notes, *notes))
    make_weights(settings)
    # Before the digests, which read every byte: a shard cut short is found in a second.
    preflight.check(settings)
    digests = weight_digests(settings)
    digest = run_digest(manifest.digest, {job: medium.sha256 for job, medium in media.items()}, settings, digests)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).stem).strip(".-")[:40] or "run"
    record = RunRecord(
        run_id=f"{stem}-{digest[:10]}",
        name=name,
        created_unix=time.time(),
        magi_ray=version("magi-ray"),
        manifest_digest=manifest.digest,
        manifest_sha256=hashlib.sha256(manifest.parquet()).hexdigest(),
        settings=settings,
        digests=digests,
        media=media,
    )
    run = Run.planned(record, manifest, takes={})
    memory.require(run.plans.values(), memory.available(settings))
    return run, files


def create(store: Store, run: Run, files: Mapping[str, Path]) -> bool:
    """Write ``run`` into ``store``: media and manifest first, ``run.json`` last. False if it existed already.

    What is stored and intact stays; what is damaged or missing is written again. Raises StoreError, InputError.
    """
    submitted = store.exists(keys.run_record(run.run_id))
    for sha256, path in files.items():
        # Those of a new run in any case: a garbage collection under way may have listed them already, and spares what
        # was written since.
        if not (submitted and holds(store, keys.media(sha256), sha256)):
            store.put_file(keys.media(sha256), path)
    if submitted:
        with suppress(ObjectDamaged):
            read_run(store, run.run_id)
            return False
    # If it was submitted, its record or manifest is damaged: both are written again.
    store.put(keys.run_manifest(run.run_id), run.manifest.parquet())
    data = record_bytes(run.record.model_dump(mode="json"))
    if submitted:
        store.put(keys.run_record(run.run_id), data)
    created = not submitted and store.put_if_absent(keys.run_record(run.run_id), data)
    # Only now does garbage collection know that this run needs them.
    for sha256, path in files.items():
        if not store.exists(keys.media(sha256)):
            store.put_file(keys.media(sha256), path)
    return created


def _inspect_media(manifest: Manifest, name: str) -> tuple[dict[str, Media], MediaFiles, list[str]]:
    """What rows begin from, by job_id, each opened once so that an unreadable file is found now; the files by sha256;
    and notes. Raises ManifestError, StoreUnavailable."""
    media: dict[str, Media] = {}
    files = MediaFiles()
    notes: list[str] = []
    problems: list[Problem] = []
    for row in manifest.rows:
        if row.prefix_location is None:
            continue
        try:
            path = files.fetch(row.prefix_location)
            notes += _shown(row, path)
            found, note = _inspect(row, path)
        except MediaError as exc:
            # The reason alone: the value names the file, and a download's own name means nothing.
            problems.append(_problem(row, _kind(row), row.image or row.video, exc.reason, exc.remedy))
            continue
        except OSError as exc:
            rule = f"cannot be read ({exc.strerror})"
            problems.append(_problem(row, _kind(row), row.image or row.video, rule, "give a readable file"))
            continue
        # How many chunks follow a clip is known only with the clip's length.
        last, chunks = row.captions[-1].start_chunk, row.chunks(found.latents)
        if last >= chunks:
            rule = f"is beyond the video's last chunk, {chunks - 1}"
            problems.append(_problem(row, "schedule", last, rule, "make the video longer or leave that caption out"))
        media[row.job_id] = found
        files[found.sha256] = path
        notes += [note] if note else []
    if problems:
        raise manifest_error(name, problems, next_command=f"magi-ray manifest validate {name}")
    return media, files, notes


def _inspect(row: Row, path: Path) -> tuple[Media, str]:
    """What the row begins from, and a note on it or "". Raises MediaError, OSError."""
    latents, note = 1, ""
    if row.image is None:
        wanted = row.prefix.max_frames
        frames = count_frames(path, fps=row.fps, max_frames=wanted)
        latents = frames // FRAMES_PER_LATENT
        if not latents:
            reason = f"has {frames} frames at {row.fps} fps, but a prefix needs at least {FRAMES_PER_LATENT}"
            raise MediaError.about(path, reason, remedy="give a longer clip, or an image")
        if frames < wanted:
            found = f"{frames} frames: its clip has no more at {row.fps} fps"
            note = f"Row {row.number} begins from {found}; {wanted} were asked for."
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Media(kind=_kind(row), sha256=sha256, latents=latents), note


def _shown(row: Row, path: Path) -> list[str]:
    """Notes on how the image or the clip is shown. Raises MediaError, OSError."""
    if row.image is None:
        return [f"Row {row.number}'s clip {note}." for note in inspect_clip(path).notes]
    return [f"Row {row.number}'s image {note}." for note in inspect_image(path).notes]


def _kind(row: Row) -> Literal["image", "video"]:
    return "image" if row.image is not None else "video"


def _problem(row: Row, column: str, value: object, rule: str, remedy: str) -> Problem:
    return Problem(row=row.number, job_id=row.job_id, column=column, value=str(value), rule=rule, remedy=remedy)
