"""The driver: carries the scheduler's commands out on Ray. Disposable; all it knows can be found again in the store."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray

from magi_ray.cluster.actors import WORKERS, TaskWorker
from magi_ray.cluster.failures import classify, own_error, worker_is_gone
from magi_ray.cluster.group import Worker
from magi_ray.errors import StoreError, WorkerLost
from magi_ray.media.encoder import encoder_identity, find_ffmpeg
from magi_ray.render.inventory import stages_done, take_stock
from magi_ray.render.journal import Journal, Outcome
from magi_ray.render.progress import RunProgress, StepDone
from magi_ray.render.run import Run, require_same_weights
from magi_ray.render.scheduler import (
    Abandon,
    Event,
    Kind,
    Release,
    Replace,
    Scheduler,
    StageCommitted,
    Task,
    TaskDone,
    TaskFailed,
    WorkerGone,
    WorkerReady,
)
from magi_ray.render.scheduler import Run as RunTask
from magi_ray.storage.store import Store

TICK_S = 1.0
# Workers of a kind that may fail to start, one after the other, before the run is given up.
MAX_FAILED_STARTS = 3
# Starting is most of what a short run takes. So workers load in the order in which they get to work, not all at once.
_STARTS_AFTER = {Kind.DECODE: Kind.DENOISE, Kind.FINISH: Kind.DECODE}


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """Seconds after which something is taken for hung.

    placement_s: the cluster finds a place for a worker.  load_s: a worker loads.  silence_s: of a task of each kind;
    denoising breaks it with every step.  answer_s: Ray delivers what it said was ready.
    """

    placement_s: float = 120.0
    load_s: float = 3600.0
    silence_s: Mapping[Kind, float] = field(default_factory=lambda: dict.fromkeys(Kind, 3600.0))
    answer_s: float = 60.0


@dataclass
class _Pending:
    """What we wait for from a worker: ``task`` is None while it loads. ``deadline``: monotonic seconds."""

    worker: str
    task: Task | None
    deadline: float


def render_on_ray(
    store: Store,
    run: Run,
    *,
    observe: Callable[[RunProgress], None] | None = None,
    deadlines: Deadlines | None = None,
    workers: Mapping[Kind, type[TaskWorker]] = WORKERS,
) -> Outcome:
    """Render what is left of ``run`` on the Ray instance this process is connected to.

    A row that fails is recorded and harms no other. Raises what keeps any worker from starting (WeightsError, also
    when the weights are not those of the submission, MediaError, WorkerLost) and StoreError when the run's own records
    cannot be written. Workers are gone afterwards, whatever happened.
    """
    driver = _Driver(store, run, observe, deadlines or Deadlines(), workers)
    try:
        return driver.drive()
    finally:
        driver.stop()


class _Driver:
    def __init__(
        self,
        store: Store,
        run: Run,
        observe: Callable[[RunProgress], None] | None,
        deadlines: Deadlines,
        classes: Mapping[Kind, type[TaskWorker]],
    ) -> None:
        require_same_weights(run)
        self._store, self._run = store, run
        self._deadlines, self._classes = deadlines, classes
        self._encoder = encoder_identity(find_ffmpeg())
        rows = [take_stock(store, run.run_id, plan, self._encoder) for plan in run.plans.values()]
        self._journal = Journal(store, run, rows, observe=observe)
        self._scheduler = Scheduler(rows)
        self._workers: dict[str, Worker] = {}
        self._pending: dict[Any, _Pending] = {}
        self._events: deque[Event] = deque()
        self._started: Counter[Kind] = Counter()
        self._ready: set[Kind] = set()
        self._failed_starts: Counter[Kind] = Counter()

    def drive(self) -> Outcome:
        while True:
            while self._events:
                self._handle(self._events.popleft())
            if self._scheduler.finished:
                return self._journal.close()
            self._start_what_is_due()
            self._wait()
            self._journal.beat()

    def stop(self) -> None:
        if not self._scheduler.finished:
            self._journal.stop()
        for name in list(self._workers):
            # Where Ray itself is gone its workers are too, and the error that ended the run matters more.
            with suppress(Exception):
                self._stop_worker(name)

    # ---------------------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        self._journal.note(event)
        for command in self._scheduler.handle(event):
            self._journal.note(command)
            match command:
                case RunTask(worker=name, task=task):
                    waitable = self._workers[name].start(self._run.plans[task.job_id], task.index)
                    self._expect(waitable, name, task, self._deadlines.silence_s[task.kind])
                case Replace(kind=kind):
                    self._start_worker(kind)
                case Abandon(worker=name, job_id=job_id):
                    self._workers[name].abandon(job_id)
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
        for waitable, pending in list(self._pending.items()):
            if now > pending.deadline:
                del self._pending[waitable]
                self._failed(pending, WorkerLost(f"Nothing was heard of worker {pending.worker} for too long."))

    def _receive(self, waitable: Any, pending: _Pending) -> None:
        if pending.task is None:
            ray.get(waitable, timeout=self._deadlines.answer_s)
            kind = self._workers[pending.worker].kind
            self._failed_starts[kind] = 0
            self._ready.add(kind)
            self._events.append(WorkerReady(worker=pending.worker, kind=kind))
        elif pending.task.kind is Kind.DENOISE:
            try:
                reference = next(waitable)
            except StopIteration:
                self._events.append(TaskDone(worker=pending.worker, task=pending.task))
                return
            happened = ray.get(reference, timeout=self._deadlines.answer_s)
            self._expect(waitable, pending.worker, pending.task, self._deadlines.silence_s[Kind.DENOISE])
            if isinstance(happened, StepDone):
                self._journal.note(happened)
            else:
                self._events.append(happened)
        else:
            ray.get(waitable, timeout=self._deadlines.answer_s)
            self._events.append(TaskDone(worker=pending.worker, task=pending.task))

    def _failed(self, pending: _Pending, exc: Exception) -> None:
        failure, message = classify(exc)
        if pending.task is None:
            self._start_failed(pending.worker, exc, message)
        elif worker_is_gone(exc):
            self._stop_worker(pending.worker)
            self._events += self._committed_unseen(pending.task)
            self._events.append(WorkerGone(worker=pending.worker, failure=failure, message=message))
        else:
            self._events.append(TaskFailed(worker=pending.worker, task=pending.task, failure=failure, message=message))

    def _start_failed(self, name: str, exc: Exception, message: str) -> None:
        kind = self._workers[name].kind
        self._stop_worker(name)
        self._failed_starts[kind] += 1
        own = own_error(exc)
        if own is not None and not isinstance(own, WorkerLost):
            raise own
        if self._failed_starts[kind] >= MAX_FAILED_STARTS:
            raise WorkerLost(
                f"{MAX_FAILED_STARTS} {kind} workers failed to start, one after the other. The last: {message}",
                remedy="Look at the worker's log under /tmp/ray/session_latest/logs.",
                next_command=f"magi-ray resume {self._run.run_id} --store {self._store.uri}",
            )
        self._start_worker(kind)

    def _committed_unseen(self, task: Task) -> list[StageCommitted]:
        """The stages a lost worker committed, reported or not: none of them is to be computed again."""
        if task.kind is not Kind.DENOISE:
            return []
        plan = self._run.plans[task.job_id]
        try:
            done = stages_done(self._store, plan)
        except StoreError:
            return []  # then those that were reported have to do
        return [
            StageCommitted(job_id=task.job_id, stage=stage, chunk=plan.timeline.finished(stage))
            for stage in range(task.index, done)
        ]

    def _start_what_is_due(self) -> None:
        for kind in Kind:
            before = _STARTS_AFTER.get(kind)
            waits = before is not None and before not in self._ready and self._scheduler.needs(before)
            if not waits and not self._started[kind] and self._scheduler.needs(kind):
                for _ in range(self._run.settings.decoders if kind is Kind.DECODE else 1):
                    self._start_worker(kind)

    def _start_worker(self, kind: Kind) -> None:
        name = f"{kind}-{self._started[kind]}"
        self._started[kind] += 1
        worker = Worker(
            kind,
            name,
            of=self._classes[kind],
            settings=self._run.settings,
            store=self._store,
            run_id=self._run.run_id,
            encoder=self._encoder,
            placement_s=self._deadlines.placement_s,
        )
        self._workers[name] = worker
        self._expect(worker.load(), name, None, self._deadlines.load_s)

    def _stop_worker(self, name: str) -> None:
        worker = self._workers.pop(name)
        for waitable in [w for w, pending in self._pending.items() if pending.worker == name]:
            del self._pending[waitable]
        worker.stop()

    def _expect(self, waitable: Any, worker: str, task: Task | None, within_s: float) -> None:
        self._pending[waitable] = _Pending(worker=worker, task=task, deadline=time.monotonic() + within_s)
