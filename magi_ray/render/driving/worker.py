"""A worker: carries out tasks of one kind, one at a time; on Ray, in the driver's own process or in a simulation."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Protocol

from magi_ray.errors import MagiRayError, failure_class
from magi_ray.events import StageCommitted, StepDone, Task, TaskDone, TaskFailed, TaskKind, TaskStopped
from magi_ray.redaction import redact
from magi_ray.render.driving.leadership import row_lease
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.storage import keys
from magi_ray.storage.store import Store
from magi_ray.system import System


class TaskBody(Protocol):
    """What does the work of one kind: ``Embedder``, ``Denoiser``, ``Decoder``, ``Finisher``."""

    def carry_out(self, plan: RowPlan, index: int) -> Iterator[StepDone | StageCommitted]: ...


def print_traceback(what: str, exc: Exception) -> None:
    """Print to stderr, which is the worker's log."""
    print(redact(f"{what} failed:\n{''.join(traceback.format_exception(exc))}"), file=sys.stderr, flush=True)


class Worker:
    """``name``: unique within the session.  epoch: of the driver it works for.  load: makes the body, networks and all.
    on_error: called with what was attempted and the exception; events carry only its message."""

    def __init__(
        self,
        kind: TaskKind,
        name: str,
        *,
        store: Store,
        run_id: str,
        epoch: int,
        load: Callable[[], TaskBody],
        on_error: Callable[[str, Exception], None] = print_traceback,
        system: System = System(),
    ) -> None:
        self.kind, self.name = kind, name
        self._store, self._run_id, self._epoch, self._system = store, run_id, epoch, system
        self._load, self._on_error = load, on_error
        self._body: TaskBody | None = None
        self._abandoned: tuple[int, bool] | None = None  # attempt to abandon, and whether at the end of its stage

    def load(self) -> float:
        """Load what the tasks need, so that the first one starts at once; the seconds that it took. Raises StoreError
        also when this machine cannot reach the store: here that ends the run, later it would fail row after row."""
        begun = self._system.clock()
        with self._reporting_errors("Loading"):
            self._loaded()
        return self._system.clock() - begun

    def _loaded(self) -> TaskBody:
        if self._body is None:
            self._store.exists(keys.run_record(self._run_id))
            self._body = self._load()
        return self._body

    def abandon(self, attempt: int, *, to_stage_end: bool) -> None:
        """Stop denoising in ``attempt``: after the current step, or after the next commit of a stage. May be called
        from another thread than the one that works; has no effect on an attempt that has ended."""
        if self._abandoned != (attempt, False):  # an immediate stop is not softened by a later request
            self._abandoned = attempt, to_stage_end

    def carry_out(
        self, plan: RowPlan, task: Task, attempt: int
    ) -> Generator[StepDone | StageCommitted | TaskDone | TaskStopped | TaskFailed]:
        """Carry out ``task``. Yields its events; the last says how it ended. Exceptions become TaskFailed."""
        begun, stopped = self._system.clock(), False
        try:
            with self._reporting_errors(_described(task)):
                body = self._loaded()
                with self._holding_row(task) as check:
                    for event in body.carry_out(plan, task.index):
                        check()
                        yield event
                        if stopped := self._is_abandoned(attempt, event):
                            break
        except Exception as exc:  # noqa: BLE001 - one row's failure must not end the others
            message = str(exc) if isinstance(exc, MagiRayError) else redact(f"{type(exc).__name__}: {exc}")
            yield TaskFailed(
                worker=self.name,
                task=task,
                attempt=attempt,
                failure=failure_class(exc),
                message=message,
                seconds=self._system.clock() - begun,
            )
            return
        kind = TaskStopped if stopped else TaskDone
        yield kind(worker=self.name, task=task, attempt=attempt, seconds=self._system.clock() - begun)

    @contextmanager
    def _holding_row(self, task: Task) -> Iterator[Callable[[], None]]:
        """Hold the row's lease while it is denoised. Yields what raises Superseded once another has taken the row."""
        if task.kind is not TaskKind.DENOISE:
            yield lambda: None
            return
        with row_lease(
            self._store, self._run_id, task.job_id, epoch=self._epoch, name=self.name, system=self._system
        ) as lease:
            yield lease.check

    def _is_abandoned(self, attempt: int, event: StepDone | StageCommitted) -> bool:
        match self._abandoned:
            case (abandoned, to_stage_end) if abandoned == attempt:
                return not to_stage_end or isinstance(event, StageCommitted)
        return False

    @contextmanager
    def _reporting_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as exc:
            self._on_error(what, exc)
            raise


def _described(task: Task) -> str:
    match task.kind:
        case TaskKind.EMBED:
            return f"Embedding job {task.job_id}"
        case TaskKind.DENOISE:
            return f"Denoising job {task.job_id} from stage {task.index} on"
        case TaskKind.DECODE:
            return f"Decoding chunk {task.index} of job {task.job_id}"
        case TaskKind.FINISH:
            return f"Finishing job {task.job_id}"
