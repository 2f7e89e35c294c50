"""Denoise: the stages of a video in order, each one committed before it counts. No tensors here: what computes a stage
is an argument, so that the simulation runs this very code."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping

from magi_ray.errors import StoreError
from magi_ray.events import StageCommitted, StepDone
from magi_ray.render.artifacts.commits import commit
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.storage.records import verified_commit
from magi_ray.storage.store import Store
from magi_ray.system import System

COMMIT_DEADLINE_S = 900.0

Pack = Callable[[], Mapping[str, bytes]]
"""Gives the payloads of a computed stage by role: "state", and "chunk" if the stage completed one."""
RunStage = Callable[[int], Generator[None, None, Pack]]
"""Computes the given stage, after the one before it. Yields after each of its forwards_per_stage steps.
Raises NumericError, DeviceOutOfMemory."""
BeginVideo = Callable[[RowPlan, int], RunStage]
"""(plan, first_stage): reads from the store what the stages before ``first_stage`` left there.
Raises StoreError (ObjectMissing, ObjectDamaged), DeviceOutOfMemory."""


class Denoiser:
    """The denoise task. ``denoise_network.load_denoiser`` makes one with the DiT. run_id, device: for what is told."""

    def __init__(
        self, store: Store, begin_video: BeginVideo, *, run_id: str = "", device: str = "", system: System = System()
    ) -> None:
        self._store, self._begin_video, self._system = store, begin_video, system
        self._run_id, self._device = run_id, device

    def carry_out(self, plan: RowPlan, first_stage: int) -> Iterator[StepDone | StageCommitted]:
        """Compute and commit the stages of ``plan`` from ``first_stage`` on; the ones before it are in the store.

        A later stage that is in the store already (an earlier one was damaged, or another run renders the same video)
        is reported, not computed.
        Writing a stage overlaps the first forward of the next one, never more: an interruption loses at most the
        num_steps / window_size forwards that no commit covers (docs/decisions/0003).
        Raises NumericError, DeviceOutOfMemory, StoreError (ObjectMissing, ObjectDamaged: an earlier stage cannot be
        read).
        """
        stage = first_stage
        while stage < plan.timeline.num_stages:
            if self._is_stored(plan, stage):
                yield _stage_committed(plan, stage, seconds=0.0)
                stage += 1
            else:
                stage = yield from self._compute(plan, stage)

    def _is_stored(self, plan: RowPlan, stage: int) -> bool:
        return verified_commit(self._store, "stage", plan.stage_keys[stage]) is not None

    def _compute(self, plan: RowPlan, first_stage: int) -> Generator[StepDone | StageCommitted, None, int]:
        """Compute stages up to the first that is in the store, or to the end; returns the number of the next one."""
        run_stage = self._begin_video(plan, first_stage)
        written: Callable[[], StageCommitted] | None = None
        stage = first_stage
        while stage < plan.timeline.num_stages and not (stage > first_stage and self._is_stored(plan, stage)):
            steps, step, stage_s = run_stage(stage), 0, 0.0
            while True:
                begun = self._system.clock()
                try:
                    next(steps)
                except StopIteration as end:
                    written = self._start_commit(plan, stage, end.value, stage_s)
                    break
                seconds = self._system.clock() - begun
                step, stage_s = step + 1, stage_s + seconds
                yield StepDone(
                    job_id=plan.job_id,
                    stage=stage,
                    step=step,
                    steps=plan.forwards_per_stage,
                    seconds=seconds,
                    device=self._device,
                )
                if written is not None:
                    yield written()
                    written = None
            stage += 1
        if written is not None:
            yield written()
        return stage

    def _start_commit(self, plan: RowPlan, stage: int, pack: Pack, seconds: float) -> Callable[[], StageCommitted]:
        """Start writing a computed stage. The result waits until it is written, and raises what writing raised."""

        def write() -> None:
            about = {"run_id": self._run_id, "job_id": plan.job_id, "device": self._device}
            commit(self._store, "stage", plan.pre_image(stage), pack(), seconds=seconds, system=self._system, **about)

        def written() -> StageCommitted:
            try:
                writing.result(COMMIT_DEADLINE_S)
            except TimeoutError:
                message = f"Stage {stage} of job {plan.job_id} was not written in {COMMIT_DEADLINE_S:.0f} s."
                raise StoreError(message) from None
            return _stage_committed(plan, stage, seconds=seconds)

        writing = self._system.start(write, name="magi-ray-commit")
        return written


def _stage_committed(plan: RowPlan, stage: int, *, seconds: float) -> StageCommitted:
    return StageCommitted(job_id=plan.job_id, stage=stage, chunk=plan.timeline.finished(stage), seconds=seconds)
