"""One process, one loop, no Ray: the same tasks under the same scheduler."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Collection, Generator

from magi_ray.errors import MagiRayError, Superseded, failure_class
from magi_ray.events import StageCommitted, StepDone, Task, TaskKind
from magi_ray.render.artifacts.latents import set_torch_threads
from magi_ray.render.driving.leadership import denoising
from magi_ray.render.driving.progress import RunProgress
from magi_ray.render.driving.reports import Outcome
from magi_ray.render.driving.scheduler import (
    Abandon,
    Command,
    Event,
    Inspect,
    Release,
    Replace,
    RunTask,
    TaskDone,
    TaskFailed,
    WorkerReady,
)
from magi_ray.render.driving.session import Session, session
from magi_ray.render.runs.record import Run
from magi_ray.render.tasks.decode import Decoder
from magi_ray.render.tasks.decode_network import load_decoder
from magi_ray.render.tasks.denoise import Denoiser
from magi_ray.render.tasks.embed import Embedder
from magi_ray.render.tasks.embed_network import load_embedder
from magi_ray.render.tasks.finish import FfmpegJoiner, Finisher
from magi_ray.storage.store import Store


def render_here(
    store: Store,
    run: Run,
    *,
    observe: Callable[[RunProgress], None] | None = None,
    take_over: bool = False,
    retry: Collection[str] = (),
    max_failed_rows: int | None = None,
) -> Outcome:
    """Render what is left of ``run`` in this process. Every chunk is decoded as soon as it is clean.

    A row that fails is recorded and harms no other. Arguments and errors as ``session``; StoreError also when the run's
    own records cannot be written.
    """
    with session(
        store, run, observe=observe, take_over=take_over, retry=retry, max_failed_rows=max_failed_rows
    ) as driving:
        set_torch_threads(run.settings.numeric.cpu_threads)
        here = _Here(driving)
        try:
            here.work()
        finally:
            here.stop()
        return driving.close()


class _Here:
    """A worker of each kind, all of them this process."""

    def __init__(self, driving: Session) -> None:
        self._driving = driving
        self._tasks = _Tasks(driving)
        self._events: deque[Event] = deque(WorkerReady(worker=kind, kind=kind) for kind in TaskKind)
        self._waiting: deque[Task] = deque()
        self._denoising: tuple[Task, Generator[StepDone | StageCommitted]] | None = None
        self._to_stage_end = False

    def work(self) -> None:
        """Carry out the scheduler's commands until it has none left."""
        while True:
            # Wishes first: a run that is to stop does not begin.
            self._events.extendleft(self._driving.tick())
            while self._events:
                for command in self._driving.handle(self._events.popleft()):
                    self._obey(command)
            if self._driving.scheduler.finished:
                break
            if self._waiting:
                self._carry_out(self._waiting.popleft())
            elif self._denoising is not None:
                self._step(*self._denoising)

    def stop(self) -> None:
        """Let go of the row in work, whatever happened."""
        self._stop_denoising()

    def _obey(self, command: Command) -> None:
        match command:
            case RunTask(task=task) if task.kind is TaskKind.DENOISE:
                self._denoising, self._to_stage_end = (task, self._tasks.denoise(task)), False
            case RunTask(task=task):
                self._waiting.append(task)
            case Replace(kind=kind):
                self._events.append(WorkerReady(worker=kind, kind=kind))
            case Inspect(job_id=job_id):
                self._events.append(self._driving.inspect(job_id))
            case Release(kind=kind):
                self._tasks.release(kind)
            case Abandon(job_id=job_id, to_stage_end=to_stage_end):
                if self._denoising is not None and self._denoising[0].job_id == job_id:
                    self._to_stage_end = to_stage_end
                    if not to_stage_end:
                        self._stop_denoising()
            case _:
                pass

    def _carry_out(self, task: Task) -> None:
        try:
            self._tasks.carry_out(task)
            self._events.append(TaskDone(worker=task.kind, task=task))
        except Exception as exc:  # noqa: BLE001 - one row's failure must not end the others
            self._events.append(_failed(task, exc))

    def _step(self, task: Task, steps: Generator[StepDone | StageCommitted]) -> None:
        try:
            happened = next(steps, None)
        except Exception as exc:  # noqa: BLE001 - as above
            self._denoising = None
            if isinstance(exc, Superseded):
                self._driving.doubt()
            self._events.append(_failed(task, exc))
            return
        if happened is None:
            self._stop_denoising()
        elif isinstance(happened, StepDone):
            self._driving.note(happened)
        else:
            self._events.append(happened)
            if self._to_stage_end:
                self._stop_denoising()

    def _stop_denoising(self) -> None:
        if self._denoising is not None:
            task, steps = self._denoising
            self._denoising = None
            steps.close()
            self._events.append(TaskDone(worker=TaskKind.DENOISE, task=task))


def _failed(task: Task, exc: Exception) -> TaskFailed:
    if not isinstance(exc, MagiRayError):
        # A bug, or a library's: where it happened is in no message.
        traceback.print_exception(exc)
    return TaskFailed(worker=task.kind, task=task, failure=failure_class(exc), message=str(exc) or repr(exc))


class _Tasks:
    """The four kinds of work, their networks loaded at the first task that needs them."""

    def __init__(self, driving: Session) -> None:
        self._store, self._run, self._encoder = driving.store, driving.run, driving.encoder
        self._epoch = driving.epoch
        self._embedder: Embedder | None = None
        self._denoiser: Denoiser | None = None
        self._decoder: Decoder | None = None

    def denoise(self, task: Task) -> Generator[StepDone | StageCommitted]:
        if self._denoiser is None:
            self._denoiser = Denoiser(self._run.settings, self._store)
        with denoising(self._store, self._run.run_id, task.job_id, epoch=self._epoch, name="denoise") as lease:
            for happened in self._denoiser.render(self._run.plans[task.job_id], task.index):
                lease.check()
                yield happened

    def carry_out(self, task: Task) -> None:
        plan = self._run.plans[task.job_id]
        match task.kind:
            case TaskKind.EMBED:
                if self._embedder is None:
                    self._embedder = load_embedder(self._run.settings, self._store)
                list(self._embedder.carry_out(plan))
            case TaskKind.DECODE:
                if self._decoder is None:
                    self._decoder = load_decoder(self._run.settings, self._store, encoder=self._encoder)
                list(self._decoder.carry_out(plan, task.index))
            case TaskKind.FINISH:
                joiner = FfmpegJoiner(self._store)
                finisher = Finisher(self._store, self._run.run_id, encoder=self._encoder, joiner=joiner)
                list(finisher.carry_out(plan))
            case TaskKind.DENOISE:
                raise AssertionError("denoising goes step by step")

    def release(self, kind: TaskKind) -> None:
        """Let go of the networks that only ``kind`` used."""
        match kind:
            case TaskKind.EMBED:
                self._embedder = None
            case TaskKind.DENOISE:
                self._denoiser = None
            case TaskKind.DECODE:
                self._decoder = None
            case TaskKind.FINISH:
                pass
