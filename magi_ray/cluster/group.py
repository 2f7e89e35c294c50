"""A worker on Ray: one actor, and for denoising the placement group that is its kill switch."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from magi_ray.cluster.actors import TaskWorker
from magi_ray.errors import WorkerLost
from magi_ray.events import TaskKind
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.settings import Settings
from magi_ray.storage.store import Store

# Events are a few dozen bytes; this many may wait for the driver before denoising would.
_EVENTS_AHEAD = 256


class Worker:
    """An actor of class ``of`` for tasks of ``kind``. It has no name of Ray's: those must be unique in a cluster.

    Denoising is a group of one rank so far: a placement group (STRICT_PACK) whose removal ends every rank at once.
    avoid: ids of nodes it must not be on.  Nothing waits here for the cluster to have a place for it.
    """

    def __init__(
        self,
        kind: TaskKind,
        name: str,
        *,
        of: type[TaskWorker],
        settings: Settings,
        store: Store,
        run_id: str,
        encoder: str,
        epoch: int,
        avoid: frozenset[str] = frozenset(),
    ) -> None:
        self.kind, self.avoid = kind, avoid
        self._needs = needed(kind, settings)
        elsewhere = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"} if avoid else {}
        self._placement: PlacementGroup | None = None
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0}
        if kind is TaskKind.DENOISE:
            self._placement = placement_group(
                [self._needs], strategy="STRICT_PACK", bundle_label_selector=[elsewhere] if elsewhere else None
            )
            options |= {
                "num_cpus": 1,
                "num_gpus": 1 if settings.numeric.device == "cuda" else 0,
                "concurrency_groups": {"work": 1, "control": 1},
                "scheduling_strategy": PlacementGroupSchedulingStrategy(self._placement),
            }
        elif elsewhere:
            options["label_selector"] = elsewhere
        # Not `ray.remote` as decorator: the classes stay ordinary ones.
        actor = ray.remote(**options)(of)
        self._actor = actor.remote(name, settings=settings, store=store, run_id=run_id, encoder=encoder, epoch=epoch)

    def where(self) -> Any:
        """A reference to its Whereabouts, ready when the cluster has found a place for it."""
        return self._actor.where.remote()

    def no_place(self, after_s: float) -> WorkerLost:
        """Why it is still nowhere."""
        other = " other" if self.avoid else ""
        return WorkerLost(
            f"No{other} node has {self._needs or 'room'} free for a {self.kind} worker after {after_s:.0f} s; the "
            f"cluster has {ray.cluster_resources()}, of which {ray.available_resources()} are free.",
            remedy="Add such a node, or stop what holds it.",
        )

    def load(self) -> Any:
        """A reference that is ready when the worker is."""
        return self._actor.load.remote()

    def start(self, plan: RowPlan, index: int) -> Any:
        """Begin a task: a generator of events for denoising, a reference for the rest."""
        if self.kind is TaskKind.DENOISE:
            render = self._actor.render.options(
                num_returns="streaming", _generator_backpressure_num_objects=_EVENTS_AHEAD
            )
            return render.remote(plan, index)
        return self._actor.carry_out.remote(plan, index)

    def abandon(self, job_id: str, *, to_stage_end: bool) -> None:
        """Ask a denoise worker to stop working on ``job_id``; the others are done soon anyway."""
        if self.kind is TaskKind.DENOISE:
            self._actor.abandon.remote(job_id, to_stage_end)

    def stop(self) -> None:
        """End the worker now, whatever it is doing."""
        ray.kill(self._actor, no_restart=True)
        if self._placement is not None:
            remove_placement_group(self._placement)


def needed(kind: TaskKind, settings: Settings) -> dict[str, float]:
    """What Ray is asked to keep free for a worker of ``kind``."""
    if kind is not TaskKind.DENOISE:
        return {}
    return {"CPU": 1.0, "GPU": 1.0} if settings.numeric.device == "cuda" else {"CPU": 1.0}
