"""Forecast: what submitting a run will do with each of its rows, and why. Writes nothing and computes no tensors.

To say why stages are missing, a row is compared with the plan of an earlier run in the store that shares most stages
with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import compress, islice

from magi_ray.errors import InputError, ObjectDamaged, ObjectMissing
from magi_ray.events import RowInventory
from magi_ray.manifest import Row
from magi_ray.media.clips import Taken
from magi_ray.render.artifacts.commits import segment_pre_image
from magi_ray.render.artifacts.provenance import device_name
from magi_ray.render.artifacts.videos import read_video_record
from magi_ray.render.driving.inventory import take_inventory_of_run
from magi_ray.render.driving.pace import Speed, cost_digest, seconds_per_chunk
from magi_ray.render.driving.reports import failed_for_its_medium, read_failures, read_progress
from magi_ray.render.plans.differences import segment_changes, stage_changes, stages_shared
from magi_ray.render.plans.row_plan import RowPlan, plan_row
from magi_ray.render.plans.space import Space, inputs_space, stages_space, video_space
from magi_ray.render.plans.takes import Wish, read_takes
from magi_ray.render.runs.record import Run, RunRecord, read_run
from magi_ray.storage import keys
from magi_ray.storage.records import digest, verified_commit
from magi_ray.storage.store import Store

MAX_RUNS = 10  # a row is compared with the newest earlier runs

_NEW = "new: no video of that job_id was rendered before"
_STOPPED = "the run stopped before its end"


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One row. Stages in ``what`` and ``reasons`` are numbered from 1, as in `status`; chunks from 0, as in a manifest.

    what: "reuse" (nothing is denoised or decoded), "decode and join", "resume at stage n", "render", or "leave failed":
    a row that failed in this run waits for `retry`.
    reasons: a sentence each.  frames: of the finished video.  clip: which frames of its clip it continues.
    stages_left: to compute; a stage that several rows share counts for the first of them.
    forwards_left: the denoising steps of these stages, without passes over clean chunks.
    left_s: what these stages will take, going by earlier runs of such rows on this kind of device; None without any.
    space_left: what the store is to take for the row.
    """

    job_id: str
    what: str
    reasons: tuple[str, ...]
    frames: int
    clip: Taken | None
    stages: int
    stages_left: int
    forwards_left: int
    left_s: float | None
    space_left: Space


def forecast(store: Store, run: Run, encoder: str) -> tuple[Forecast, ...]:
    """Every row of a prepared ``run`` with its takes, in the manifest's order.

    encoder: ``media.encoder.encoder_identity``.  Raises StoreError; InputError when a newer magi-ray wrote a video.
    """
    forecaster = _Forecaster(store, run, encoder)
    inventories = take_inventory_of_run(store, run, encoder)
    rows = {row.job_id: row for row in run.manifest.rows}
    # In the order of rendering: a stage that several rows share is computed for the first of them.
    forecasts = {
        inventory.job_id: forecaster.row(inventory, rows[inventory.job_id])
        for inventory in sorted(inventories, key=lambda inventory: -inventory.priority)
    }
    return tuple(forecasts[job_id] for job_id in rows)


def _missing_stages(store: Store, plan: RowPlan, done: int) -> list[int]:
    """The stages from ``done`` on that the store does not hold whole: denoising computes these and skips the others."""
    missing: list[int] = []
    for stage in range(done, len(plan.stage_keys)):
        if not (_has_commit(store, plan, stage) or _has_commit(store, plan, stage + 1)):
            # The chain ends here; looking for every later stage would cost a call each.
            return [*missing, *range(stage, len(plan.stage_keys))]
        if verified_commit(store, "stage", plan.stage_keys[stage]) is None:
            missing.append(stage)
    return missing


def _has_commit(store: Store, plan: RowPlan, stage: int) -> bool:
    """Whether ``stage`` has a commit, damaged or not."""
    return stage < len(plan.stage_keys) and store.exists(keys.commit("stage", plan.stage_keys[stage]))


class _Forecaster:
    """Forecasts the rows of a run, to be asked in the order of rendering."""

    def __init__(self, store: Store, run: Run, encoder: str) -> None:
        self._store, self._run, self._encoder = store, run, encoder
        self._earlier = _EarlierRuns(store)
        self._failures = read_failures(store, run.run_id, run.plans)
        self._computed_for: dict[str, str] = {}  # stage key: job_id
        self._embedded: set[str] = set()  # keys of captions that an earlier row embeds

    def row(self, found: RowInventory, row: Row) -> Forecast:
        """The forecast of ``row``, of which the store holds ``found``."""
        plan = self._run.plans[row.job_id]
        left: list[int] = []
        if found.published:
            what, reasons = "reuse", ["its video is published"]
        elif (failed := self._failures.get(row.job_id)) and not failed_for_its_medium(failed, plan):
            first_line = (failed.message.splitlines() or [""])[0]
            what, reasons = "leave failed", [f"failed before ({failed.failure}), `retry` tries again: {first_line}"]
        elif found.stages_done < found.num_stages:
            missing = _missing_stages(self._store, plan, found.stages_done)
            left, reasons = self._left_to_compute(plan, missing)
            reasons += self._why_stages(found, plan, row, missing)
            what = "decode and join" if not left else f"resume at stage {left[0] + 1}" if left[0] else "render"
        elif len(found.segments_done) == found.num_chunks:
            what, reasons = "reuse", ["all of it is in the store, only to be joined"]
        else:
            what, reasons = "decode and join", self._why_segments(found, plan, row)
        return Forecast(
            job_id=row.job_id,
            what=what,
            reasons=tuple(reasons),
            frames=plan.timeline.num_frames,
            clip=plan.taken,
            stages=found.num_stages,
            stages_left=len(left),
            forwards_left=len(left) * plan.forwards_per_stage,
            left_s=self._seconds(plan, left),
            space_left=Space() if what == "leave failed" else self._space_left(found, plan, left),
        )

    def _seconds(self, plan: RowPlan, stages: Sequence[int]) -> float | None:
        """What computing these stages of ``plan`` takes here, if it was measured."""
        if not stages:
            return 0.0
        device = device_name(plan.settings.numeric.device)
        per_chunk = seconds_per_chunk(self._earlier.speeds, cost_digest(plan), device)
        if per_chunk is None:
            return None
        return per_chunk * sum(len(plan.timeline.window(stage)) for stage in stages) / plan.timeline.window_size

    def _space_left(self, found: RowInventory, plan: RowPlan, left: Sequence[int]) -> Space:
        if found.published:
            return Space()
        space = stages_space(plan, left) + video_space(plan, found.num_chunks - len(found.segments_done))
        if left and not found.embedded:
            captions = dict(zip(plan.caption_digests, plan.captions, strict=True))
            # A prefix that several rows share counts for each of them: it is small.
            space += inputs_space(plan, [text for key, text in captions.items() if key not in self._embedded])
            self._embedded |= captions.keys()
        return space

    def _left_to_compute(self, plan: RowPlan, missing: Sequence[int]) -> tuple[list[int], list[str]]:
        """Those of the ``missing`` stages that no earlier row computes, and a sentence for each row that does."""
        by_others = {stage: self._computed_for.get(plan.stage_keys[stage]) for stage in missing}
        left = [stage for stage, job_id in by_others.items() if job_id is None]
        self._computed_for |= {plan.stage_keys[stage]: plan.job_id for stage in left}
        counts = Counter(filter(None, by_others.values()))
        return left, [f"{count} of its stages are computed for {job_id}" for job_id, count in counts.items()]

    def _why_stages(self, found: RowInventory, plan: RowPlan, row: Row, missing: Sequence[int]) -> list[str]:
        """Why the ``missing`` stages of ``plan`` must be computed."""
        done = found.stages_done
        reasons: list[str] = []
        before = self._earlier.same_job(plan, row) or (self._earlier.other_job(plan, row) if done else None)
        shared = 0 if before is None else stages_shared(before.plan, plan)
        # Whether rendering of this very video had begun.
        begun = self._earlier.holds(plan) if before is None else _has_commit(self._store, plan, shared)
        if done not in missing:
            reasons.append("a caption or the prefix is damaged in the store")
        elif _has_commit(self._store, plan, done):
            reasons.append(f"stage {done + 1} is damaged in the store")
        elif len(missing) < found.num_stages - done:
            reasons.append(f"stage {done + 1} is gone from the store")
        elif begun or done < shared:
            reasons.append(f"{done} of {found.num_stages} stages are there: {_STOPPED}")
        if begun:
            return reasons
        if before is None:
            reasons.append(f"{_NEW}; {done} of {found.num_stages} stages are those of another" if done else _NEW)
            return reasons
        if before.plan.job_id != plan.job_id:
            reasons.append(f"{_NEW}; it begins as {before.plan.job_id} of run {before.run_id}")
        reasons += stage_changes(before.plan, plan, shared)
        if shared >= plan.timeline.window_size:
            reasons += self._why_encoded_anew(before, plan)
        return reasons

    def _why_segments(self, found: RowInventory, plan: RowPlan, row: Row) -> list[str]:
        """Why chunks must be decoded, though all latents are stored."""
        chunk = min(set(range(found.num_chunks)) - found.segments_done)
        pre_image = segment_pre_image(self._store, plan, chunk, self._encoder)
        if self._store.exists(keys.commit("segment", digest(pre_image))):
            return [f"the segment of chunk {chunk} is damaged in the store"]
        if not found.segments_done:
            for before in (*self._earlier.plans(plan.job_id), self._earlier.other_job(plan, row)):
                shared = 0 if before is None else stages_shared(before.plan, plan)
                if before and shared == found.num_stages and (changes := self._why_encoded_anew(before, plan)):
                    return changes
        elif chunk == found.num_chunks - 1:
            length = plan.timeline.num_frames
            for other in self._earlier.plans(plan.job_id):
                if other.plan.stage_keys == plan.stage_keys and (old := other.plan.timeline.num_frames) != length:
                    return [f"{'longer' if old < length else 'shorter'}: {old} → {length} frames"]
        return [f"{len(found.segments_done)} of {found.num_chunks} segments are there: {_STOPPED}"]

    def _why_encoded_anew(self, before: _EarlierPlan, plan: RowPlan) -> list[str]:
        record = read_video_record(self._store, before.run_id, before.plan.job_id) or {}
        encoders = record.get("encoder", self._encoder), self._encoder
        return [f"{change}: segments are encoded anew" for change in segment_changes(before.plan, plan, encoders)]


@dataclass(frozen=True, kw_only=True)
class _EarlierPlan:
    """The plan of one row of an earlier run, with some or all of its takes."""

    run_id: str
    plan: RowPlan


@dataclass(frozen=True, kw_only=True)
class _EarlierRun:
    """An earlier run, not yet planned. rows, takes: by job_id."""

    record: RunRecord
    rows: Mapping[str, Row]
    takes: Mapping[str, tuple[Wish, ...]]

    def plans(self, job_id: str) -> Iterator[_EarlierPlan]:
        """Plans of one row: with all its takes, all but the last, and so on; none if the run has no such row."""
        if job_id not in self.rows:
            return
        record, takes = self.record, self.takes.get(job_id, ())
        for count in range(len(takes), -1, -1):
            plan = plan_row(self.rows[job_id], record.settings, record.digests, record.media.get(job_id), takes[:count])
            yield _EarlierPlan(run_id=record.run_id, plan=plan)


class _EarlierRuns:
    """The newest runs of a store, read when first needed, without those that cannot be read."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def plans(self, job_id: str) -> Iterator[_EarlierPlan]:
        """Newest first."""
        return (earlier for run in self._runs for earlier in run.plans(job_id))

    def same_job(self, plan: RowPlan, row: Row) -> _EarlierPlan | None:
        """The plan of another video of that job_id that shares most stages with ``plan``; of several, the newest."""
        runs = [run for run in self._runs if row.job_id in run.rows]
        # Planning takes milliseconds: of the runs that cannot share a stage, only one is looked at.
        alike = [_first_stage(run.rows[row.job_id]) == _first_stage(row) for run in runs]
        unlike = [run for run, same in zip(runs, alike, strict=True) if not same]
        for some in (compress(runs, alike), unlike[:1]):
            others = (e for run in some for e in run.plans(row.job_id) if e.plan.stage_keys != plan.stage_keys)
            if found := _sharing_most(plan, others):
                return found
        return None

    def other_job(self, plan: RowPlan, row: Row) -> _EarlierPlan | None:
        """As ``same_job``, among rows of other job_ids with the same first stage."""
        alike = (pair for pair in self._by_first_stage.get(_first_stage(row), ()) if pair[1] != row.job_id)
        found = (next(run.plans(job_id)) for run, job_id in islice(alike, MAX_RUNS))
        return _sharing_most(plan, (earlier for earlier in found if earlier.plan.stage_keys[0] == plan.stage_keys[0]))

    def holds(self, plan: RowPlan) -> bool:
        """Whether this very video was submitted before."""
        return any(earlier.plan.stage_keys == plan.stage_keys for earlier in self.plans(plan.job_id))

    @cached_property
    def _by_first_stage(self) -> dict[Hashable, list[tuple[_EarlierRun, str]]]:
        found: dict[Hashable, list[tuple[_EarlierRun, str]]] = {}
        for run in self._runs:
            for row in run.rows.values():
                found.setdefault(_first_stage(row), []).append((run, row.job_id))
        return found

    @cached_property
    def speeds(self) -> tuple[Speed, ...]:
        """What their drivers measured. One small object each."""
        reports = (read_progress(self._store, run.record.run_id) for run in self._runs)
        return tuple(speed for report in reports if report is not None for speed in report.speeds)

    @cached_property
    def _runs(self) -> list[_EarlierRun]:
        """Newest first."""
        entries = [e for e in self._store.entries(keys.RUNS) if e.key == keys.run_record(keys.run_of(e.key))]
        newest = sorted(entries, key=lambda entry: entry.age_s)[:MAX_RUNS]
        runs = []
        for run_id in [keys.run_of(entry.key) for entry in newest]:
            with suppress(InputError, ObjectDamaged, ObjectMissing, ValueError):
                record, manifest = read_run(self._store, run_id)
                rows = {row.job_id: row for row in manifest.rows}
                runs.append(_EarlierRun(record=record, rows=rows, takes=read_takes(self._store, run_id)))
        return runs


def _sharing_most(plan: RowPlan, candidates: Iterable[_EarlierPlan]) -> _EarlierPlan | None:
    return max(candidates, key=lambda earlier: stages_shared(earlier.plan, plan), default=None)


def _first_stage(row: Row) -> Hashable:
    """What is known of a row's first stage before it is planned: rows that differ in it share no stage."""
    return row.seed, row.width, row.height, row.num_steps, row.captions[0].prompt
