"""A run: one submitted manifest, as the store remembers it.

``prepare`` finds everything that can be wrong before anything is written; ``create`` writes the run's own copy of the
manifest, settings and media; ``open_run`` reads them back, on this machine or another.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

import magi_ray
from magi_ray.errors import (
    InputError,
    ManifestError,
    MediaError,
    ObjectDamaged,
    ObjectMissing,
    Problem,
    RunNotFound,
    WeightsError,
)
from magi_ray.manifest import Defaults, Manifest, Row, explain, parse_manifest
from magi_ray.media.reader import count_frames, read_image
from magi_ray.models.files import digest_files, published_folder, text_encoder_files, weight_files
from magi_ray.render.plans.identity import Digests, run_digest
from magi_ray.render.plans.row_plan import Media, RowPlan, plan_rows
from magi_ray.render.plans.takes import read_takes
from magi_ray.render.runs.media import MediaFiles
from magi_ray.settings import Frozen, Settings, WeightPaths, cache_folder
from magi_ray.storage import keys
from magi_ray.storage.records import holds, read_record, record_bytes, require_readable
from magi_ray.storage.store import Store
from magi_ray.timeline import FRAMES_PER_LATENT

FORMAT = 2


class RunRecord(Frozen):
    """``run.json``: what was submitted. ``name``: of the manifest; ``media``: what each row begins from.
    manifest_sha256: of the store's copy; format 1 did not have it."""

    format: int = FORMAT
    run_id: str
    name: str
    created_unix: float
    magi_ray: str
    manifest_digest: str
    manifest_sha256: str | None = None
    settings: Settings
    digests: Digests
    media: dict[str, Media]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run with the plan of each of its videos, by job_id in the manifest's order."""

    record: RunRecord
    manifest: Manifest
    plans: dict[str, RowPlan]

    @property
    def run_id(self) -> str:
        return self.record.run_id

    @property
    def settings(self) -> Settings:
        return self.record.settings


def make_weights(settings: Settings) -> None:
    """Make the weights that a preset makes itself, unless they are there. Raises WeightsError."""
    if settings.weights.made_in is not None:
        # Imported here: other settings need no torch to be planned.
        from magi_ray.models.tiny import ensure_tiny

        ensure_tiny(settings.weights.made_in, settings)


def weight_digests(settings: Settings) -> Digests:
    """Digests of all weight files. Raises WeightsError."""
    weights, engine = settings.weights, settings.engine
    cache = cache_folder() / "digests.json"
    return Digests(
        dit=digest_files(
            weight_files(published_folder(weights.dit, fp8=engine.fp8_quant, distill=engine.distill)), cache=cache
        ),
        vae=digest_files([weights.vae / "config.json", *weight_files(weights.vae)], cache=cache),
        t5=digest_files(text_encoder_files(weights.t5), cache=cache),
        special_tokens=digest_files([weights.special_tokens], cache=cache),
    )


def require_same_weights(run: Run) -> None:
    """Raises WeightsError when the weights on this machine are not those ``run`` was submitted with."""
    make_weights(run.settings)
    found = asdict(weight_digests(run.settings))
    for network, submitted in asdict(run.record.digests).items():
        if found[network] != submitted:
            raise WeightsError(
                f"The files of {network} have digest {found[network][:12]}…, but run {run.run_id} was submitted with "
                f"{submitted[:12]}….",
                remedy="Bring back the files of then, or submit the manifest again to render it with these.",
            )


def prepare(data: bytes, *, name: str, base: Path, settings: Settings) -> tuple[Run, MediaFiles]:
    """The run that the manifest in ``data`` asks for, and the media files it needs.

    name: of the manifest.  base: folder its relative paths start from.  Nothing is written but made weights, and
    media that lie in S3, for as long as the second of the two lives.
    Raises ManifestError with every bad row; SettingsError, WeightsError, MediaError as ``preflight.check``;
    StoreUnavailable when media cannot be fetched now.
    """
    from magi_ray.render.runs import memory, preflight

    manifest = parse_manifest(data, Defaults.of(settings), base=base, name=name)
    media, files, notes = _inspect_media(manifest, name)
    manifest = replace(manifest, notes=(*manifest.notes, *notes))
    make_weights(settings)
    # Before the digests, which read every byte: a shard cut short is told in a second.
    preflight.check(settings)
    digests = weight_digests(settings)
    digest = run_digest(manifest.digest, {job: medium.sha256 for job, medium in media.items()}, settings, digests)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).stem).strip(".-")[:40] or "run"
    submitted = RunRecord(
        run_id=f"{stem}-{digest[:10]}",
        name=name,
        created_unix=time.time(),
        magi_ray=magi_ray.__version__,
        manifest_digest=manifest.digest,
        manifest_sha256=hashlib.sha256(manifest.parquet()).hexdigest(),
        settings=settings,
        digests=digests,
        media=media,
    )
    run = _with_plans(submitted, manifest, {})
    memory.require(run.plans.values(), memory.available(settings))
    return run, files


def create(store: Store, run: Run, files: Mapping[str, Path]) -> bool:
    """Write ``run`` into ``store``: media and manifest first, ``run.json`` last. False if it was there already.

    What is there and intact stays; what is damaged or gone is written anew.
    """
    submitted = store.exists(keys.run_record(run.run_id))
    for sha256, path in files.items():
        # Those of a new run in any case: a collection under way may have listed them as garbage, and leaves alone
        # what was written since.
        if not (submitted and holds(store, keys.media(sha256), sha256)):
            store.put_file(keys.media(sha256), path)
    damaged = False
    if submitted:
        try:
            read_run(store, run.run_id)
            return False
        except ObjectDamaged:
            damaged = True
    store.put(keys.run_manifest(run.run_id), run.manifest.parquet())
    data = record_bytes(run.record.model_dump(mode="json"))
    if damaged:
        store.put(keys.run_record(run.run_id), data)
    created = not damaged and store.put_if_absent(keys.run_record(run.run_id), data)
    # Garbage collection knows only now that this run needs them.
    for sha256, path in files.items():
        if not store.exists(keys.media(sha256)):
            store.put_file(keys.media(sha256), path)
    return created


def open_run(store: Store, run_id: str, *, weights: Path | None = None) -> Run:
    """The run ``run_id`` as it was submitted, with the takes asked for since.

    weights: the folder that its networks lie in on this machine, if not where they lay at submission. Made weights are
    taken from this machine's cache where they are not there.
    Raises RunNotFound, ObjectDamaged, WeightsError, InputError when a newer magi-ray wrote it.
    """
    submitted, manifest = read_run(store, run_id)
    settings = submitted.settings.model_copy(update={"weights": _weights_here(submitted.settings, weights)})
    here = submitted.model_copy(update={"settings": settings})
    return _with_plans(here, manifest, read_takes(store, run_id))


def with_takes(store: Store, run: Run) -> Run:
    """A prepared ``run`` with the takes that ``store`` holds if it was submitted before. Raises InputError when a newer
    magi-ray asked for one."""
    takes = read_takes(store, run.run_id)
    return _with_plans(run.record, run.manifest, takes) if takes else run


def read_run(store: Store, run_id: str) -> tuple[RunRecord, Manifest]:
    """``open_run`` without planning its videos. Raises as it does."""
    try:
        content = _content(store, run_id)
    except (ObjectMissing, ValueError) as exc:
        known = list_runs(store)
        raise RunNotFound(
            f"There is no run {run_id!r} in {store.uri}.",
            remedy=f"It holds {', '.join(known[-5:])}." if known else "It holds no runs.",
            next_command=f"magi-ray list --store {store.uri}",
        ) from exc
    require_readable(f"Run {run_id}", content["format"], FORMAT)
    try:
        found = RunRecord.model_validate(content)
        data = store.get(keys.run_manifest(run_id))
        sha256 = hashlib.sha256(data).hexdigest()
        if found.manifest_sha256 not in (None, sha256):
            raise _damaged(store, run_id, f"its manifest has sha256 {sha256}, not {found.manifest_sha256}")
        manifest = parse_manifest(
            data, Defaults.of(found.settings), base=Path("/"), name=found.name, media_must_exist=False
        )
    except ObjectMissing as exc:
        raise _damaged(store, run_id, "its manifest is gone") from exc
    except (ManifestError, ValidationError) as exc:
        if content["format"] > 1:  # sealed: it is what was written
            raise
        raise _damaged(store, run_id, "its record or manifest cannot be read") from exc
    return found, manifest


def all_runs(store: Store) -> tuple[list[str], list[str]]:
    """Ids of all runs: those that can be read, oldest first, and those whose ``run.json`` is damaged or gone."""
    created: dict[str, float] = {}
    damaged = []
    for run_id in dict.fromkeys(filter(None, map(keys.run_of, store.list(keys.RUNS)))):
        try:
            created[run_id] = _content(store, run_id).get("created_unix", 0.0)
        except (ObjectDamaged, ObjectMissing):
            damaged.append(run_id)
    return sorted(created, key=lambda run_id: created[run_id]), damaged


def list_runs(store: Store) -> list[str]:
    """The first of ``all_runs``."""
    return all_runs(store)[0]


def damaged_runs(store: Store) -> list[str]:
    """The second of ``all_runs``."""
    return all_runs(store)[1]


def _content(store: Store, run_id: str) -> dict[str, Any]:
    """What ``run.json`` says. Raises ObjectMissing, ObjectDamaged, ValueError for an id that no run can have."""
    data = store.get(keys.run_record(run_id))
    try:
        return read_record(data)
    except ObjectDamaged as exc:
        raise _damaged(store, run_id, f"of its record, {exc.message}") from exc


def _damaged(store: Store, run_id: str, what: str) -> ObjectDamaged:
    return ObjectDamaged(
        f"Run {run_id} in {store.uri} is damaged: {what}.",
        remedy="Submit its manifest again, with the same settings: that mends it, and renders nothing twice.",
        next_command=f"magi-ray submit MANIFEST --store {store.uri}",
    )


def _weights_here(settings: Settings, folder: Path | None) -> WeightPaths:
    """Where the networks of ``settings`` lie on this machine. Raises WeightsError for a ``folder`` that lacks one."""
    weights, engine = settings.weights, settings.engine
    if folder is not None:
        size = "24B" if settings.model.gated_linear_unit else "4.5B"
        return WeightPaths.downloaded(folder, size=size, fp8=engine.fp8_quant, distill=engine.distill)
    if weights.made_in is not None and not weights.made_in.exists():
        return WeightPaths.under(cache_folder() / weights.made_in.name, made=True)
    return weights


def _with_plans(record: RunRecord, manifest: Manifest, takes: Mapping[str, tuple[int, ...]]) -> Run:
    plans = plan_rows(manifest.rows, record.settings, record.digests, record.media, takes)
    return Run(record=record, manifest=manifest, plans=plans)


def _inspect_media(manifest: Manifest, name: str) -> tuple[dict[str, Media], MediaFiles, list[str]]:
    """What each row begins from, opened once so that an unreadable file is found now, by job_id; the files by sha256;
    and notes. Raises ManifestError, StoreUnavailable."""
    media: dict[str, Media] = {}
    files = MediaFiles()
    notes: list[str] = []
    problems: list[Problem] = []

    def complain(row: Row, column: str, value: object, rule: str, remedy: str) -> None:
        problems.append(
            Problem(row=row.number, job_id=row.job_id, column=column, value=str(value), rule=rule, remedy=remedy)
        )

    for row in manifest.rows:
        if row.prefix_location is None:
            continue
        kind: Literal["image", "video"] = "image" if row.image is not None else "video"
        path = Path(row.prefix_location)
        try:
            path = files.here(row.prefix_location)
            latents, note = _latents(row, path)
            notes += note
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except InputError as exc:
            # Which file is said already; one that was fetched has a name that means nothing.
            rule = exc.message.removeprefix(f"{path} ").removesuffix(".")
            complain(row, kind, row.image or row.video, rule, exc.remedy)
            continue
        except OSError as exc:
            complain(row, kind, row.image or row.video, f"cannot be read ({exc.strerror})", "give a readable file")
            continue
        # Seconds after a clip become chunks only now that the clip's length is known.
        last, chunks = row.captions[-1].start_chunk, row.chunks(latents)
        if last >= chunks:
            rule = f"is beyond the video's last chunk, {chunks - 1}"
            complain(row, "schedule", last, rule, "make the video longer or leave that caption out")
        media[row.job_id] = Media(kind=kind, sha256=sha256, latents=latents)
        files[sha256] = path
    if problems:
        raise ManifestError(
            f"{name} cannot be used: {len(problems)} problem{'s' * (len(problems) > 1)}.\n{explain(problems)}",
            problems,
            next_command=f"magi-ray manifest validate {name}",
        )
    return media, files, notes


def _latents(row: Row, path: Path) -> tuple[int, list[str]]:
    """Latent frames of the row's prefix, and what should be said of it. Raises MediaError."""
    if row.image is not None:
        read_image(path, width=row.width, height=row.height, fit=row.prefix.fit)
        return 1, []
    wanted = row.prefix.max_frames
    frames = count_frames(path, fps=row.fps, max_frames=wanted)
    if frames < FRAMES_PER_LATENT:
        raise MediaError(
            f"has {frames} frames at {row.fps} fps, but a prefix needs at least {FRAMES_PER_LATENT}",
            remedy="give a longer clip, or an image",
        )
    note = (
        f"Row {row.number} begins from {frames} frames: its clip has no more at {row.fps} fps, and {wanted} were asked."
    )
    return frames // FRAMES_PER_LATENT, [note] if frames < wanted else []
