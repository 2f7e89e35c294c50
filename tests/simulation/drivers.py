"""Drivers and workers as processes of a simulated world. The loop, the session and the tasks are the production
code; what is simulated is where workers are: a ``Workers`` whose workers are simulated processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from magi_ray.errors import FailureClass, MagiRayError, StoreError, Superseded, WorkerLost
from magi_ray.events import (
    Event,
    StageCommitted,
    StepDone,
    Task,
    TaskDone,
    TaskKind,
    WorkerEvent,
    WorkerGone,
    WorkerPlaced,
    WorkerReady,
)
from magi_ray.render.driving.loop import render
from magi_ray.render.driving.reports import RunResult, read_failures
from magi_ray.render.driving.scheduler import Command, RunState
from magi_ray.render.driving.session import DriveOptions, Session
from magi_ray.render.driving.timings import Timings
from magi_ray.render.driving.worker import Worker
from magi_ray.render.plans.row_plan import RowPlan

from .material import ENCODER
from .networks import Networks
from .world import Process, Thread

if TYPE_CHECKING:
    from .play import Simulation

# What a call over the network takes.
DELAY_S = 0.05


class Driver:
    """A process that drives the run once. ``retry``: rows that failed before are tried again.

    ``result``: how it ended, None while running, or if it died or gave up.  ``epoch``: of its leading, 0 before.
    """

    def __init__(self, of: Simulation, name: str, *, take_over: bool, retry: bool, started_calm: bool) -> None:
        self.simulation, self.take_over, self.retry, self.started_calm = of, take_over, retry, started_calm
        self.process = Process(of.world, name, of.world.random.choice(of.nodes))
        self.max_failed_rows = None if started_calm else of.world.random.choice([None, None, None, 0, 1])
        self.result: RunResult | None = None
        self.epoch = 0
        self.workers: SimulatedWorkers | None = None
        self.thread = self.process.start(self._drive)
        self.process.on_death.append(self._died)

    def _drive(self) -> None:
        simulation, process = self.simulation, self.process
        store = simulation.client(process)
        silence_s = simulation.silence_s
        try:
            failures = read_failures(store, simulation.run.run_id, simulation.run.plans) if self.retry else {}
            self.result = render(
                store,
                simulation.run,
                self._make_workers,
                counts=simulation.counts,
                encoder=ENCODER,
                options=DriveOptions(
                    take_over=self.take_over, retry=frozenset(failures), max_failed_rows=self.max_failed_rows
                ),
                name=process.name,
                timings=Timings(
                    tick_s=5.0,
                    requests_s=5.0,
                    nodes_s=3600.0,
                    reports_s=30.0,
                    placement_s=silence_s,
                    load_s=silence_s,
                    silence_s=dict.fromkeys(TaskKind, silence_s),
                ),
                system=process.system,
            )
        except (StoreError, Superseded, WorkerLost) as exc:
            simulation.world.note(process.name, "gives up:", repr(exc)[:200])
            simulation.check_expected(exc)
            return
        simulation.world.note(process.name, "ends", self.result.state)
        if self.result.state in (RunState.DONE, RunState.FAILED):
            simulation.ended.append(self)

    def _make_workers(self, session: Session) -> SimulatedWorkers:
        self.epoch = session.epoch
        scheduler = session.scheduler
        handle = scheduler.handle

        def checked(event: Event) -> list[Command]:
            commands = handle(event)
            try:
                scheduler.validate()
            except AssertionError as exc:
                self.simulation.world.fail(str(exc))
            return commands

        scheduler.handle = checked  # type: ignore[method-assign]
        self.workers = SimulatedWorkers(self.simulation, self.process, session)
        return self.workers

    def _died(self) -> None:
        """Ray ends the workers of a driver that died, if it reaches them."""
        if self.workers is not None:
            for name in list(self.workers.processes):
                self.workers.end(name, 1 + self.simulation.world.random.expovariate(0.2))


class SimulatedWorkers:
    """Each worker is a process on some node; its events take DELAY_S, and are dropped after it is ended."""

    def __init__(self, of: Simulation, driver: Process, session: Session) -> None:
        self.simulation, self.world, self.driver, self.session = of, of.world, driver, session
        self.processes: dict[str, Process] = {}
        self._workers: dict[str, SimulatedWorker] = {}
        self._said: deque[tuple[str, WorkerEvent]] = deque()
        self._waiting: Thread | None = None

    def start(self, worker: str, kind: TaskKind, avoid: frozenset[str]) -> None:
        nodes = [node for node in self.simulation.nodes if node not in avoid] or self.simulation.nodes
        process = Process(self.world, f"{self.driver.name}/{worker}", self.world.random.choice(nodes))
        self.processes[worker] = process

        def notice() -> None:
            failure = FailureClass.PREEMPTED if self.world.chance(0.3) else FailureClass.INFRASTRUCTURE
            gone = WorkerGone(worker=worker, failure=failure, message="died")
            self.world.after(self.world.random.uniform(0.1, 10), lambda: self._hear(worker, gone))

        process.on_death.append(notice)
        self._workers[worker] = SimulatedWorker(self.simulation, process, kind, worker, self.session)
        if self.simulation.weather.clear or not self.world.chance(0.03):  # else there is no room for it
            self._workers[worker].begin(lambda event: self.say(worker, event))

    def run(self, worker: str, plan: RowPlan, task: Task, attempt: int) -> None:
        self.world.after(DELAY_S, lambda: self._workers[worker].accept(plan, task, attempt))

    def abandon(self, worker: str, attempt: int, *, to_stage_end: bool) -> None:
        self._workers[worker].worker.abandon(attempt, to_stage_end=to_stage_end)

    def stop(self, worker: str) -> None:
        self.end(worker, 0.1)

    def wait(self, within_s: float) -> Sequence[tuple[str, WorkerEvent]]:
        if not self._said:
            self._waiting = self.driver.current
            self.driver.sleep(within_s)
            self._waiting = None
        said, self._said = list(self._said), deque()
        return said

    def nodes(self, kind: TaskKind) -> frozenset[str]:
        return frozenset(self.simulation.nodes)

    def why_unplaced(self, worker: str) -> str:
        return f"{worker} has no place"

    def say(self, worker: str, event: WorkerEvent) -> None:
        """Events of one worker arrive in order."""
        self.world.after(DELAY_S, lambda: self._hear(worker, event))

    def end(self, worker: str, within_s: float) -> None:
        """Kill it, unless it is out of reach: then it keeps running. Either way its events are dropped."""
        process = self.processes.pop(worker)
        if not self.world.chance(self.simulation.unreachable):
            self.world.after(self.world.random.uniform(0, within_s), process.kill)

    def _hear(self, worker: str, event: WorkerEvent) -> None:
        if self.driver.alive and worker in self.processes:
            self._said.append((worker, event))
            if self._waiting is not None:
                self.driver.nudge(self._waiting)


class SimulatedWorker:
    """A process around a ``Worker``."""

    def __init__(self, of: Simulation, process: Process, kind: TaskKind, name: str, session: Session) -> None:
        self.simulation, self.process, self.kind = of, process, kind
        store = of.client(process, "worker")
        self.networks = Networks(of, process, store)
        self.worker = Worker(
            kind,
            name,
            store=store,
            run_id=of.run.run_id,
            epoch=session.epoch,
            load=lambda: self.networks.body(kind),
            on_error=lambda what, exc: of.check_expected(exc),
            system=process.system,
        )

    def begin(self, say: Callable[[WorkerEvent], None]) -> None:
        """Be placed, and load."""
        self.say = say

        def work() -> None:
            name = self.worker.name
            say(WorkerPlaced(worker=name, node=self.process.host))
            self.process.sleep(self.process.world.random.uniform(1, 20))
            try:
                seconds = self.worker.load()
            except MagiRayError as exc:
                say(WorkerGone(worker=name, failure=exc.failure_class, message=str(exc), error=exc))
            else:
                say(WorkerReady(worker=name, seconds=seconds))

        self.process.start(work)

    def accept(self, plan: RowPlan, task: Task, attempt: int) -> None:
        if not self.process.alive:
            return
        world = self.process.world
        world.note(self.process.name, "begins", task.kind, task.job_id, task.index)
        if task.kind is TaskKind.DENOISE:
            self.networks.attempt = self.simulation.attempt_begins(self.process, plan)

        def work() -> None:
            for event in self.worker.carry_out(plan, task, attempt):
                match event:
                    case StepDone():
                        pass
                    case StageCommitted(stage=stage):
                        self.simulation.stage_reported(self.process.name, plan, stage)
                    case TaskDone() if self.networks.attempt is not None:
                        self.simulation.attempt_completed(self.networks.attempt)
                    case _:
                        world.note(self.process.name, "says", event)
                self.say(event)

        self.process.start(work)
