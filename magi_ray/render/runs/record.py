"""A run as the store keeps it: reads back, on any machine, what ``submission`` wrote."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from magi_ray.errors import (
    ManifestError,
    ObjectDamaged,
    ObjectMissing,
    Problem,
    RunDamaged,
    RunNotFound,
    magi_ray_command,
)
from magi_ray.manifest import Defaults, Manifest, Row, parse_manifest
from magi_ray.render.plans.identity import Digests
from magi_ray.render.plans.row_plan import Media, RowPlan, plan_row, plan_rows
from magi_ray.render.plans.takes import Wish, read_takes
from magi_ray.render.runs.weights import local_weights
from magi_ray.settings import Frozen, Settings
from magi_ray.storage import keys
from magi_ray.storage.records import read_record, require_readable
from magi_ray.storage.store import Store, move_command

FORMAT = 3


class RunRecord(Frozen):
    """``run.json``. name: of the manifest.  manifest_sha256: of the store's copy; format 1 did not have it.
    media: what rows begin from, by job_id; before format 3 only by its file (``Media``).
    problems: of the rows that were left out; new in format 3."""

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
    problems: tuple[Problem, ...] = ()

    @property
    def left_out(self) -> int:
        """How many rows were left out."""
        return len({problem.row for problem in self.problems})


def run_stem(name: str) -> str:
    """What the id of a run begins with, before a dash and ten digits: ``name`` of its manifest without the suffix."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).stem).strip(".-")[:40] or "run"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run and its plans, by job_id in the manifest's order."""

    record: RunRecord
    manifest: Manifest
    plans: dict[str, RowPlan]

    @classmethod
    def planned(cls, record: RunRecord, manifest: Manifest, takes: Mapping[str, tuple[Wish, ...]]) -> Run:
        """takes: ``read_takes``. Raises SettingsError."""
        plans = plan_rows(manifest.rows, record.settings, record.digests, record.media, takes)
        return cls(record=record, manifest=manifest, plans=plans)

    def plan(self, row: Row, wishes: tuple[Wish, ...]) -> RowPlan:
        """The plan of another take of ``row``."""
        record = self.record
        return plan_row(row, record.settings, record.digests, record.media.get(row.job_id), wishes)

    @property
    def run_id(self) -> str:
        return self.record.run_id

    @property
    def settings(self) -> Settings:
        return self.record.settings


def open_run(store: Store, run_id: str, *, weights: Path | None = None, copied: bool = False) -> Run:
    """The run ``run_id`` as it was submitted, with the takes asked for since.

    weights: as for ``local_weights``.  copied: as for ``read_run``.
    Raises RunNotFound, ObjectDamaged, WeightsError, StoreError; InputError when a newer magi-ray wrote it.
    """
    record, manifest = read_run(store, run_id, copied=copied)
    settings = record.settings.model_copy(update={"weights": local_weights(record.settings, weights)})
    return Run.planned(record.model_copy(update={"settings": settings}), manifest, read_takes(store, run_id))


def with_takes(store: Store, run: Run) -> Run:
    """A prepared ``run`` with the takes that ``store`` holds of it, if it was submitted before. Raises as
    ``read_takes``."""
    takes = read_takes(store, run.run_id)
    return Run.planned(run.record, run.manifest, takes) if takes else run


def read_run(store: Store, run_id: str, *, copied: bool = False) -> tuple[RunRecord, Manifest]:
    """``open_run`` without planning its videos or looking for weights. Raises as it does.

    copied: read also a folder that is the copy of another run's.
    """
    try:
        content = read_content(store, run_id, copied=copied)
    except (ObjectMissing, ValueError) as exc:
        known, damaged = all_runs(store)
        if run_id in damaged:
            raise _damaged(store, run_id, damaged[run_id]) from exc
        raise RunNotFound(
            f"There is no run {run_id!r} in {store.uri}.",
            remedy=f"It holds {', '.join(known[-5:])}." if known else "It holds no runs.",
            next_command=magi_ray_command("list", "--store", store.uri),
        ) from exc
    try:
        record = _record(run_id, content)
        data = store.get(keys.run_manifest(run_id))
        sha256 = hashlib.sha256(data).hexdigest()
        if record.manifest_sha256 not in (None, sha256):
            raise _damaged(store, run_id, f"its manifest has sha256 {sha256}, not {record.manifest_sha256}")
        defaults = Defaults.of(record.settings)
        manifest = parse_manifest(
            data, defaults, base=Path("/"), name=record.name, stored=True, left_out=record.problems
        )
    except ObjectMissing as exc:
        raise _damaged(store, run_id, "its manifest is gone") from exc
    except ValidationError as exc:
        raise _damaged(store, run_id, "its record is not that of a run") from exc
    except ManifestError as exc:
        if record.manifest_sha256 is not None:  # so these are the bytes that were written
            raise
        raise _damaged(store, run_id, "its manifest cannot be read") from exc
    return record, manifest


def read_run_record(store: Store, run_id: str) -> RunRecord:
    """``run.json`` alone. Raises ObjectMissing, ObjectDamaged; InputError when a newer magi-ray wrote it;
    ValidationError for a damaged one of format 1."""
    return _record(run_id, read_content(store, run_id))


def all_runs(store: Store) -> tuple[list[str], dict[str, str]]:
    """Ids of the runs whose ``run.json`` can be read, oldest first; of the others, what is wrong, by id."""
    created: dict[str, float] = {}
    damaged: dict[str, str] = {}
    for run_id in dict.fromkeys(filter(None, map(keys.run_of, store.list(keys.RUNS)))):
        try:
            created[run_id] = read_content(store, run_id)["created_unix"]
        except ObjectMissing:
            damaged[run_id] = "its run.json is gone"
        except RunDamaged as exc:
            damaged[run_id] = exc.what
    return sorted(created, key=lambda run_id: created[run_id]), damaged


def _record(run_id: str, content: dict[str, Any]) -> RunRecord:
    require_readable(f"Run {run_id}", content["format"], FORMAT)
    return RunRecord.model_validate(content)


def read_content(store: Store, run_id: str, *, copied: bool = False) -> dict[str, Any]:
    """``run.json``. Raises ObjectMissing, ObjectDamaged; ValueError for an id that no run can have.

    copied: as for ``read_run``.
    """
    data = store.get(keys.run_record(run_id))
    try:
        content = read_record(data)
    except ObjectDamaged as exc:
        raise _damaged(store, run_id, f"of its run.json, {exc.message}") from exc
    named, kinds = content.get("run_id"), {"format": int, "created_unix": int | float, "run_id": str}
    if not all(isinstance(content.get(name), kind) for name, kind in kinds.items()):
        raise _damaged(store, run_id, "its run.json is not the record of a run")
    if named != run_id and not copied:
        raise _copied(store, run_id, str(named))
    return content


def _copied(store: Store, run_id: str, named: str) -> RunDamaged:
    here = keys.run(run_id)
    if keys.is_key(named) and not store.exists(keys.run_record(named)):
        remedy, command = "Give the folder its name back.", move_command(store, here, keys.run(named))
    else:
        remedy, command = "Move the copy out of the store, or delete it.", move_command(store, here)
    what = f"its run.json is that of run {named}: its folder was copied or renamed"
    return RunDamaged(_told(store, run_id, what), what=what, remedy=remedy, next_command=command)


def _damaged(store: Store, run_id: str, what: str) -> RunDamaged:
    return RunDamaged(
        _told(store, run_id, what),
        what=what,
        resubmit=True,
        remedy="Submit its manifest again, with the same settings: that repairs it, and renders nothing twice.",
        next_command=magi_ray_command("verify", run_id, "--store", store.uri),
    )


def _told(store: Store, run_id: str, what: str) -> str:
    return f"Run {run_id} in {store.uri} is damaged: {what}."
