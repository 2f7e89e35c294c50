"""Denoise: the stages of a video, one after the other, each committed before it counts. No tensors: what computes a
stage is given, so that a simulation can run this very body."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import Protocol

from magi_ray.errors import StoreError
from magi_ray.events import StageCommitted, StepDone
from magi_ray.render.artifacts.commits import commit
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.storage.records import verified_commit
from magi_ray.storage.store import Store
from magi_ray.system import Background, System

COMMIT_DEADLINE_S = 900.0

Pack = Callable[[], Mapping[str, bytes]]
"""Gives the payloads of a computed stage by role: "state", and "chunk" where one became clean."""


class VideoStages(Protocol):
    """Computes the stages of one video, in order."""

    def run(self, stage: int) -> Generator[None, None, Pack]:
        """Yields after each of the forwards_per_stage steps of ``stage``. Raises NumericError, DeviceOutOfMemory."""
        ...


class DenoiseNetwork(Protocol):
    """What a Denoiser computes with. It stays loaded from one video to the next."""

    def begin(self, plan: RowPlan, first_stage: int) -> VideoStages:
        """Ready to run ``first_stage``, from what the stages before it left in the store.

        Raises StoreError (ObjectMissing, ObjectDamaged), DeviceOutOfMemory.
        """
        ...


class Denoiser:
    """Computes and commits stages. ``denoise_network.load_denoiser`` makes one with the DiT."""

    def __init__(self, store: Store, network: DenoiseNetwork, *, system: System = System()) -> None:
        self._store, self._network, self._system = store, network, system

    def carry_out(self, plan: RowPlan, first_stage: int) -> Iterator[StepDone | StageCommitted]:
        """Compute and commit the stages of ``plan`` from ``first_stage`` on; the ones before it are in the store.

        A later stage that is there already (the one before it was damaged, or another run renders the same video) is
        reported, not computed.
        Writing a stage overlaps the first forward of the next one, never more: an interruption loses at most the
        num_steps / window_size forwards that no commit covers (docs/decisions/0003).
        Raises NumericError, DeviceOutOfMemory, StoreError (ObjectMissing, ObjectDamaged: an earlier stage cannot be
        read).
        """
        stage = first_stage
        while stage < plan.timeline.num_stages:
            if self._is_there(plan, stage):
                yield _committed(plan, stage, seconds=0.0)
                stage += 1
            else:
                stage = yield from self._compute(plan, stage)

    def _is_there(self, plan: RowPlan, stage: int) -> bool:
        return verified_commit(self._store, "stage", plan.stage_keys[stage]) is not None

    def _compute(self, plan: RowPlan, first_stage: int) -> Generator[StepDone | StageCommitted, None, int]:
        """Compute stages up to one that is there already; returns its number, or that of all stages."""
        stages = self._network.begin(plan, first_stage)
        write: _Write | None = None
        for stage in range(first_stage, plan.timeline.num_stages):
            if stage > first_stage and self._is_there(plan, stage):
                break
            running, step, stage_s = stages.run(stage), 0, 0.0
            while True:
                begun = self._system.clock()
                try:
                    next(running)
                except StopIteration as end:
                    pack: Pack = end.value
                    break
                seconds = self._system.clock() - begun
                step, stage_s = step + 1, stage_s + seconds
                yield StepDone(
                    job_id=plan.job_id, stage=stage, step=step, steps=plan.forwards_per_stage, seconds=seconds
                )
                if write is not None:
                    yield write.result()
                    write = None
            write = _Write(self._system, partial(self._commit, plan, stage, pack, stage_s), plan, stage, stage_s)
        else:
            stage = plan.timeline.num_stages
        if write is not None:
            yield write.result()
        return stage

    def _commit(self, plan: RowPlan, stage: int, pack: Pack, seconds: float) -> None:
        commit(self._store, "stage", plan.pre_image(stage), pack(), seconds=seconds, system=self._system)


class _Write:
    """A stage on its way into the store, beside the first forward of the next one."""

    def __init__(self, system: System, write: Callable[[], None], plan: RowPlan, stage: int, seconds: float) -> None:
        self._committed = _committed(plan, stage, seconds=seconds)
        self._background: Background[None] = system.start(write, name="magi-ray-commit")

    def result(self) -> StageCommitted:
        """What to report, once the stage is in the store. Raises what writing raised."""
        try:
            self._background.result(COMMIT_DEADLINE_S)
        except TimeoutError:
            stage, job_id = self._committed.stage, self._committed.job_id
            raise StoreError(f"Stage {stage} of job {job_id} was not written in {COMMIT_DEADLINE_S:.0f} s.") from None
        return self._committed


def _committed(plan: RowPlan, stage: int, *, seconds: float) -> StageCommitted:
    return StageCommitted(job_id=plan.job_id, stage=stage, chunk=plan.timeline.finished(stage), seconds=seconds)
