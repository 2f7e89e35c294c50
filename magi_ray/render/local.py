"""One process, one loop, no Ray: the same tasks under the same scheduler."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from magi_ray.errors import failure_class
from magi_ray.media.encoder import encoder_identity, find_ffmpeg
from magi_ray.render.decode import Decoder
from magi_ray.render.denoise import Denoiser
from magi_ray.render.embed import Embedder
from magi_ray.render.finish import finish
from magi_ray.render.inventory import take_stock
from magi_ray.render.journal import Journal, Outcome
from magi_ray.render.latents import use_threads
from magi_ray.render.progress import RunProgress, StepDone
from magi_ray.render.run import Run, require_same_weights
from magi_ray.render.scheduler import (
    Abandon,
    Event,
    Kind,
    Release,
    Scheduler,
    StageCommitted,
    Task,
    TaskDone,
    TaskFailed,
    WorkerReady,
)
from magi_ray.render.scheduler import Run as RunTask
from magi_ray.storage.store import Store


def render_here(store: Store, run: Run, *, observe: Callable[[RunProgress], None] | None = None) -> Outcome:
    """Render what is left of ``run`` in this process. Every chunk is decoded as soon as it is clean.

    A row that fails is recorded and harms no other. Raises WeightsError when the weights are not those the run was
    submitted with, MediaError without ffmpeg, StoreError when the run's own records cannot be written.
    """
    require_same_weights(run)
    use_threads(run.settings.numeric.cpu_threads)
    encoder = encoder_identity(find_ffmpeg())
    rows = [take_stock(store, run.run_id, plan, encoder) for plan in run.plans.values()]
    journal = Journal(store, run, rows, observe=observe)
    tasks = _Tasks(store, run, encoder)
    scheduler = Scheduler(rows)
    try:
        _work(scheduler, tasks, journal)
    except BaseException:
        journal.stop()
        raise
    return journal.close()


def _work(scheduler: Scheduler, tasks: _Tasks, journal: Journal) -> None:
    """Carry out the scheduler's commands until it has none left."""
    # A worker of each kind, all of them this process.
    events: deque[Event] = deque(WorkerReady(worker=kind, kind=kind) for kind in Kind)
    waiting: deque[Task] = deque()
    denoising: tuple[Task, Iterator[StepDone | StageCommitted]] | None = None
    while not scheduler.finished:
        while events:
            event = events.popleft()
            journal.note(event)
            for command in scheduler.handle(event):
                journal.note(command)
                match command:
                    case RunTask(task=task) if task.kind is Kind.DENOISE:
                        denoising = task, tasks.denoise(task)
                    case RunTask(task=task):
                        waiting.append(task)
                    case Release(kind=kind):
                        tasks.release(kind)
                    case Abandon(job_id=job_id):
                        if denoising is not None and denoising[0].job_id == job_id:
                            events.append(TaskDone(worker=Kind.DENOISE, task=denoising[0]))
                            denoising = None
                    case _:
                        pass
        if waiting:
            task = waiting.popleft()
            try:
                tasks.carry_out(task)
                events.append(TaskDone(worker=task.kind, task=task))
            except Exception as exc:  # noqa: BLE001 - one row's failure must not end the others
                events.append(_failed(task, exc))
        elif denoising is not None:
            task, steps = denoising
            try:
                happened = next(steps, None)
            except Exception as exc:  # noqa: BLE001 - as above
                denoising = None
                events.append(_failed(task, exc))
                continue
            if happened is None:
                denoising = None
                events.append(TaskDone(worker=Kind.DENOISE, task=task))
            elif isinstance(happened, StepDone):
                journal.note(happened)
            else:
                events.append(happened)


def _failed(task: Task, exc: Exception) -> TaskFailed:
    return TaskFailed(worker=task.kind, task=task, failure=failure_class(exc), message=str(exc) or repr(exc))


class _Tasks:
    """The four kinds of work, their networks loaded at the first task that needs them."""

    def __init__(self, store: Store, run: Run, encoder: str) -> None:
        self._store = store
        self._run = run
        self._encoder = encoder
        self._embedder: Embedder | None = None
        self._denoiser: Denoiser | None = None
        self._decoder: Decoder | None = None

    def denoise(self, task: Task) -> Iterator[StepDone | StageCommitted]:
        if self._denoiser is None:
            self._denoiser = Denoiser(self._run.settings, self._store)
        yield from self._denoiser.render(self._run.plans[task.job_id], task.index)

    def carry_out(self, task: Task) -> None:
        plan = self._run.plans[task.job_id]
        match task.kind:
            case Kind.EMBED:
                if self._embedder is None:
                    self._embedder = Embedder(self._run.settings, self._store)
                self._embedder.embed(plan)
            case Kind.DECODE:
                if self._decoder is None:
                    self._decoder = Decoder(self._run.settings, self._store, self._encoder)
                self._decoder.decode(plan, task.index)
            case Kind.FINISH:
                finish(self._store, self._run.run_id, plan, self._encoder)
            case Kind.DENOISE:
                raise AssertionError("denoising goes step by step")

    def release(self, kind: Kind) -> None:
        """Let go of the networks that only ``kind`` used."""
        match kind:
            case Kind.EMBED:
                self._embedder = None
            case Kind.DENOISE:
                self._denoiser = None
            case Kind.DECODE:
                self._decoder = None
            case Kind.FINISH:
                pass
