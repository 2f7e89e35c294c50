"""The actors: thin carriers of the tasks in `render/`. None restarts; what they knew is in the store.

``load`` is a call of its own, not ``__init__``, so that what goes wrong in it arrives as the error it is.
"""

from __future__ import annotations

import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray

from magi_ray.events import StageCommitted, StepDone, TaskKind
from magi_ray.render.driving.leadership import denoising
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.settings import Settings
from magi_ray.storage import keys
from magi_ray.storage.store import Store

_F = TypeVar("_F", bound=Callable[..., Any])


def _in_group(name: str) -> Callable[[_F], _F]:
    """Run a method on the threads of the concurrency group ``name``."""
    method: Callable[[_F], _F] = ray.method(concurrency_group=name)
    return method


@dataclass(frozen=True, kw_only=True)
class Whereabouts:
    """Where a worker is. ``node``: Ray's id of the machine; ``log``: where it writes, as host:file."""

    node: str
    log: str


class TaskWorker:
    """What every worker knows. ``name``: its own within the run; ``encoder``: identity of the run's ffmpeg; ``epoch``:
    of the driver it works for."""

    def __init__(self, name: str, *, settings: Settings, store: Store, run_id: str, encoder: str, epoch: int) -> None:
        self._name, self._settings, self._store, self._run_id, self._encoder = name, settings, store, run_id, encoder
        self._epoch = epoch
        self._loaded: Any = None

    def __repr__(self) -> str:
        # What the Ray dashboard shows.
        return f"{self._run_id}/{self._name}"

    def where(self) -> Whereabouts:
        """Answered as soon as the worker is there, before it has loaded."""
        try:
            log = f"{socket.gethostname()}:{Path('/proc/self/fd/2').readlink()}"
        except OSError:
            log = ""  # a system without /proc
        return Whereabouts(node=ray.get_runtime_context().get_node_id(), log=log)

    def load(self) -> None:
        """Load what the tasks need, so that the first one starts at once. Raises StoreError also when this machine has
        no way to the store: told here it ends the run, in a task it would end row after row."""
        self._store.exists(keys.run_record(self._run_id))

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """What goes wrong in the block is written to the log whole: people are told its last line alone."""
        try:
            yield
        except Exception:
            print(f"{what} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            raise

    def _use_threads(self) -> None:
        from magi_ray.render.artifacts.latents import set_torch_threads

        set_torch_threads(self._settings.numeric.cpu_threads)


class EmbedWorker(TaskWorker):
    def load(self) -> None:
        from magi_ray.render.tasks.embed_network import load_embedder

        self._use_threads()
        with self._telling("Loading"):
            super().load()
            self._loaded = load_embedder(self._settings, self._store)

    def carry_out(self, plan: RowPlan, _index: int) -> None:
        with self._telling(f"Embedding job {plan.job_id}"):
            list(self._loaded.carry_out(plan))


class DenoiseWorker(TaskWorker):
    """One rank. Work and control have threads of their own, so that ``abandon`` is heard in mid-stage."""

    def __init__(self, name: str, *, settings: Settings, store: Store, run_id: str, encoder: str, epoch: int) -> None:
        super().__init__(name, settings=settings, store=store, run_id=run_id, encoder=encoder, epoch=epoch)
        self._abandoned: set[str] = set()
        self._stopping: set[str] = set()

    @_in_group("work")
    def load(self) -> None:
        from magi_ray.render.tasks.denoise import Denoiser

        self._use_threads()
        with self._telling("Loading"):
            super().load()
            self._loaded = Denoiser(self._settings, self._store)

    @_in_group("work")
    def render(self, plan: RowPlan, first_stage: int) -> Iterator[StepDone | StageCommitted]:
        self._use_threads()
        job_id = plan.job_id
        with (
            self._telling(f"Denoising job {job_id} from stage {first_stage} on"),
            denoising(self._store, self._run_id, job_id, epoch=self._epoch, name=self._name) as lease,
        ):
            for happened in self._loaded.render(plan, first_stage):
                lease.check()
                yield happened
                if job_id in self._abandoned:
                    return
                if job_id in self._stopping and isinstance(happened, StageCommitted):
                    return

    @_in_group("control")
    def abandon(self, job_id: str, to_stage_end: bool) -> None:
        """Stop working on ``job_id`` for good, after the step in work or once its stage is committed."""
        (self._stopping if to_stage_end else self._abandoned).add(job_id)


class DecodeWorker(TaskWorker):
    def load(self) -> None:
        from magi_ray.render.tasks.decode_network import load_decoder

        self._use_threads()
        with self._telling("Loading"):
            super().load()
            self._loaded = load_decoder(self._settings, self._store, encoder=self._encoder)

    def carry_out(self, plan: RowPlan, index: int) -> None:
        with self._telling(f"Decoding chunk {index} of job {plan.job_id}"):
            list(self._loaded.carry_out(plan, index))


class FinishWorker(TaskWorker):
    def carry_out(self, plan: RowPlan, _index: int) -> None:
        from magi_ray.render.tasks.finish import FfmpegJoiner, Finisher

        with self._telling(f"Finishing job {plan.job_id}"):
            joiner = FfmpegJoiner(self._store)
            list(Finisher(self._store, self._run_id, encoder=self._encoder, joiner=joiner).carry_out(plan))


WORKERS: Mapping[TaskKind, type[TaskWorker]] = {
    TaskKind.EMBED: EmbedWorker,
    TaskKind.DENOISE: DenoiseWorker,
    TaskKind.DECODE: DecodeWorker,
    TaskKind.FINISH: FinishWorker,
}
