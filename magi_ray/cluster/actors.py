"""The actor of every worker: a thin wrapper around ``Worker``. Never restarted, since all state is in the store.

``load`` is a call of its own, not ``__init__``, so that what goes wrong in it arrives as the error it is.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray

from magi_ray.events import StageCommitted, StepDone, Task, TaskDone, TaskFailed, TaskKind, TaskStopped
from magi_ray.render.driving.worker import Worker
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.settings import Settings
from magi_ray.storage.store import Store

_F = TypeVar("_F", bound=Callable[..., Any])


def on_concurrency_group(name: str) -> Callable[[_F], _F]:
    """Run a method on the threads of the concurrency group ``name``: "work" or "control"."""
    method: Callable[[_F], _F] = ray.method(concurrency_group=name)
    return method


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a worker is. ``node``: Ray's id of the machine; ``log``: where it writes, as host:path."""

    node: str
    log: str


class WorkerActor:
    """A worker of any kind; one process. Work and control have threads of their own, so that ``abandon`` gets through
    while a stage is computed. encoder: identity of the ffmpeg that the run's driver found.  epoch: of that driver."""

    def __init__(
        self, kind: TaskKind, name: str, *, settings: Settings, store: Store, run_id: str, encoder: str, epoch: int
    ) -> None:
        # Imported here: only the worker needs torch.
        from magi_ray.render.tasks.loading import load_task

        self._title, self._settings = f"{run_id}/{name}", settings
        load = partial(load_task, kind, settings=settings, store=store, run_id=run_id, encoder=encoder)
        self._worker = Worker(kind, name, store=store, run_id=run_id, epoch=epoch, load=load)

    def __repr__(self) -> str:
        # What the Ray dashboard shows.
        return self._title

    def where(self) -> Place:
        """Answered as soon as the actor runs, before it has loaded."""
        try:
            log = f"{socket.gethostname()}:{Path('/proc/self/fd/2').readlink()}"
        except OSError:
            log = ""  # a system without /proc
        return Place(node=ray.get_runtime_context().get_node_id(), log=log)

    @on_concurrency_group("work")
    def load(self) -> float:
        """As ``Worker.load``."""
        self._use_threads()
        return self._worker.load()

    @on_concurrency_group("work")
    def carry_out(
        self, plan: RowPlan, task: Task, attempt: int
    ) -> Iterator[StepDone | StageCommitted | TaskDone | TaskStopped | TaskFailed]:
        """As ``Worker.carry_out``."""
        self._use_threads()
        yield from self._worker.carry_out(plan, task, attempt)

    @on_concurrency_group("control")
    def abandon(self, attempt: int, to_stage_end: bool) -> None:
        """As ``Worker.abandon``."""
        self._worker.abandon(attempt, to_stage_end=to_stage_end)

    def _use_threads(self) -> None:
        if self._worker.kind is TaskKind.FINISH:
            return  # it computes nothing, and starts faster without torch
        from magi_ray.render.artifacts.latents import set_torch_threads

        set_torch_threads(self._settings.numeric.cpu_threads)


# One class per kind, since `ps` and the Ray dashboard show its name.


class EmbedWorker(WorkerActor):
    pass


class DenoiseWorker(WorkerActor):
    pass


class DecodeWorker(WorkerActor):
    pass


class FinishWorker(WorkerActor):
    pass


ACTORS: Mapping[TaskKind, type[WorkerActor]] = {
    TaskKind.EMBED: EmbedWorker,
    TaskKind.DENOISE: DenoiseWorker,
    TaskKind.DECODE: DecodeWorker,
    TaskKind.FINISH: FinishWorker,
}
