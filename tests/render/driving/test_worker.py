"""A worker carries out one attempt after the other, and stops with the one it was asked to stop with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from runs import MakeRun

from magi_ray.errors import FailureClass, NumericError
from magi_ray.events import StageCommitted, StepDone, Task, TaskDone, TaskFailed, TaskKind, TaskStopped
from magi_ray.render.driving.worker import Worker
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.storage import keys
from magi_ray.storage.leases import read_lease
from magi_ray.storage.memory import MemoryStore

TASK = Task(kind=TaskKind.DENOISE, job_id="a")


class Steps:
    """Two forwards and a commit for each stage."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure

    def carry_out(self, plan: RowPlan, index: int) -> Iterator[StepDone | StageCommitted]:
        for stage in range(index, plan.timeline.num_stages):
            for step in (1, 2):
                yield StepDone(job_id=plan.job_id, stage=stage, step=step, steps=2)
            yield StageCommitted(job_id=plan.job_id, stage=stage, chunk=plan.timeline.finished(stage))
            if self.failure is not None:
                raise self.failure


class Fixed:
    """A worker and the plan of its row. ``errors``: what it was told to log."""

    def __init__(self, make_run: MakeRun, body: Steps) -> None:
        self.store = MemoryStore()
        self.run = make_run(self.store, [{"job_id": "a", "prompt": "sea", "num_chunks": 2}])
        self.plan = self.run.plans["a"]
        self.errors: list[tuple[str, Exception]] = []
        self.worker = Worker(
            TaskKind.DENOISE, "denoise-0", store=self.store, run_id=self.run.run_id, epoch=1, load=lambda: body,
            on_error=lambda what, exc: self.errors.append((what, exc)),
        )  # fmt: skip
        self.lease = keys.row_lease(self.run.run_id, "a")

    def attempt(self, number: int) -> Iterator[Any]:
        return self.worker.carry_out(self.plan, TASK, number)


@pytest.fixture
def fixed(make_run: MakeRun) -> Fixed:
    return Fixed(make_run, Steps())


def test_a_task_ends_with_its_attempt_done_and_its_lease_given_back(fixed: Fixed) -> None:
    *said, last = fixed.attempt(7)
    assert len(said) == 3 * fixed.plan.timeline.num_stages
    assert isinstance(last, TaskDone)
    assert (last.worker, last.task, last.attempt) == ("denoise-0", TASK, 7)
    record = read_lease(fixed.store, fixed.lease)
    assert record is not None
    assert record.holder is None


@pytest.mark.parametrize(("to_stage_end", "said"), [(False, 1), (True, 3)])
def test_an_abandoned_attempt_stops_after_the_forward_or_the_stage_in_work(
    fixed: Fixed, to_stage_end: bool, said: int
) -> None:
    events = fixed.attempt(1)
    heard = [next(events)]
    fixed.worker.abandon(1, to_stage_end=to_stage_end)
    heard += events
    assert isinstance(heard.pop(), TaskStopped)
    assert len(heard) == said


def test_an_abandoned_row_that_comes_back_to_the_worker_is_not_stopped_again(fixed: Fixed) -> None:
    # Stopping went by the row's name, which was never forgotten: it stopped after each stage for ever.
    events = fixed.attempt(1)
    next(events)
    fixed.worker.abandon(1, to_stage_end=True)
    assert isinstance(list(events)[-1], TaskStopped)
    assert isinstance(list(fixed.attempt(2))[-1], TaskDone)


def test_a_word_that_comes_too_late_stops_no_other_attempt(fixed: Fixed) -> None:
    list(fixed.attempt(1))
    fixed.worker.abandon(1, to_stage_end=False)
    assert isinstance(list(fixed.attempt(2))[-1], TaskDone)


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (NumericError("it is NaN", remedy="Check it."), FailureClass.NUMERIC, "it is NaN\nCheck it."),
        (KeyError("x"), FailureClass.CODE, "KeyError: 'x'"),
    ],
)
def test_what_goes_wrong_is_said_in_one_event_and_logged_whole(
    make_run: MakeRun, failure: Exception, kind: FailureClass, message: str
) -> None:
    fixed = Fixed(make_run, Steps(failure))
    last = list(fixed.attempt(1))[-1]
    assert isinstance(last, TaskFailed)
    assert (last.attempt, last.failure, last.message) == (1, kind, message)
    assert fixed.errors == [("Denoising job a from stage 0 on", failure)]


def test_what_is_to_stop_at_once_does_not_go_on_to_the_end_of_its_stage(fixed: Fixed) -> None:
    # The row has failed elsewhere, and then somebody pauses the run.
    events = fixed.attempt(1)
    heard = [next(events)]
    fixed.worker.abandon(1, to_stage_end=False)
    fixed.worker.abandon(1, to_stage_end=True)
    heard += events
    assert isinstance(heard.pop(), TaskStopped)
    assert len(heard) == 1
