"""The driver: carries the scheduler's commands out on Ray. Disposable; all it knows can be found again in the store."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from magi_ray.cluster.failures import classify, worker_is_gone
from magi_ray.cluster.group import Worker
from magi_ray.errors import MagiRayError, WorkerLost
from magi_ray.media.encoder import encoder_identity, find_ffmpeg
from magi_ray.render.inventory import take_stock
from magi_ray.render.journal import Journal, Outcome
from magi_ray.render.progress import RunProgress, StepDone
from magi_ray.render.run import Run
from magi_ray.render.scheduler import (
    Abandon,
    Event,
    Kind,
    Release,
    Replace,
    Scheduler,
    Task,
    TaskDone,
    TaskFailed,
    WorkerGone,
    WorkerReady,
)
from magi_ray.render.scheduler import Run as RunTask
from magi_ray.storage.store import Store

TICK_S = 1.0
# A worker from which nothing is heard for this long is taken for hung. Denoising reports every step.
SILENCE_S = {Kind.EMBED: 3600.0, Kind.DENOISE: 3600.0, Kind.DECODE: 1800.0, Kind.FINISH: 3600.0}
LOAD_DEADLINE_S = 3600.0
GET_DEADLINE_S = 60.0
# Workers of a kind that may fail to start, one after the other, before the run is given up.
MAX_FAILED_STARTS = 3


@dataclass
class _Pending:
    """What we wait for from a worker: ``task`` is None while it loads. ``deadline``: monotonic seconds."""

    worker: str
    task: Task | None
    deadline: float


def render_on_ray(store: Store, run: Run, *, observe: Callable[[RunProgress], None] | None = None) -> Outcome:
    """Render what is left of ``run`` on the Ray instance this process is connected to.

    A row that fails is recorded and harms no other. Raises what keeps any worker from starting (WeightsError,
    MediaError, WorkerLost) and StoreError when the run's own records cannot be written. Workers are gone afterwards,
    whatever happened.
    """
    driver = _Driver(store, run, observe)
    try:
        return driver.drive()
    finally:
        driver.stop()


class _Driver:
    def __init__(self, store: Store, run: Run, observe: Callable[[RunProgress], None] | None) -> None:
        self._store, self._run = store, run
        self._encoder = encoder_identity(find_ffmpeg())
        rows = [take_stock(store, run.run_id, plan, self._encoder) for plan in run.plans.values()]
        self._journal = Journal(store, run, rows, observe=observe)
        self._scheduler = Scheduler(rows)
        self._workers: dict[str, Worker] = {}
        self._pending: dict[Any, _Pending] = {}
        self._events: deque[Event] = deque()
        self._started: Counter[Kind] = Counter()
        self._failed_starts: Counter[Kind] = Counter()

    def drive(self) -> Outcome:
        for kind in Kind:
            if self._scheduler.needs(kind):
                self._start_worker(kind)
        while True:
            while self._events:
                self._handle(self._events.popleft())
            if self._scheduler.finished:
                return self._journal.close()
            self._wait()

    def stop(self) -> None:
        for name in list(self._workers):
            self._stop_worker(name)

    # ---------------------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        self._journal.note(event)
        for command in self._scheduler.handle(event):
            self._journal.note(command)
            match command:
                case RunTask(worker=name, task=task):
                    waitable = self._workers[name].start(self._run.plans[task.job_id], task.index)
                    self._expect(waitable, name, task, SILENCE_S[task.kind])
                case Replace(kind=kind):
                    self._start_worker(kind)
                case Abandon(worker=name, job_id=job_id):
                    self._workers[name].abandon(job_id)
                case Release(kind=kind):
                    for name in [name for name, worker in self._workers.items() if worker.kind is kind]:
                        if not any(pending.worker == name for pending in self._pending.values()):
                            self._stop_worker(name)
                case _:
                    pass

    def _wait(self) -> None:
        """Turn what workers say into events; returns after a tick at the latest."""
        ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=TICK_S, fetch_local=False)
        for waitable in ready:
            pending = self._pending.pop(waitable)
            try:
                self._receive(waitable, pending)
            except Exception as exc:  # noqa: BLE001 - sorted by class below
                self._failed(pending, exc)
        now = time.monotonic()
        for waitable, pending in list(self._pending.items()):
            if now > pending.deadline:
                del self._pending[waitable]
                self._failed(pending, WorkerLost(f"Nothing was heard of worker {pending.worker} for too long."))

    def _receive(self, waitable: Any, pending: _Pending) -> None:
        if pending.task is None:
            ray.get(waitable, timeout=GET_DEADLINE_S)
            kind = self._workers[pending.worker].kind
            self._failed_starts[kind] = 0
            self._events.append(WorkerReady(worker=pending.worker, kind=kind))
        elif pending.task.kind is Kind.DENOISE:
            try:
                reference = next(waitable)
            except StopIteration:
                self._events.append(TaskDone(worker=pending.worker, task=pending.task))
                return
            happened = ray.get(reference, timeout=GET_DEADLINE_S)
            self._expect(waitable, pending.worker, pending.task, SILENCE_S[Kind.DENOISE])
            if isinstance(happened, StepDone):
                self._journal.note(happened)
            else:
                self._events.append(happened)
        else:
            ray.get(waitable, timeout=GET_DEADLINE_S)
            self._events.append(TaskDone(worker=pending.worker, task=pending.task))

    def _failed(self, pending: _Pending, exc: Exception) -> None:
        failure, message = classify(exc)
        if pending.task is None:
            self._start_failed(pending.worker, exc, message)
        elif worker_is_gone(exc):
            self._stop_worker(pending.worker)
            self._events.append(WorkerGone(worker=pending.worker, failure=failure, message=message))
        else:
            self._events.append(TaskFailed(worker=pending.worker, task=pending.task, failure=failure, message=message))

    def _start_failed(self, name: str, exc: Exception, message: str) -> None:
        kind = self._workers[name].kind
        self._stop_worker(name)
        self._failed_starts[kind] += 1
        cause = getattr(exc, "cause", None)
        if isinstance(cause, MagiRayError):
            raise cause
        if self._failed_starts[kind] >= MAX_FAILED_STARTS:
            raise WorkerLost(
                f"{MAX_FAILED_STARTS} {kind} workers failed to start, one after the other. The last: {message}",
                remedy="Look at the worker's log under /tmp/ray/session_latest/logs.",
                next_command=f"magi-ray resume {self._run.run_id} --store {self._store.uri}",
            )
        self._start_worker(kind)

    def _start_worker(self, kind: Kind) -> None:
        name = f"{kind}-{self._started[kind]}"
        self._started[kind] += 1
        worker = Worker(
            kind,
            f"{self._run.run_id}/{name}",
            settings=self._run.settings,
            store=self._store,
            run_id=self._run.run_id,
            encoder=self._encoder,
        )
        self._workers[name] = worker
        self._expect(worker.load(), name, None, LOAD_DEADLINE_S)

    def _stop_worker(self, name: str) -> None:
        worker = self._workers.pop(name)
        for waitable in [w for w, pending in self._pending.items() if pending.worker == name]:
            del self._pending[waitable]
        worker.stop()

    def _expect(self, waitable: Any, worker: str, task: Task | None, within_s: float) -> None:
        self._pending[waitable] = _Pending(worker=worker, task=task, deadline=time.monotonic() + within_s)
