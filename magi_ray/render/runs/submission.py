"""Submission: ``prepare`` checks everything that can be checked before anything is written; ``create`` writes the run
with its own copy of the manifest, settings and media. ``look_at_media`` is the part of it that needs no torch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from magi_ray.errors import InputError, MediaError, MediaMissing, ObjectDamaged, ObjectMissing, Problem
from magi_ray.manifest import Manifest, Row, require_valid
from magi_ray.manifest.messages import shown
from magi_ray.media.clips import Taken
from magi_ray.media.reader import clip_frames, inspect_clip, inspect_image
from magi_ray.media.sound import has_sound
from magi_ray.redaction import redact
from magi_ray.render.artifacts.prefix import pixels_digest, read_prefix, sound_of
from magi_ray.render.artifacts.videos import read_video_record
from magi_ray.render.plans.identity import run_digest
from magi_ray.render.plans.row_plan import Media, timeline_of
from magi_ray.render.runs.captions import notes_on_prompts
from magi_ray.render.runs.media import MediaFiles
from magi_ray.render.runs.record import Run, RunRecord, all_runs, read_run, read_run_record, run_stem
from magi_ray.render.runs.weights import make_weights, weight_digests
from magi_ray.settings import PrefixSettings, Settings
from magi_ray.storage import keys
from magi_ray.storage.records import file_sha256, holds, record_bytes
from magi_ray.storage.store import Store
from magi_ray.timeline import FRAMES_PER_LATENT


def prepare(
    manifest: Manifest, *, name: str, settings: Settings, store: Store | None = None, skip_invalid: bool = False,
    files: MediaFiles | None = None,
) -> tuple[Run, MediaFiles]:  # fmt: skip
    """The run of ``manifest``, which was checked against these ``settings``, and the media files it needs.

    name: of the manifest.  store: where an earlier run of it may have media that are gone by now.
    skip_invalid: leave out rows with problems, as long as there is another one.  files: those fetched already.
    Writes nothing but made weights, and copies of media in S3 for as long as the MediaFiles exist.
    Raises ManifestError with every problem of rows and their media; SettingsError, WeightsError, MediaError as
    ``preflight.check`` and ``memory.require``; StoreUnavailable when media cannot be downloaded now.
    """
    name = redact(name)  # it is kept, and is part of the run's id
    kept = {} if store is None else {"kept": _kept_by_earlier_runs(store, manifest, settings)}
    looked = look_at_media(manifest, files, **kept)
    manifest, media, files = looked.manifest, looked.media, looked.files
    if not (skip_invalid and manifest.rows):
        require_valid(manifest, name)
    # Imported here: a wrong manifest is told before torch would have been loaded.
    from magi_ray.render.runs import memory, preflight

    make_weights(settings)
    manifest = replace(manifest, notes=(*manifest.notes, *notes_on_prompts(manifest.rows, settings)))
    # Before the digests, which read every byte: a shard cut short is found in a second.
    preflight.check(settings)
    digests = weight_digests(settings)
    left_out = tuple(dict.fromkeys(problem.row for problem in manifest.problems))
    of_media = {job: medium.identity for job, medium in media.items()}
    digest = run_digest(manifest.digest, of_media, settings, digests, left_out=left_out)
    record = RunRecord(
        run_id=f"{run_stem(name)}-{digest[:10]}",
        name=name,
        created_unix=time.time(),
        magi_ray=version("magi-ray"),
        manifest_digest=manifest.digest,
        manifest_sha256=hashlib.sha256(manifest.parquet()).hexdigest(),
        settings=settings,
        digests=digests,
        media=media,
        problems=manifest.problems,
    )
    run = Run.planned(record, manifest, takes={})
    memory.require(run.plans.values(), memory.available(settings))
    return run, files


def create(store: Store, run: Run, files: Mapping[str, Path]) -> bool:
    """Write ``run`` into ``store``: media and manifest first, ``run.json`` last. False if it existed already.

    What is stored and intact stays; what is damaged or missing is written again. A medium that is lost may be replaced
    by another file that looks and sounds the same: ``run.json`` then names that one. Raises StoreError, InputError.
    """
    submitted = store.exists(keys.run_record(run.run_id))
    for sha256, path in files.items():
        # Those of a new run in any case: a garbage collection under way may have listed them already, and spares what
        # was written since.
        if not (submitted and holds(store, keys.media(sha256), sha256)):
            store.put_file(keys.media(sha256), path)
    if submitted:
        with suppress(ObjectDamaged):
            record, _ = read_run(store, run.run_id)
            lost = {
                job_id: given
                for job_id, given in run.record.media.items()
                if given.sha256 in files
                and (kept := record.media[job_id].sha256) not in files
                and not holds(store, keys.media(kept), kept)
            }
            if lost:
                mended = record.model_copy(update={"media": {**record.media, **lost}})
                store.put(keys.run_record(run.run_id), record_bytes(mended.model_dump(mode="json")))
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


@dataclass(frozen=True, kw_only=True)
class Looked:
    """manifest: without the rows whose media cannot be used; with their problems, and notes.  media: of its rows, by
    job_id.  files: those that a run is to keep."""

    manifest: Manifest
    media: dict[str, Media]
    files: MediaFiles


Kept = Callable[[Sequence[Row], Mapping[str, Media]], Mapping[str, tuple[Media, str]]]
"""(rows whose files are gone, the media of the others by job_id) → by job_id: what the row began from in an earlier
run, and the id of that run."""


def look_at_media(manifest: Manifest, files: MediaFiles | None = None, kept: Kept = lambda gone, media: {}) -> Looked:
    """Opens what rows begin from, so that an unreadable file is found now; also that of rows with other problems.

    files: those fetched already.  kept: asked once, if files are gone.  Raises StoreUnavailable.
    """
    files = MediaFiles() if files is None else files
    media: dict[str, Media] = {}
    notes: list[str] = []
    said: dict[str, list[int]] = {}  # rows by what is to be said of them
    inspect = cache(_inspect)  # many rows may continue one clip
    problems: list[Problem] = []
    gone: dict[str, tuple[Row, Problem]] = {}
    fit = {row.number for row in manifest.rows}
    for row in sorted((*manifest.rows, *manifest.unfit), key=lambda row: row.number):
        if row.prefix_location is None:
            continue
        try:
            path = files.fetch(row.prefix_location)
            found, of_row = inspect(path, _kind(row), row.width, row.height, row.fps, row.prefix)
        except MediaError as exc:
            # The reason alone: the value names the file, and a download's own name means nothing.
            problem = _problem(row, _kind(row), _written(row, exc), exc.reason, exc.remedy)
            if isinstance(exc, MediaMissing) and row.number in fit:
                gone[row.job_id] = row, problem
            else:
                problems.append(problem)
            continue
        except OSError as exc:
            rule = f"cannot be read ({exc.strerror})"
            problems.append(_problem(row, _kind(row), _written(row), rule, "give a readable file"))
            continue
        late = list(_captions_that_never_begin(row, found)) if row.number in fit else []
        problems += late
        if row.number in fit and not late:
            media[row.job_id] = found
            files[found.sha256] = path
            for note in of_row:
                said.setdefault(note, []).append(row.number)
    for note, rows in said.items():
        notes.append(f"Row {rows[0]}{f' ({len(rows)} rows)' if len(rows) > 1 else ''} {note}.")
    earlier = kept([row for row, _ in gone.values()], media) if gone else {}
    for job_id, (row, problem) in gone.items():
        if job_id not in earlier:
            problems.append(problem)
            continue
        media[job_id], run_id = earlier[job_id]
        notes.append(f"Row {row.number}: its {_kind(row)} {problem.value} is gone; run {run_id} has it as submitted.")
    manifest = replace(manifest, notes=(*manifest.notes, *notes)).without(problems)
    media = {row.job_id: media[row.job_id] for row in manifest.rows if row.job_id in media}
    return Looked(manifest=manifest, media=media, files=files)


def _captions_that_never_begin(row: Row, found: Media) -> Iterator[Problem]:
    # How many chunks follow a clip is known only with the clip's length.
    last, chunks = row.captions[-1].start_chunk, timeline_of(row, found, window_size=1).num_chunks
    if last >= chunks:
        rule = f"is beyond the video's last chunk, {chunks - 1}"
        yield _problem(row, "schedule", str(last), rule, "make the video longer or leave that caption out")


def _kept_by_earlier_runs(store: Store, manifest: Manifest, settings: Settings) -> Kept:
    """What rows began from when the same rows were submitted before, with these settings and weights. It counts as
    long as the store keeps the file, or nothing is left to do with it, since the row of that very run is published."""

    def kept(gone: Sequence[Row], media: Mapping[str, Media]) -> dict[str, tuple[Media, str]]:
        make_weights(settings)
        wanted = run_digest(manifest.digest, {}, settings, weight_digests(settings))
        found: dict[str, tuple[Media, str]] = {}
        for run_id in reversed(all_runs(store)[0]):
            with suppress(InputError, ObjectDamaged, ObjectMissing, ValidationError):
                record = read_run_record(store, run_id)
                if record.settings.prefix != settings.prefix:
                    continue
                if run_digest(record.manifest_digest, {}, record.settings, record.digests) != wanted:
                    continue
                shown = {job_id: medium.identity for job_id, medium in record.media.items()}
                same_run = all(shown.get(job_id) == medium.identity for job_id, medium in media.items())
                for row in gone:
                    medium = record.media.get(row.job_id)
                    if medium is None or row.job_id in found:
                        continue
                    published = same_run and read_video_record(store, run_id, row.job_id) is not None
                    if published or store.exists(keys.media(medium.sha256)):
                        found[row.job_id] = medium, run_id
        return found

    return kept


def _inspect(
    path: Path, kind: Literal["image", "video"], width: int, height: int, fps: int, prefix: PrefixSettings
) -> tuple[Media, list[str]]:
    """What a row begins from, and what there is to say of the row. Raises MediaError, OSError."""
    looked, begins = (inspect_image(path), "an image") if kind == "image" else (inspect_clip(path), "a clip")
    notes = [f"begins from {begins} that {note}" for note in looked.notes]
    pixels, found = read_prefix(path, kind, width=width, height=height, fps=fps, prefix=prefix)
    medium = Media(kind=kind, sha256=file_sha256(path), latents=1, pixels=pixels_digest(pixels))
    if kind == "image":
        return medium, notes
    if not len(pixels):
        few = min(found, prefix.max_frames)
        reason = f"has {few} frame{'s' * (few != 1)} at {fps} fps, but a prefix needs at least {FRAMES_PER_LATENT}"
        raise MediaError.about(path, reason, remedy="give a longer clip, or an image")
    if found < (wanted := prefix.max_frames):
        notes.append(f"begins from {found} frames: its clip has no more at {fps} fps; {wanted} were asked for")
    elif prefix.clip_end == "start":
        found = max(found, clip_frames(path, fps=fps))
    medium = replace(medium, latents=len(pixels) // FRAMES_PER_LATENT, clip_frames=found, exact_length=True)
    lost = "leaves out the sound of its clip"
    if not prefix.include or medium.latents == 1:
        if has_sound(path):
            notes.append(f"{lost}: it is heard with the clip's own frames, where include_prefix shows them")
        return medium, notes
    taken = Taken.of_clip(found, frames=len(pixels), part=prefix.clip_end, fps=fps)
    try:
        sound = sound_of(path, taken, fps)
    except MediaError as exc:
        return medium, [*notes, f"{lost}, which {exc.reason}"]
    return replace(medium, sound=None if sound is None else sound.digest), notes


def _kind(row: Row) -> Literal["image", "video"]:
    return "image" if row.image is not None else "video"


def _written(row: Row, error: MediaError | None = None) -> str:
    """Where its image or clip lies, as messages show it: what names no file stands in quotes, as other cells do."""
    written = row.image or row.video or ""
    missing = isinstance(error, MediaMissing) and not written.lower().startswith("s3://")
    return shown(written) if missing else written


def _problem(row: Row, column: str, value: str, rule: str, remedy: str) -> Problem:
    return Problem(row=row.number, job_id=row.job_id, column=column, value=value, rule=rule, remedy=remedy)
