"""Forecast: what submitting a run will do with each of its rows, and why. Nothing is written; no tensors.

What is missing is told apart by comparing the row with what was rendered before: the plan, of an earlier run in the
store, that shares most stages with it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from magi_ray import manifest
from magi_ray.errors import InputError, ObjectDamaged, ObjectMissing
from magi_ray.render import scheduler
from magi_ray.render.durable import segment_pre_image
from magi_ray.render.edits import segment_changes, stage_changes, stages_shared
from magi_ray.render.finish import read_video_record
from magi_ray.render.inventory import take_stock_of_run
from magi_ray.render.plan import RowPlan, plan_row
from magi_ray.render.run import Run, RunRecord, read_run
from magi_ray.render.takes import read_takes
from magi_ray.storage import keys
from magi_ray.storage.records import digest, verified_commit
from magi_ray.storage.store import Store

MAX_RUNS = 10  # earlier runs that a row is compared with, the newest ones

_NEW = "new: no video of that job_id was rendered before"
_STOPPED = "the run stopped before its end"


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One row. Stages in ``what`` and ``reasons`` are numbered from 1, as in `status`; chunks from 0, as in a manifest.

    what: "reuse" (nothing is denoised or decoded), "decode and join", "resume at stage n" or "render".
    reasons: a sentence each.  stages_left: to compute.  forwards_left: denoising steps that these take, each of which
    is reported as it is done; passes over chunks that are clean are not counted, as they are nowhere.
    frames: of the finished video.
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
    why = _Why(store, encoder)
    stock = take_stock_of_run(store, run, encoder)
    told = []
    for held, row in zip(stock, run.manifest.rows, strict=True):
        plan = run.plans[row.job_id]
        left = held.num_stages - held.stages_done
        if held.published:
            what, reasons = "reuse", ["its video is published"]
        elif left:
            what = f"resume at stage {held.stages_done + 1}" if held.stages_done else "render"
            reasons = why.stages(held, plan, row)
        elif len(held.segments_done) == held.num_chunks:
            what, reasons = "reuse", ["all of it is in the store, only to be joined"]
        else:
            what, reasons = "decode and join", why.segments(held, plan, row)
        told.append(
            Forecast(
                job_id=row.job_id,
                what=what,
                reasons=tuple(reasons),
                frames=plan.timeline.num_frames,
                stages=held.num_stages,
                stages_left=left,
                forwards_left=left * plan.forwards_per_stage,
            )
        )
    return tuple(told)


class _Why:
    """The reasons for what is to be done."""

    def __init__(self, store: Store, encoder: str) -> None:
        self._store, self._encoder, self._archive = store, encoder, _Archive(store)

    def stages(self, held: scheduler.Row, plan: RowPlan, row: manifest.Row) -> list[str]:
        """Why stages of ``plan`` are to be computed."""
        done, told = held.stages_done, []
        before = self._archive.nearest(plan) or (self._archive.alike(plan, row) if done else None)
        shared = 0 if before is None else stages_shared(before.plan, plan)
        # Whether anything was computed that no earlier video explains.
        begun = self._archive.submitted(plan) if before is None else self._there(plan, shared)
        if self._there(plan, done):
            damaged = verified_commit(self._store, "stage", plan.stage_keys[done]) is None
            told.append(
                f"stage {done + 1} is damaged in the store" if damaged else "a caption or the prefix is damaged"
            )
        elif any(self._there(plan, stage) for stage in range(done + 1, held.num_stages)):
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

    def segments(self, held: scheduler.Row, plan: RowPlan, row: manifest.Row) -> list[str]:
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

    def _there(self, plan: RowPlan, stage: int) -> bool:
        return stage < len(plan.stage_keys) and self._store.exists(keys.commit("stage", plan.stage_keys[stage]))


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

    def nearest(self, plan: RowPlan) -> _Earlier | None:
        """The plan for another video of that job_id that shares most stages with ``plan``; of several, the newest."""
        return _nearest(plan, (e for e in self.plans(plan.job_id) if e.plan.stage_keys != plan.stage_keys))

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
