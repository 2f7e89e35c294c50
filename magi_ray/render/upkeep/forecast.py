"""Forecast: what submitting a run will do with each of its rows, and why. Nothing is written; no tensors.

What is missing is told apart by comparing the row with what was rendered before: the plan, of an earlier run in the
store, that shares most stages with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import compress, islice

from magi_ray import manifest
from magi_ray.errors import InputError, ObjectDamaged, ObjectMissing
from magi_ray.events import RowInventory
from magi_ray.render.artifacts.commits import segment_pre_image
from magi_ray.render.artifacts.videos import read_video_record
from magi_ray.render.driving.inventory import take_inventory_of_run
from magi_ray.render.driving.reports import read_failures
from magi_ray.render.plans.differences import segment_changes, stage_changes, stages_shared
from magi_ray.render.plans.row_plan import RowPlan, plan_row
from magi_ray.render.plans.takes import read_takes
from magi_ray.render.runs.record import Run, RunRecord, read_run
from magi_ray.storage import keys
from magi_ray.storage.records import digest, verified_commit
from magi_ray.storage.store import Store

MAX_RUNS = 10  # earlier runs that a row is compared with, the newest ones

_NEW = "new: no video of that job_id was rendered before"
_STOPPED = "the run stopped before its end"


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One row. Stages in ``what`` and ``reasons`` are numbered from 1, as in `status`; chunks from 0, as in a manifest.

    what: "reuse" (nothing is denoised or decoded), "decode and join", "resume at stage n", "render", or "leave failed":
    what failed in this very run waits for `retry`.
    reasons: a sentence each.  stages_left: to compute; what rows have in common counts for the first of them.
    forwards_left: denoising steps that these take, each of which is reported as it is done; passes over chunks that are
    clean are not counted, as they are nowhere.  frames: of the finished video.
    """

    job_id: str
    what: str
    reasons: tuple[str, ...]
    frames: int
    stages: int
    stages_left: int
    forwards_left: int


def forecast(store: Store, run: Run, encoder: str) -> tuple[Forecast, ...]:
    """Every row of a prepared ``run`` with its takes, in the manifest's order. ``encoder``: the identity of ffmpeg."""
    forecaster = _Forecaster(store, run, encoder)
    stock = take_inventory_of_run(store, run, encoder)
    rows = {row.job_id: row for row in run.manifest.rows}
    # As they are rendered: a stage that several rows have in common is computed for the first of them.
    told = {
        held.job_id: forecaster.of(held, rows[held.job_id]) for held in sorted(stock, key=lambda row: -row.priority)
    }
    return tuple(told[job_id] for job_id in rows)


def _absent(store: Store, plan: RowPlan, done: int) -> list[int]:
    """The stages from ``done`` on that are not there whole: denoising computes these and passes over the others."""
    absent: list[int] = []
    for stage in range(done, len(plan.stage_keys)):
        if not (_there(store, plan, stage) or _there(store, plan, stage + 1)):
            # Here the chain ends; to ask for every later stage would take a call each.
            return [*absent, *range(stage, len(plan.stage_keys))]
        if verified_commit(store, "stage", plan.stage_keys[stage]) is None:
            absent.append(stage)
    return absent


def _there(store: Store, plan: RowPlan, stage: int) -> bool:
    """Whether there is a commit, damaged or not."""
    return stage < len(plan.stage_keys) and store.exists(keys.commit("stage", plan.stage_keys[stage]))


class _Forecaster:
    """Goes through the rows of a run in the order in which they are rendered."""

    def __init__(self, store: Store, run: Run, encoder: str) -> None:
        self._store, self._run, self._encoder = store, run, encoder
        self._archive = _Archive(store)
        self._failures = read_failures(store, run.run_id)
        self._computed: dict[str, str] = {}  # stage key: the row that it is computed for

    def of(self, held: RowInventory, row: manifest.Row) -> Forecast:
        """What becomes of ``row``, of which the store holds ``held``."""
        plan = self._run.plans[row.job_id]
        left: list[int] = []
        if held.published:
            what, reasons = "reuse", ["its video is published"]
        elif failed := self._failures.get(row.job_id):
            first = (failed.message.splitlines() or [""])[0]
            what, reasons = "leave failed", [f"failed before ({failed.failure}), `retry` tries again: {first}"]
        elif held.stages_done < held.num_stages:
            absent = _absent(self._store, plan, held.stages_done)
            common = {stage: self._computed.get(plan.stage_keys[stage]) for stage in absent}
            left = [stage for stage, job_id in common.items() if job_id is None]
            self._computed |= {plan.stage_keys[stage]: row.job_id for stage in left}
            what = "decode and join" if not left else f"resume at stage {left[0] + 1}" if left[0] else "render"
            reasons = [
                f"{count} of its stages are computed for {job_id}"
                for job_id, count in Counter(filter(None, common.values())).items()
            ]
            reasons += self._why_stages(held, plan, row, absent)
        elif len(held.segments_done) == held.num_chunks:
            what, reasons = "reuse", ["all of it is in the store, only to be joined"]
        else:
            what, reasons = "decode and join", self._why_segments(held, plan, row)
        return Forecast(
            job_id=row.job_id,
            what=what,
            reasons=tuple(reasons),
            frames=plan.timeline.num_frames,
            stages=held.num_stages,
            stages_left=len(left),
            forwards_left=len(left) * plan.forwards_per_stage,
        )

    def _why_stages(self, held: RowInventory, plan: RowPlan, row: manifest.Row, absent: list[int]) -> list[str]:
        """Why stages of ``plan`` are to be computed. ``absent``: those that are not there."""
        done = held.stages_done
        told: list[str] = []
        before = self._archive.nearest(plan, row) or (self._archive.alike(plan, row) if done else None)
        shared = 0 if before is None else stages_shared(before.plan, plan)
        # Whether anything was computed that no earlier video explains.
        begun = self._archive.submitted(plan) if before is None else _there(self._store, plan, shared)
        if done not in absent:
            told.append("a caption or the prefix is damaged in the store")
        elif _there(self._store, plan, done):
            told.append(f"stage {done + 1} is damaged in the store")
        elif len(absent) < held.num_stages - done:
            told.append(f"stage {done + 1} is gone from the store")
        elif begun or done < shared:
            told.append(f"{done} of {held.num_stages} stages are there: {_STOPPED}")
        if before is None and not begun:
            told.append(f"{_NEW}; {done} of {held.num_stages} stages are those of another" if done else _NEW)
        elif before is not None and not begun:
            if before.plan.job_id != plan.job_id:
                told.append(f"{_NEW}; it begins as {before.plan.job_id} of run {before.run_id}")
            told += stage_changes(before.plan, plan, shared)
            if shared >= plan.timeline.window_size:
                told += self._encoded_anew(before, plan)
        return told

    def _why_segments(self, held: RowInventory, plan: RowPlan, row: manifest.Row) -> list[str]:
        """Why chunks are to be decoded, though all latents are there."""
        chunk = min(set(range(held.num_chunks)) - held.segments_done)
        image = segment_pre_image(self._store, plan, chunk, self._encoder)
        if self._store.exists(keys.commit("segment", digest(image))):
            return [f"the segment of chunk {chunk} is damaged in the store"]
        if not held.segments_done:
            for before in (*self._archive.plans(plan.job_id), self._archive.alike(plan, row)):
                shared = 0 if before is None else stages_shared(before.plan, plan)
                if before and shared == held.num_stages and (changes := self._encoded_anew(before, plan)):
                    return changes
        return [f"{len(held.segments_done)} of {held.num_chunks} segments are there: {_STOPPED}"]

    def _encoded_anew(self, before: _Earlier, plan: RowPlan) -> list[str]:
        record = read_video_record(self._store, before.run_id, before.plan.job_id) or {}
        encoders = record.get("encoder", self._encoder), self._encoder
        return [f"{change}: segments are encoded anew" for change in segment_changes(before.plan, plan, encoders)]


@dataclass(frozen=True, kw_only=True)
class _Earlier:
    """What one row of an earlier run was, with some of its takes."""

    run_id: str
    plan: RowPlan


@dataclass(frozen=True, kw_only=True)
class _Submitted:
    """An earlier run, its rows not planned. rows, takes: by job_id."""

    record: RunRecord
    rows: Mapping[str, manifest.Row]
    takes: Mapping[str, tuple[int, ...]]

    def plans(self, job_id: str) -> Iterator[_Earlier]:
        """Plans of one row: with all its takes, all but the last, and so on; none when the row is not there."""
        if job_id not in self.rows:
            return
        record, takes = self.record, self.takes.get(job_id, ())
        for count in range(len(takes), -1, -1):
            plan = plan_row(self.rows[job_id], record.settings, record.digests, record.media.get(job_id), takes[:count])
            yield _Earlier(run_id=record.run_id, plan=plan)


class _Archive:
    """The newest runs of a store, read when they are first asked for. Those that cannot be read explain nothing."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def plans(self, job_id: str) -> Iterator[_Earlier]:
        """Newest first."""
        return (earlier for run in self._runs for earlier in run.plans(job_id))

    def nearest(self, plan: RowPlan, row: manifest.Row) -> _Earlier | None:
        """The plan for another video of that job_id that shares most stages with ``plan``; of several, the newest."""
        runs = [run for run in self._runs if row.job_id in run.rows]
        # Planning takes milliseconds: those that cannot share a stage are left out, but for one.
        alike = [_beginning(run.rows[row.job_id]) == _beginning(row) for run in runs]
        unlike = [run for run, same in zip(runs, alike, strict=True) if not same]
        for some in (compress(runs, alike), unlike[:1]):
            others = (e for run in some for e in run.plans(row.job_id) if e.plan.stage_keys != plan.stage_keys)
            if found := _nearest(plan, others):
                return found
        return None

    def submitted(self, plan: RowPlan) -> bool:
        """Whether this very video was."""
        return any(earlier.plan.stage_keys == plan.stage_keys for earlier in self.plans(plan.job_id))

    def alike(self, plan: RowPlan, row: manifest.Row) -> _Earlier | None:
        """``nearest`` among rows of other job_ids that begin as ``row`` does."""
        same = ((run, job_id) for run, job_id in self._beginnings.get(_beginning(row), ()) if job_id != row.job_id)
        found = (next(run.plans(job_id)) for run, job_id in islice(same, MAX_RUNS))
        return _nearest(plan, (earlier for earlier in found if earlier.plan.stage_keys[0] == plan.stage_keys[0]))

    @cached_property
    def _beginnings(self) -> dict[Hashable, list[tuple[_Submitted, str]]]:
        found: dict[Hashable, list[tuple[_Submitted, str]]] = {}
        for run in self._runs:
            for row in run.rows.values():
                found.setdefault(_beginning(row), []).append((run, row.job_id))
        return found

    @cached_property
    def _runs(self) -> list[_Submitted]:
        """Newest first."""
        entries = (entry for entry in self._store.entries(keys.RUNS) if entry.key.endswith("/run.json"))
        newest = sorted(entries, key=lambda entry: entry.age_s)[:MAX_RUNS]
        runs = []
        for run_id in [entry.key.removeprefix(keys.RUNS).split("/")[0] for entry in newest]:
            with suppress(InputError, ObjectDamaged, ObjectMissing, ValueError):
                record, found = read_run(self._store, run_id)
                rows = {row.job_id: row for row in found.rows}
                runs.append(_Submitted(record=record, rows=rows, takes=read_takes(self._store, run_id)))
        return runs


def _nearest(plan: RowPlan, candidates: Iterable[_Earlier]) -> _Earlier | None:
    return max(candidates, key=lambda earlier: stages_shared(earlier.plan, plan), default=None)


def _beginning(row: manifest.Row) -> Hashable:
    """What rows have in common that may share their first stage; to be found without planning them."""
    return row.seed, row.width, row.height, row.num_steps, row.captions[0].prompt
