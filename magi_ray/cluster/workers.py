"""Workers on Ray: an actor each, and for denoising a placement group, whose removal ends every rank at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from magi_ray.cluster.actors import ACTORS, Place, WorkerActor
from magi_ray.cluster.failures import classify, own_error, worker_is_gone
from magi_ray.errors import WorkerLost
from magi_ray.events import (
    Task,
    TaskDone,
    TaskFailed,
    TaskKind,
    TaskStopped,
    WorkerEvent,
    WorkerGone,
    WorkerPlaced,
    WorkerReady,
)
from magi_ray.render.driving.loop import check_machine, render
from magi_ray.render.driving.reports import Observer, RunResult
from magi_ray.render.driving.scheduler import ONE_OF_EACH
from magi_ray.render.driving.session import DriveOptions, Session
from magi_ray.render.driving.timings import Timings
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.runs.record import Run
from magi_ray.settings import Settings
from magi_ray.storage.store import Store

# How long to wait for a result that ray.wait reported ready.
ANSWER_S = 60.0
# Backpressure: a worker blocks once this many events are unread.
_EVENTS_AHEAD = 256


def render_on_ray(
    store: Store,
    run: Run,
    options: DriveOptions = DriveOptions(),
    *,
    observers: Sequence[Observer] = (),
    timings: Timings = Timings(),
    actors: Mapping[TaskKind, type[WorkerActor]] = ACTORS,
) -> RunResult:
    """Render what is left of ``run`` on the Ray instance this process is connected to.

    Raises as ``loop.render`` and ``loop.check_machine``.
    """
    encoder = check_machine(run)
    return render(
        store,
        run,
        lambda session: RayWorkers(session, actors),
        counts={**ONE_OF_EACH, TaskKind.DECODE: run.settings.decoders},
        encoder=encoder,
        options=options,
        observers=observers,
        timings=timings,
    )


@dataclass
class _Actor:
    """``needs``: resources reserved for it."""

    handle: Any
    kind: TaskKind
    needs: Mapping[str, float]
    avoid: frozenset[str]
    placement: PlacementGroup | None


@dataclass(frozen=True)
class _Pending:
    """What we wait for from a worker: its start-up, or what it says of a task."""

    worker: str
    task: Task | None = None
    attempt: int = 0


class RayWorkers:
    """Actors are unnamed: Ray's names must be unique in a namespace, and ours repeat from run to run."""

    def __init__(self, session: Session, actors: Mapping[TaskKind, type[WorkerActor]]) -> None:
        self._session, self._classes = session, actors
        self._actors: dict[str, _Actor] = {}
        self._pending: dict[Any, _Pending] = {}

    def start(self, worker: str, kind: TaskKind, avoid: frozenset[str]) -> None:
        session, settings = self._session, self._session.run.settings
        node_labels = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"} if avoid else {}
        needs = needed(kind, settings)
        placement = None
        options: dict[str, Any] = {
            "num_cpus": 0,
            "max_restarts": 0,
            "max_task_retries": 0,
            "concurrency_groups": {"work": 1, "control": 1},
        }
        if kind is TaskKind.DENOISE:
            placement = placement_group(
                [needs], strategy="STRICT_PACK", bundle_label_selector=[node_labels] if node_labels else None
            )
            options |= {
                "num_cpus": needs["CPU"],
                "num_gpus": needs.get("GPU", 0),
                "scheduling_strategy": PlacementGroupSchedulingStrategy(placement),
            }
        elif node_labels:
            options["label_selector"] = node_labels
        # Wrapped here, not decorated, so that tests can subclass the plain class.
        handle = ray.remote(**options)(self._classes[kind]).remote(
            kind,
            worker,
            settings=settings,
            store=session.store,
            run_id=session.run.run_id,
            encoder=session.encoder,
            epoch=session.epoch,
        )
        self._actors[worker] = _Actor(handle, kind, needs, avoid, placement)
        self._pending[handle.where.remote()] = _Pending(worker)

    def run(self, worker: str, plan: RowPlan, task: Task, attempt: int) -> None:
        carry_out = self._actors[worker].handle.carry_out.options(
            num_returns="streaming", _generator_backpressure_num_objects=_EVENTS_AHEAD
        )
        self._pending[carry_out.remote(plan, task, attempt)] = _Pending(worker, task, attempt)

    def abandon(self, worker: str, attempt: int, *, to_stage_end: bool) -> None:
        self._actors[worker].handle.abandon.remote(attempt, to_stage_end)

    def stop(self, worker: str) -> None:
        actor = self._actors.pop(worker)
        for waitable in [waitable for waitable, pending in self._pending.items() if pending.worker == worker]:
            del self._pending[waitable]
        ray.kill(actor.handle, no_restart=True)
        if actor.placement is not None:
            remove_placement_group(actor.placement)

    def wait(self, within_s: float) -> Sequence[tuple[str, WorkerEvent]]:
        waitables = list(self._pending)
        # The first call waits for one to be ready; the second takes all that are, so that none is passed over.
        first, _ = ray.wait(waitables, num_returns=1, timeout=within_s, fetch_local=False)
        others, _ = ray.wait(waitables, num_returns=len(waitables), timeout=0, fetch_local=False)
        said: list[tuple[str, WorkerEvent]] = []
        for waitable in dict.fromkeys([*first, *others]):
            pending = self._pending.pop(waitable)
            try:
                event = self._receive(waitable, pending)
            except Exception as exc:  # noqa: BLE001 - sorted by class
                event = _failed(pending, exc)
            if event is not None:
                said.append((pending.worker, event))
        return said

    def nodes(self, kind: TaskKind) -> frozenset[str]:
        wanted = needed(kind, self._session.run.settings)
        return frozenset(
            node["NodeID"]
            for node in ray.nodes()
            if node["Alive"] and all(node["Resources"].get(name, 0) >= amount for name, amount in wanted.items())
        )

    def why_unplaced(self, worker: str) -> str:
        actor = self._actors[worker]
        other = " other" if actor.avoid else ""
        return (
            f"No{other} node has {dict(actor.needs) or 'room'} free for a {actor.kind} worker after "
            f"{self._session.timings.placement_s:.0f} s; the cluster has {ray.cluster_resources()}, of which "
            f"{ray.available_resources()} are free. Add such a node, or stop what holds it."
        )

    def _receive(self, waitable: Any, pending: _Pending) -> WorkerEvent | None:
        """What a worker said; None when it has nothing more to say of its task."""
        worker = pending.worker
        if pending.task is None:
            answer: Place | float = ray.get(waitable, timeout=ANSWER_S)
            if not isinstance(answer, Place):
                return WorkerReady(worker=worker, seconds=answer)
            self._pending[self._actors[worker].handle.load.remote()] = pending
            return WorkerPlaced(worker=worker, node=answer.node, log=answer.log)
        try:
            reference = next(waitable)
        except StopIteration:
            return None
        event: WorkerEvent = ray.get(reference, timeout=ANSWER_S)
        if not isinstance(event, TaskDone | TaskStopped | TaskFailed):
            self._pending[waitable] = pending
        return event


def _failed(pending: _Pending, exc: Exception) -> WorkerEvent:
    """The event for an error that ``RayWorkers._receive`` raised."""
    failure, message = classify(exc)
    if pending.task is None:
        own = own_error(exc)
        error = None if isinstance(own, WorkerLost) else own
        return WorkerGone(worker=pending.worker, failure=failure, message=message, error=error)
    if worker_is_gone(exc):
        return WorkerGone(worker=pending.worker, failure=failure, message=message)
    return TaskFailed(
        worker=pending.worker, task=pending.task, attempt=pending.attempt, failure=failure, message=message
    )


def needed(kind: TaskKind, settings: Settings) -> dict[str, float]:
    """The resources that Ray reserves for a worker of ``kind``.

    Embed, decode and finish workers reserve nothing: for them every live node counts, and embedding and decoding may
    share the denoise worker's GPU.
    """
    if kind is not TaskKind.DENOISE:
        return {}
    return {"CPU": 1.0, "GPU": 1.0} if settings.numeric.device == "cuda" else {"CPU": 1.0}
