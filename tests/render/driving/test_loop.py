"""The driver's loop, with workers that say what the test wants and a clock that moves when it waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import pytest
from runs import MakeRun

from magi_ray.errors import FailureClass, ObjectMissing, Superseded, WeightsError
from magi_ray.events import (
    Event,
    Inspected,
    StageCommitted,
    Task,
    TaskDone,
    TaskFailed,
    TaskKind,
    TaskStopped,
    WorkerEvent,
    WorkerGone,
    WorkerPlaced,
    WorkerReady,
)
from magi_ray.render.driving import requests
from magi_ray.render.driving.loop import render
from magi_ray.render.driving.progress import RunProgress
from magi_ray.render.driving.reports import RunResult
from magi_ray.render.driving.scheduler import ONE_OF_EACH, Command, RunState, StartWorker
from magi_ray.render.driving.session import Session, Timings
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.runs.record import Run
from magi_ray.storage import keys
from magi_ray.storage.epochs import take_epoch
from magi_ray.storage.memory import MemoryStore
from magi_ray.system import System

ROWS = [{"job_id": "a", "prompt": "sea", "num_chunks": 2}]
TIMINGS = Timings(placement_s=100.0, load_s=200.0, silence_s=dict.fromkeys(TaskKind, 300.0))


class OtherTime(System):
    now = 1000.0

    def clock(self) -> float:
        return self.now


class Scripted:
    """Workers that do at once, and report, whatever they are asked; ``instead`` may answer a task with other events."""

    def __init__(self, session: Session) -> None:
        self.session, self.time = session, session.system
        self.instead: Callable[[str, Task, int], list[WorkerEvent] | None] = lambda worker, task, attempt: None
        self.starts: Callable[[str], list[WorkerEvent]] = lambda worker: [
            WorkerPlaced(worker=worker), WorkerReady(worker=worker)
        ]  # fmt: skip
        self.living: set[str] = set()
        self.ended: list[str] = []
        self.said: deque[tuple[str, WorkerEvent]] = deque()

    def say(self, worker: str, events: Sequence[WorkerEvent]) -> None:
        self.said.extend((worker, event) for event in events)

    def start(self, worker: str, kind: TaskKind, avoid: frozenset[str]) -> None:
        self.living.add(worker)
        self.say(worker, self.starts(worker))

    def run(self, worker: str, plan: RowPlan, task: Task, attempt: int) -> None:
        assert worker in self.living
        events = self.instead(worker, task, attempt)
        if events is None:
            stages = range(task.index, plan.timeline.num_stages) if task.kind is TaskKind.DENOISE else ()
            events = [
                StageCommitted(job_id=plan.job_id, stage=stage, chunk=plan.timeline.finished(stage)) for stage in stages
            ]
            events.append(TaskDone(worker=worker, task=task, attempt=attempt))
        self.say(worker, events)

    def abandon(self, worker: str, attempt: int, *, to_stage_end: bool) -> None:
        assert worker in self.living

    def stop(self, worker: str) -> None:
        self.living.remove(worker)
        self.ended.append(worker)

    def wait(self, within_s: float) -> Sequence[tuple[str, WorkerEvent]]:
        if not self.said:
            assert isinstance(self.time, OtherTime)
            self.time.now += within_s
        said, self.said = list(self.said), deque()
        return said

    def nodes(self, kind: TaskKind) -> frozenset[str]:
        return frozenset()

    def why_unplaced(self, worker: str) -> str:
        return f"no room for {worker}"


class Play:
    """A run with scripted workers."""

    def __init__(self, run: Run, store: MemoryStore) -> None:
        self.run, self.store, self.time = run, store, OtherTime()
        self.counts = dict(ONE_OF_EACH)
        self.heard: list[Event | Command] = []
        self.workers: Scripted | None = None

    def __call__(self, prepare: Callable[[Scripted], None] = lambda _: None) -> RunResult:
        def make(session: Session) -> Scripted:
            self.workers = Scripted(session)
            prepare(self.workers)
            return self.workers

        def note(happened: Event | Command, _: RunProgress) -> None:
            self.heard.append(happened)

        return render(
            self.store, self.run, make, counts=self.counts, encoder="an encoder", observers=[note], timings=TIMINGS,
            system=self.time,
        )  # fmt: skip

    def gone(self) -> list[str]:
        return [happened.worker for happened in self.heard if isinstance(happened, WorkerGone)]


@pytest.fixture
def play(make_run: MakeRun) -> Play:
    store = MemoryStore()
    return Play(make_run(store, ROWS), store)


def once(
    at: TaskKind, answer: Callable[[str, Task, int], list[WorkerEvent]]
) -> Callable[..., list[WorkerEvent] | None]:
    """Answers the first task of a kind."""
    asked: list[int] = []

    def instead(worker: str, task: Task, attempt: int) -> list[WorkerEvent] | None:
        if task.kind is at and not asked:
            asked.append(attempt)
            return answer(worker, task, attempt)
        return None

    return instead


def test_every_worker_is_stopped_at_the_end(play: Play) -> None:
    assert play().published == ("a",)
    assert play.workers is not None
    assert (sorted(play.workers.ended), play.workers.living) == (sorted(f"{kind}-0" for kind in TaskKind), set())


def test_a_worker_that_says_nothing_for_too_long_is_lost_and_replaced(play: Play) -> None:
    def silent(workers: Scripted) -> None:
        workers.instead = once(TaskKind.DENOISE, lambda worker, task, attempt: [])

    assert play(silent).published == ("a",)
    assert play.gone() == ["denoise-0"]
    assert play.time.now >= 1000.0 + 300.0


def test_a_worker_that_spoke_while_nobody_listened_is_not_lost(play: Play) -> None:
    def slow_to_listen(workers: Scripted) -> None:
        def instead(worker: str, task: Task, attempt: int) -> None:
            # As when a call to the store takes ten minutes: the events lie there.
            play.time.now += 600

        workers.instead = instead

    assert play(slow_to_listen).published == ("a",)
    assert play.gone() == []


def test_a_worker_that_finds_no_place_is_tried_again_and_the_reason_is_told(play: Play) -> None:
    def nowhere_at_first(workers: Scripted) -> None:
        whole = workers.starts
        workers.starts = lambda worker: [] if worker == "embed-0" else whole(worker)

    assert play(nowhere_at_first).published == ("a",)
    [lost] = [happened for happened in play.heard if isinstance(happened, WorkerGone)]
    assert (lost.worker, lost.message, lost.no_room) == ("embed-0", "no room for embed-0", True)


def test_a_worker_that_cannot_load_for_the_runs_own_fault_ends_it_with_that_error(play: Play) -> None:
    error = WeightsError("a file is missing")

    def cannot_load(workers: Scripted) -> None:
        workers.starts = lambda worker: [
            WorkerGone(worker=worker, failure=FailureClass.INPUT, message="no", error=error)
        ]

    with pytest.raises(WeightsError, match="a file is missing"):
        play(cannot_load)
    assert play.workers is not None
    assert play.workers.living == set()


def test_a_lost_workers_stages_that_nobody_reported_are_not_computed_again(play: Play) -> None:
    # What the store holds is looked up when a worker is lost; here it holds nothing, so denoising begins anew.
    def dies(workers: Scripted) -> None:
        def death(worker: str, task: Task, attempt: int) -> list[WorkerEvent]:
            return [WorkerGone(worker=worker, failure=FailureClass.INFRASTRUCTURE, message="killed")]

        workers.instead = once(TaskKind.DENOISE, death)

    assert play(dies).published == ("a",)
    assert play.gone() == ["denoise-0"]
    assert [command.worker for command in play.heard if isinstance(command, StartWorker)].count("denoise-1") <= 1


def test_a_worker_whose_loss_is_not_yet_handled_may_still_be_asked_to_stop(play: Play) -> None:
    # Its row fails for another reason, and an event before its own says so.
    def both(workers: Scripted) -> None:
        def denoise(worker: str, task: Task, attempt: int) -> list[WorkerEvent]:
            return [
                StageCommitted(job_id="a", stage=stage, chunk=stage - 3 if stage > 2 else None) for stage in range(4)
            ]

        def decode(worker: str, task: Task, attempt: int) -> list[WorkerEvent]:
            workers.said.append(
                (
                    worker,
                    TaskFailed(worker=worker, task=task, attempt=attempt, failure=FailureClass.INPUT, message="no"),
                )
            )
            lost = WorkerGone(worker="denoise-0", failure=FailureClass.INFRASTRUCTURE, message="killed")
            workers.said.append(("denoise-0", lost))
            return []

        denoising, decoding = once(TaskKind.DENOISE, denoise), once(TaskKind.DECODE, decode)
        workers.instead = lambda *asked: decoding(*asked) if asked[1].kind is TaskKind.DECODE else denoising(*asked)

    [failed] = play(both).failed
    assert (failed.kind, failed.failure) == (TaskKind.DECODE, FailureClass.INPUT)


def test_a_superseded_group_makes_its_driver_ask_whether_it_still_leads(play: Play) -> None:
    def superseded(workers: Scripted) -> None:
        def taken(worker: str, task: Task, attempt: int) -> list[WorkerEvent]:
            take_epoch(play.store, play.run.run_id, play.time.owner("another"))
            return [
                TaskFailed(worker=worker, task=task, attempt=attempt, failure=FailureClass.PREEMPTED, message="taken")
            ]

        workers.instead = once(TaskKind.DENOISE, taken)

    with pytest.raises(Superseded, match="Another driver has taken over"):
        play(superseded)


def test_a_driver_superseded_by_the_end_of_its_run_writes_no_tables(play: Play) -> None:
    def slow(workers: Scripted) -> None:
        def finished(worker: str, task: Task, attempt: int) -> list[WorkerEvent]:
            take_epoch(play.store, play.run.run_id, play.time.owner("another"))
            return [TaskDone(worker=worker, task=task, attempt=attempt)]

        workers.instead = once(TaskKind.FINISH, finished)

    with pytest.raises(Superseded, match="Another driver has taken over"):
        play(slow)
    with pytest.raises(ObjectMissing):
        play.store.get(keys.run_results(play.run.run_id))


def test_a_stopped_attempt_is_begun_anew_on_the_same_worker(play: Play) -> None:
    attempts: list[int] = []

    def stops_once(workers: Scripted) -> None:
        def stopped(worker: str, task: Task, attempt: int) -> list[WorkerEvent]:
            return [TaskStopped(worker=worker, task=task, attempt=attempt)]

        stop = once(TaskKind.DENOISE, stopped)

        def instead(worker: str, task: Task, attempt: int) -> list[WorkerEvent] | None:
            if task.kind is TaskKind.DENOISE:
                attempts.append(attempt)
            return stop(worker, task, attempt)

        workers.instead = instead

    assert play(stops_once).published == ("a",)
    assert len(attempts) == len(set(attempts)) == 2
    assert play.gone() == []


def test_people_are_heard_between_inspections_however_many_there_are(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    play = Play(make_run(store, [ROWS[0] | {"num_chunks": 8}]), store)
    play.counts[TaskKind.DECODE] = 8
    inspected: list[str] = []
    inspect = Session.inspect

    def slow(session: Session, job_id: str) -> Inspected:
        inspected.append(job_id)
        play.time.now += 30
        requests.request(store, play.run.run_id, "cancel")
        return inspect(session, job_id)

    monkeypatch.setattr(Session, "inspect", slow)

    def fail_together(workers: Scripted) -> None:
        waiting: list[tuple[str, WorkerEvent]] = []

        def instead(worker: str, task: Task, attempt: int) -> list[WorkerEvent] | None:
            if task.kind is not TaskKind.DECODE:
                return None
            failure = FailureClass.STORE
            failed = TaskFailed(worker=worker, task=task, attempt=attempt, failure=failure, message="no")
            waiting.append((worker, failed))
            if len(waiting) == 8:
                workers.said.extend(waiting)
            return []

        workers.instead = instead

    assert play(fail_together).state is RunState.CANCELLED
    assert len(inspected) == 1


def test_whoever_watches_hears_of_the_first_workers_too(play: Play) -> None:
    play()
    started = [command.worker for command in play.heard if isinstance(command, StartWorker)]
    assert started == [f"{kind}-0" for kind in TaskKind]
