"""TEMPORARY until the sampler's part is merged."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Protocol

from magi_ray.errors import StoreError
from magi_ray.events import StageCommitted, StepDone
from magi_ray.render.artifacts.commits import commit
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.storage.records import verified_commit
from magi_ray.storage.store import Store
from magi_ray.system import Background, System

COMMIT_DEADLINE_S = 900.0


class Stages(Protocol):
    def run(self, stage: int) -> Generator[None, None, Callable[[], Mapping[str, bytes]]]: ...


class DenoiseNetwork(Protocol):
    def begin(self, plan: RowPlan, first_stage: int) -> Stages: ...


class Denoiser:
    def __init__(self, store: Store, network: DenoiseNetwork, *, system: System = System()) -> None:
        self._store, self._network, self._system = store, network, system

    def carry_out(self, plan: RowPlan, first_stage: int) -> Iterator[StepDone | StageCommitted]:
        stage = first_stage
        while stage < plan.timeline.num_stages:
            if self._is_there(plan, stage):
                yield _committed(plan, stage)
                stage += 1
            else:
                stage = yield from self._render_span(plan, stage)

    def _is_there(self, plan: RowPlan, stage: int) -> bool:
        return verified_commit(self._store, "stage", plan.stage_keys[stage]) is not None

    def _render_span(self, plan: RowPlan, first_stage: int) -> Generator[StepDone | StageCommitted, None, int]:
        stages = self._network.begin(plan, first_stage)
        writing: tuple[Background[object], StageCommitted] | None = None
        for stage in range(first_stage, plan.timeline.num_stages):
            if stage > first_stage and self._is_there(plan, stage):
                yield from self._written(writing)
                return stage
            begun, steps, step = self._system.clock(), stages.run(stage), 0
            while True:
                try:
                    next(steps)
                except StopIteration as finished:
                    payloads = finished.value
                    break
                step += 1
                yield StepDone(job_id=plan.job_id, stage=stage, step=step, steps=plan.forwards_per_stage)
                yield from self._written(writing)
                writing = None
            seconds = self._system.clock() - begun

            def write(
                stage: int = stage, payloads: Callable[[], Mapping[str, bytes]] = payloads, seconds: float = seconds
            ) -> None:
                commit(self._store, "stage", plan.pre_image(stage), payloads(), seconds=seconds, system=self._system)

            writing = self._system.start(write, name="magi-ray-commit"), _committed(plan, stage)
        yield from self._written(writing)
        return plan.timeline.num_stages

    def _written(self, writing: tuple[Background[object], StageCommitted] | None) -> Iterator[StageCommitted]:
        if writing is None:
            return
        background, event = writing
        try:
            background.result(COMMIT_DEADLINE_S)
        except TimeoutError:
            raise StoreError(f"Stage {event.stage} of job {event.job_id} was not written in time.") from None
        yield event


def _committed(plan: RowPlan, stage: int) -> StageCommitted:
    return StageCommitted(job_id=plan.job_id, stage=stage, chunk=plan.timeline.finished(stage))
