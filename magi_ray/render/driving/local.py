"""Workers in this process, one of each kind: no Ray, one thing at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from math import inf

from magi_ray.errors import MagiRayError
from magi_ray.events import (
    Task,
    TaskDone,
    TaskFailed,
    TaskKind,
    TaskStopped,
    WorkerEvent,
    WorkerPlaced,
    WorkerReady,
)
from magi_ray.render.artifacts.latents import set_torch_threads
from magi_ray.render.driving.loop import check_machine, render
from magi_ray.render.driving.reports import Observer, RunResult
from magi_ray.render.driving.scheduler import ONE_OF_EACH
from magi_ray.render.driving.session import DriveOptions, Session
from magi_ray.render.driving.timings import Timings
from magi_ray.render.driving.worker import Worker, print_traceback
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.runs.record import Run
from magi_ray.render.tasks.loading import load_task
from magi_ray.storage.store import Store


def render_locally(
    store: Store,
    run: Run,
    options: DriveOptions = DriveOptions(),
    *,
    observers: Sequence[Observer] = (),
    timings: Timings = Timings(),
) -> RunResult:
    """Render what is left of ``run`` in this process. Every chunk is decoded as soon as it is clean.

    Raises as ``loop.render`` and ``loop.check_machine``.
    """
    encoder = check_machine(run)
    set_torch_threads(run.settings.numeric.cpu_threads)
    return render(
        store,
        run,
        LocalWorkers,
        counts=ONE_OF_EACH,
        encoder=encoder,
        options=options,
        observers=observers,
        # They work in turns: one that is silent does not hang.
        timings=replace(timings, silence_s=dict.fromkeys(TaskKind, inf)),
    )


def _print_bugs(what: str, exc: Exception) -> None:
    """A message does not say where a bug is; our own errors are reported when their row has failed."""
    if not isinstance(exc, MagiRayError):
        print_traceback(what, exc)


class LocalWorkers:
    """Denoising goes on step by step, in ``wait``; a task of another kind that comes meanwhile is carried out first."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._workers: dict[str, Worker] = {}
        self._working: dict[str, Generator[WorkerEvent]] = {}
        self._said: deque[tuple[str, WorkerEvent]] = deque()

    def start(self, worker: str, kind: TaskKind, avoid: frozenset[str]) -> None:
        session = self._session
        self._workers[worker] = Worker(
            kind,
            worker,
            store=session.store,
            run_id=session.run.run_id,
            epoch=session.epoch,
            # Loaded with the first task.
            load=partial(
                load_task,
                kind,
                settings=session.run.settings,
                store=session.store,
                run_id=session.run.run_id,
                encoder=session.encoder,
            ),
            on_error=_print_bugs,
        )
        self._said += [(worker, WorkerPlaced(worker=worker)), (worker, WorkerReady(worker=worker))]

    def run(self, worker: str, plan: RowPlan, task: Task, attempt: int) -> None:
        self._working[worker] = self._workers[worker].carry_out(plan, task, attempt)

    def abandon(self, worker: str, attempt: int, *, to_stage_end: bool) -> None:
        self._workers[worker].abandon(attempt, to_stage_end=to_stage_end)

    def stop(self, worker: str) -> None:
        """Its networks go with it; a task under way is closed, which releases its row's lease."""
        del self._workers[worker]
        if (working := self._working.pop(worker, None)) is not None:
            working.close()

    def wait(self, within_s: float) -> Sequence[tuple[str, WorkerEvent]]:
        if not self._said and self._working:
            # Denoising last: what it has completed is decoded at once.
            worker = min(self._working, key=lambda name: self._workers[name].kind is TaskKind.DENOISE)
            event = next(self._working[worker])
            if isinstance(event, TaskDone | TaskStopped | TaskFailed):
                del self._working[worker]
            self._said.append((worker, event))
        said, self._said = list(self._said), deque()
        return said

    def nodes(self, kind: TaskKind) -> frozenset[str]:
        return frozenset()

    def why_unplaced(self, worker: str) -> str:
        raise AssertionError("a worker in this process is placed immediately")
