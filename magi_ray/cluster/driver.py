"""The driver: carries the scheduler's commands out on Ray. Disposable; all it knows can be found again in the store."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray

from magi_ray.cluster.actors import WORKERS, TaskWorker, Whereabouts
from magi_ray.cluster.failures import classify, own_error, worker_is_gone
from magi_ray.cluster.group import Worker, needed
from magi_ray.errors import StoreError, Superseded, WorkerLost
from magi_ray.events import StageCommitted, StepDone, Task, TaskKind
from magi_ray.render.driving.inventory import stages_done
from magi_ray.render.driving.progress import RunProgress
from magi_ray.render.driving.reports import Outcome
from magi_ray.render.driving.scheduler import (
    Abandon,
    Command,
    Event,
    Inspect,
    NodesSeen,
    Release,
    Replace,
    RunTask,
    TaskDone,
    TaskFailed,
    WorkerGone,
    WorkerReady,
)
from magi_ray.render.driving.session import Session, session
from magi_ray.render.runs.record import Run
from magi_ray.storage.store import Store

TICK_S = 1.0
# How often the nodes of the cluster are looked at.
NODES_S = 5.0
# Workers of a kind that may fail to start, one after the other, before the run is given up.
MAX_FAILED_STARTS = 3
# Starting is most of what a short run takes. So workers load in the order in which they get to work, not all at once.
_STARTS_AFTER = {TaskKind.DECODE: TaskKind.DENOISE, TaskKind.FINISH: TaskKind.DECODE}


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """Seconds after which something is taken for hung.

    placement_s: the cluster finds a place for a worker.  load_s: a worker loads.  silence_s: of a task of each kind;
    denoising breaks it with every step.  answer_s: Ray delivers what it said was ready.
    """

    placement_s: float = 120.0
    load_s: float = 3600.0
    silence_s: Mapping[TaskKind, float] = field(default_factory=lambda: dict.fromkeys(TaskKind, 3600.0))
    answer_s: float = 60.0


@dataclass
class _Pending:
    """What we wait for from a worker: ``task`` is None while it starts, which ``loads`` at the end of it. ``deadline``:
    monotonic seconds."""

    worker: str
    task: Task | None
    deadline: float
    loads: bool = False


def render_on_ray(
    store: Store,
    run: Run,
    *,
    observe: Callable[[RunProgress], None] | None = None,
    deadlines: Deadlines | None = None,
    workers: Mapping[TaskKind, type[TaskWorker]] = WORKERS,
    take_over: bool = False,
    retry: Collection[str] = (),
    max_failed_rows: int | None = None,
) -> Outcome:
    """Render what is left of ``run`` on the Ray instance this process is connected to.

    A row that fails is recorded and harms no other. Arguments and errors as ``session``; raises also what keeps any
    worker from starting (WeightsError, MediaError, WorkerLost) and StoreError when the run's own records cannot be
    written. Workers are gone afterwards, whatever happened.
    """
    with session(
        store, run, observe=observe, take_over=take_over, retry=retry, max_failed_rows=max_failed_rows
    ) as driving:
        driver = _Driver(driving, deadlines or Deadlines(), workers)
        try:
            driver.drive()
        finally:
            driver.stop()
        return driving.close()


class _Driver:
    def __init__(self, driving: Session, deadlines: Deadlines, classes: Mapping[TaskKind, type[TaskWorker]]) -> None:
        self._driving, self._run = driving, driving.run
        self._deadlines, self._classes = deadlines, classes
        self._scheduler = driving.scheduler
        self._workers: dict[str, Worker] = {}
        self._whereabouts: dict[str, Whereabouts] = {}
        self._pending: dict[Any, _Pending] = {}
        self._events: deque[Event] = deque()
        self._started: Counter[TaskKind] = Counter()
        self._ready: set[TaskKind] = set()
        self._failed_starts: Counter[TaskKind] = Counter()
        self._looked_at_nodes = -NODES_S
        self._nodes: dict[TaskKind, frozenset[str]] = {}
        self._without_room: dict[TaskKind, frozenset[str]] = {}

    def drive(self) -> None:
        while True:
            self._look_at_nodes()
            self._events += self._driving.tick()
            while self._events:
                self._handle(self._events.popleft())
            if self._scheduler.finished:
                return
            self._start_what_is_due()
            self._wait()

    def stop(self) -> None:
        for name in list(self._workers):
            # Where Ray itself is gone its workers are too, and the error that ended the run matters more.
            with suppress(Exception):
                self._stop_worker(name)

    # ---------------------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        for command in self._driving.handle(event):
            self._obey(command)

    def _obey(self, command: Command) -> None:
        match command:
            case RunTask(worker=name, task=task):
                waitable = self._workers[name].start(self._run.plans[task.job_id], task.index)
                self._expect(waitable, name, task, self._deadlines.silence_s[task.kind])
            case Replace(kind=kind, worker=worker, avoid=avoid):
                if worker is not None:
                    self._stop_worker(worker)
                self._start_worker(kind, avoid=avoid)
            case Inspect(job_id=job_id):
                self._events.append(self._driving.inspect(job_id))
            case Abandon(worker=name, job_id=job_id, to_stage_end=to_stage_end):
                if name in self._workers:  # else it is gone, which the scheduler is told next
                    self._workers[name].abandon(job_id, to_stage_end=to_stage_end)
            case Release(kind=kind):
                for name in [name for name, worker in self._workers.items() if worker.kind is kind]:
                    self._stop_worker(name)
            case _:
                pass

    def _wait(self) -> None:
        """Turn what workers say into events; returns after a tick at the latest."""
        assert self._pending, "the run is not finished, but nobody works on it"
        ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=TICK_S, fetch_local=False)
        for waitable in ready:
            pending = self._pending.pop(waitable)
            try:
                self._receive(waitable, pending)
            except Exception as exc:  # noqa: BLE001 - sorted by class below
                self._failed(pending, exc)
        now = time.monotonic()
        if late := [waitable for waitable, pending in self._pending.items() if now > pending.deadline]:
            # Perhaps they have spoken, and it was we who did not listen: the store was out of reach.
            _, silent = ray.wait(late, num_returns=len(late), timeout=0, fetch_local=False)
            for waitable in silent:
                pending = self._pending.pop(waitable)
                self._failed(pending, self._why_silent(pending))

    def _receive(self, waitable: Any, pending: _Pending) -> None:
        name = pending.worker
        if pending.task is None and not pending.loads:
            self._whereabouts[name] = ray.get(waitable, timeout=self._deadlines.answer_s)
            self._expect(self._workers[name].load(), name, None, self._deadlines.load_s, loads=True)
        elif pending.task is None:
            ray.get(waitable, timeout=self._deadlines.answer_s)
            kind = self._workers[name].kind
            self._failed_starts[kind] = 0
            self._ready.add(kind)
            self._events.append(WorkerReady(worker=name, kind=kind, node=self._whereabouts[name].node))
        elif pending.task.kind is TaskKind.DENOISE:
            try:
                reference = next(waitable)
            except StopIteration:
                self._events.append(TaskDone(worker=pending.worker, task=pending.task))
                return
            happened = ray.get(reference, timeout=self._deadlines.answer_s)
            self._expect(waitable, pending.worker, pending.task, self._deadlines.silence_s[TaskKind.DENOISE])
            if isinstance(happened, StepDone):
                self._driving.note(happened)
            else:
                self._events.append(happened)
        else:
            ray.get(waitable, timeout=self._deadlines.answer_s)
            self._events.append(TaskDone(worker=pending.worker, task=pending.task))

    def _failed(self, pending: _Pending, exc: Exception) -> None:
        failure, message = classify(exc)
        name, task = pending.worker, pending.task
        if task is None:
            self._start_failed(name, exc, message)
            return
        if isinstance(own_error(exc), Superseded):
            self._driving.doubt()
        log = self._whereabouts[name].log
        if worker_is_gone(exc):
            self._stop_worker(name)
            self._events += self._committed_unseen(task)
            self._events.append(WorkerGone(worker=name, failure=failure, message=message, log=log))
        else:
            self._events.append(TaskFailed(worker=name, task=task, failure=failure, message=message, log=log))

    def _why_silent(self, pending: _Pending) -> WorkerLost:
        if pending.task is None and not pending.loads:
            return self._workers[pending.worker].no_place(self._deadlines.placement_s)
        return WorkerLost(f"Nothing was heard of worker {pending.worker} for too long.")

    def _start_failed(self, name: str, exc: Exception, message: str) -> None:
        kind, avoid = self._workers[name].kind, self._workers[name].avoid
        nowhere = name not in self._whereabouts
        self._stop_worker(name)
        if nowhere and avoid:
            # Nothing is free elsewhere: then a node where something failed is better than none.
            self._without_room[kind] = self._nodes_for(kind) - avoid
            self._start_worker(kind)
            return
        self._failed_starts[kind] += 1
        own = own_error(exc)
        if own is not None and not isinstance(own, WorkerLost):
            raise own
        if self._failed_starts[kind] >= MAX_FAILED_STARTS:
            raise WorkerLost(
                f"{MAX_FAILED_STARTS} {kind} workers failed to start, one after the other. The last: {message}",
                remedy="Look at the worker's log under /tmp/ray/session_latest/logs.",
                next_command=f"magi-ray resume {self._run.run_id} --store {self._driving.store.uri}",
            )
        self._start_worker(kind)

    def _committed_unseen(self, task: Task) -> list[StageCommitted]:
        """The stages a lost worker committed, reported or not: none of them is to be computed again."""
        if task.kind is not TaskKind.DENOISE:
            return []
        plan = self._run.plans[task.job_id]
        try:
            done = stages_done(self._driving.store, plan)
        except StoreError:
            return []  # then those that were reported have to do
        return [
            StageCommitted(job_id=task.job_id, stage=stage, chunk=plan.timeline.finished(stage))
            for stage in range(task.index, done)
        ]

    def _start_what_is_due(self) -> None:
        for kind in TaskKind:
            before = _STARTS_AFTER.get(kind)
            waits = before is not None and before not in self._ready and self._scheduler.needs(before)
            if not waits and not self._started[kind] and self._scheduler.needs(kind):
                for _ in range(self._run.settings.decoders if kind is TaskKind.DECODE else 1):
                    self._start_worker(kind)

    def _start_worker(self, kind: TaskKind, *, avoid: frozenset[str] = frozenset()) -> None:
        name = f"{kind}-{self._started[kind]}"
        self._started[kind] += 1
        self._workers[name] = Worker(
            kind,
            name,
            of=self._classes[kind],
            settings=self._run.settings,
            store=self._driving.store,
            run_id=self._run.run_id,
            encoder=self._driving.encoder,
            epoch=self._driving.epoch,
            avoid=avoid,
        )
        self._expect(self._workers[name].where(), name, None, self._deadlines.placement_s)

    def _look_at_nodes(self) -> None:
        """Tell the scheduler where workers could be placed, when that has changed."""
        now = time.monotonic()
        if now - self._looked_at_nodes < NODES_S:
            return
        self._looked_at_nodes = now
        for kind in TaskKind:
            nodes = self._nodes_for(kind) - self._without_room.get(kind, frozenset())
            if nodes != self._nodes.get(kind):
                self._nodes[kind] = nodes
                self._events.append(NodesSeen(kind=kind, nodes=nodes))

    def _nodes_for(self, kind: TaskKind) -> frozenset[str]:
        """The nodes that are alive and large enough, were they free."""
        wanted = needed(kind, self._run.settings)
        return frozenset(
            node["NodeID"]
            for node in ray.nodes()
            if node["Alive"] and all(node["Resources"].get(name, 0) >= amount for name, amount in wanted.items())
        )

    def _stop_worker(self, name: str) -> None:
        worker = self._workers.pop(name)
        self._whereabouts.pop(name, None)
        for waitable in [w for w, pending in self._pending.items() if pending.worker == name]:
            del self._pending[waitable]
        worker.stop()

    def _expect(self, waitable: Any, worker: str, task: Task | None, within_s: float, *, loads: bool = False) -> None:
        deadline = time.monotonic() + within_s
        self._pending[waitable] = _Pending(worker=worker, task=task, deadline=deadline, loads=loads)
