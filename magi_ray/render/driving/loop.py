"""The driver's loop: passes the events of workers to the scheduler and carries its commands out. There is no other.

Where the workers are is an argument: actors on Ray, this process, or a simulation, each a ``Workers``. So is the clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import inf
from typing import Protocol

from magi_ray.errors import FailureClass, StoreError, StoreUnwritable
from magi_ray.events import (
    Event,
    NodesSeen,
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
from magi_ray.media.encoder import encoder_identity, find_ffmpeg
from magi_ray.render.driving.inventory import stages_done
from magi_ray.render.driving.reports import Observer, RunResult
from magi_ray.render.driving.scheduler import (
    Abandon,
    Command,
    EndRun,
    Inspect,
    RowFailed,
    RunTask,
    StartWorker,
    StopWorker,
)
from magi_ray.render.driving.session import DriveOptions, Session, open_session
from magi_ray.render.driving.timings import Timings
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.runs.record import Run
from magi_ray.render.runs.weights import require_same_weights
from magi_ray.storage.store import Store
from magi_ray.system import System, sweep_temporary


class Workers(Protocol):
    """Where tasks are carried out. Names of workers are the scheduler's, and are never used twice.

    Only ``wait`` may block for long. What goes wrong with a worker is one of its events.
    """

    def start(self, worker: str, kind: TaskKind, avoid: frozenset[str]) -> None:
        """Begin to start a worker on none of the nodes ``avoid``. It sends WorkerPlaced, then WorkerReady."""
        ...

    def run(self, worker: str, plan: RowPlan, task: Task, attempt: int) -> None:
        """Give it a task. It sends StepDone and StageCommitted, and at the end TaskDone, TaskStopped or TaskFailed."""
        ...

    def abandon(self, worker: str, attempt: int, *, to_stage_end: bool) -> None:
        """Ask it to stop denoising in an attempt: after the next commit of a stage, or after the current step."""
        ...

    def stop(self, worker: str) -> None:
        """End it now; its later events are dropped."""
        ...

    def wait(self, within_s: float) -> Sequence[tuple[str, WorkerEvent]]:
        """New events, each with its worker's name; waits about ``within_s`` for the first. The rest come next time."""
        ...

    def nodes(self, kind: TaskKind) -> frozenset[str]:
        """The nodes large enough for a worker of ``kind``, busy or not. Empty where there are no nodes."""
        ...

    def why_unplaced(self, worker: str) -> str:
        """Why a worker that was started has not been placed yet."""
        ...


def render(
    store: Store,
    run: Run,
    make_workers: Callable[[Session], Workers],
    *,
    counts: Mapping[TaskKind, int],
    encoder: str,
    options: DriveOptions = DriveOptions(),
    observers: Sequence[Observer] = (),
    name: str = "driver",
    timings: Timings = Timings(),
    system: System = System(),
) -> RunResult:
    """Render what is left of ``run``. A row that fails is recorded and does not affect the others.

    counts: how many workers of each kind.  encoder: identity of ffmpeg.  name: of this driver, for people.
    Raises Superseded, StoreError when the run's own records cannot be written, and the error that kept workers of a
    kind from starting (WeightsError, MediaError, WorkerLost). Workers are gone afterwards, whatever happened.
    """
    try:
        with open_session(
            store,
            run,
            encoder=encoder,
            workers=counts,
            options=options,
            observers=observers,
            name=name,
            timings=timings,
            system=system,
        ) as session:
            loop = _Loop(session, make_workers(session))
            try:
                loop.drive()
            finally:
                loop.stop_all()
            return session.close()
    except StoreUnwritable as exc:
        raise StoreUnwritable(f"Run {run.run_id} has stopped: {exc.message}", remedy=exc.remedy) from exc


def check_machine(run: Run) -> str:
    """What a driver needs of its machine: ``run``'s own weights, and ffmpeg, whose identity this returns.

    Raises WeightsError (not those of the submission), MediaError (no ffmpeg).
    """
    require_same_weights(run)
    sweep_temporary()
    return encoder_identity(find_ffmpeg())


class _Loop:
    """``_logs``: the log file of each worker that has not been stopped; ``_deadlines``: when a busy or starting one is
    taken for hung, by the session's clock; ``_unplaced``: those not placed yet."""

    def __init__(self, session: Session, workers: Workers) -> None:
        self._session, self._workers = session, workers
        self._scheduler, self._timings, self._clock = session.scheduler, session.timings, session.system.clock
        self._events: deque[Event] = deque()
        self._deadlines: dict[str, float] = {}
        self._unplaced: set[str] = set()
        self._logs: dict[str, str] = {}
        self._nodes: dict[TaskKind, frozenset[str]] = {}
        self._nodes_asked = -inf

    def drive(self) -> None:
        """Until the run has come to rest."""
        self._look_around()
        self._handle_events()  # a request to stop is heard before anything starts
        self._carry_out(self._session.start())
        while True:
            self._handle_events()
            if self._scheduler.finished:
                return
            assert self._deadlines, "the run is not finished, but no worker is busy or starting"
            self._receive(self._workers.wait(self._timings.tick_s))
            self._give_up_silent()
            self._look_around()

    def stop_all(self) -> None:
        for worker in list(self._logs):
            # Where Ray itself is gone its workers are too, and the error that ended the run matters more.
            with suppress(Exception):
                self._stop(worker)

    def _look_around(self) -> None:
        """Check the lease and the users' requests, and now and then the nodes."""
        now = self._clock()
        if now - self._nodes_asked >= self._timings.nodes_s:
            self._nodes_asked = now
            for kind in TaskKind:
                nodes = self._workers.nodes(kind)
                if nodes != self._nodes.get(kind, frozenset()):
                    self._nodes[kind] = nodes
                    self._events.append(NodesSeen(kind=kind, nodes=nodes))
        self._events.extendleft(self._session.tick())  # requests go first

    def _handle_events(self) -> None:
        while self._events and not self._scheduler.finished:
            event = self._events.popleft()
            worker = getattr(event, "worker", None)
            if worker is not None and worker not in self._logs:
                continue  # it was stopped meanwhile
            if isinstance(event, WorkerGone):
                for committed in self._committed_unseen(self._scheduler.task_of(event.worker)):
                    self._carry_out(self._session.handle(committed))
                self._stop(event.worker)
            self._carry_out(self._session.handle(event))

    def _carry_out(self, commands: Iterable[Command]) -> None:
        for command in commands:
            match command:
                case StartWorker(worker=worker, kind=kind, avoid=avoid):
                    self._logs[worker] = ""
                    self._unplaced.add(worker)
                    self._expect(worker, self._timings.placement_s)
                    self._workers.start(worker, kind, avoid)
                case StopWorker(worker=worker):
                    self._stop(worker)
                case RunTask(worker=worker, task=task, attempt=attempt):
                    self._expect(worker, self._timings.silence_s[task.kind])
                    self._workers.run(worker, self._session.run.plans[task.job_id], task, attempt)
                case Abandon(worker=worker, attempt=attempt, to_stage_end=to_stage_end):
                    self._workers.abandon(worker, attempt, to_stage_end=to_stage_end)
                case Inspect(job_id=job_id):
                    self._events.append(self._session.inspect(job_id))
                    self._look_around()  # inspections are slow; the lease is checked meanwhile
                case EndRun(error=error):
                    raise error
                case RowFailed():
                    pass  # for the reports

    def _receive(self, said: Iterable[tuple[str, WorkerEvent]]) -> None:
        for worker, event in said:
            if worker not in self._logs:
                continue  # it was stopped
            match event:
                case WorkerPlaced(log=log):
                    self._logs[worker] = log
                    self._unplaced.discard(worker)
                    self._expect(worker, self._timings.load_s)
                case WorkerReady() | TaskDone() | TaskStopped():
                    self._deadlines.pop(worker, None)
                case TaskFailed(failure=failure):
                    self._deadlines.pop(worker, None)
                    if failure is FailureClass.PREEMPTED:
                        self._session.recheck_leadership()
                    event = replace(event, log=self._logs[worker])
                case WorkerGone():
                    event = replace(event, log=self._logs[worker])
                case _:
                    if (task := self._scheduler.task_of(worker)) is not None:
                        self._expect(worker, self._timings.silence_s[task.kind])
            self._events.append(event)

    def _give_up_silent(self) -> None:
        """Take workers for lost that have sent nothing for too long."""
        if not self._silent():
            return
        # Perhaps their events are waiting, and it was the driver that was held up by the store.
        self._receive(self._workers.wait(0.0))
        for worker in self._silent():
            no_room = worker in self._unplaced
            message = f"Nothing was heard of worker {worker} for too long."
            if no_room:
                message = self._workers.why_unplaced(worker)
            failure = FailureClass.INFRASTRUCTURE
            gone = WorkerGone(worker=worker, failure=failure, message=message, no_room=no_room)
            self._deadlines.pop(worker)
            self._receive([(worker, gone)])

    def _silent(self) -> list[str]:
        now = self._clock()
        return [worker for worker, deadline in self._deadlines.items() if now > deadline]

    def _committed_unseen(self, task: Task | None) -> list[StageCommitted]:
        """The stages a lost worker committed, reported or not: none of them is to be computed again."""
        if task is None or task.kind is not TaskKind.DENOISE:
            return []
        plan = self._session.run.plans[task.job_id]
        try:
            done = stages_done(self._session.store, plan)
        except StoreError:
            return []  # then those that were reported must do
        return [
            StageCommitted(job_id=task.job_id, stage=stage, chunk=plan.timeline.finished(stage))
            for stage in range(task.index, done)
        ]

    def _expect(self, worker: str, within_s: float) -> None:
        self._deadlines[worker] = self._clock() + within_s

    def _stop(self, worker: str) -> None:
        self._deadlines.pop(worker, None)
        self._unplaced.discard(worker)
        del self._logs[worker]
        self._workers.stop(worker)
