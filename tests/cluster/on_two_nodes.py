"""A program: a run on a cluster of two nodes, of which one is lost or cannot do its work. Writes end.json.

A process of its own, because the tests' process has a Ray of one node.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from magi_ray.cluster.actors import ACTORS, WorkerActor, on_concurrency_group
from magi_ray.cluster.local_ray import prepare_ray_environment
from magi_ray.cluster.workers import render_on_ray
from magi_ray.events import StageCommitted, Task, TaskKind
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.runs.record import open_run
from magi_ray.storage.local import LocalStore


def noting(folder: Path) -> type[WorkerActor]:
    """Notes on which node each attempt at a row is made."""

    class Noting(WorkerActor):
        def _begun(self, plan: RowPlan) -> str:
            node: str = ray.get_runtime_context().get_node_id()
            with (folder / "attempts").open("a") as attempts:
                attempts.write(f"{plan.job_id} {node}\n")
            return node

    return Noting


def whose_raylet_dies(folder: Path) -> type[WorkerActor]:
    class Doomed(noting(folder)):  # type: ignore[misc]
        @on_concurrency_group("work")
        def carry_out(self, plan: RowPlan, task: Task, attempt: int) -> Iterator[Any]:
            self._begun(plan)
            for happened in super().carry_out(plan, task, attempt):
                yield happened
                if isinstance(happened, StageCommitted) and happened.stage == 2 and not (folder / "died").exists():
                    (folder / "died").write_text(str(time.time()))
                    raylet = next(p for p in psutil.Process().parents() if "raylet" in p.name())
                    os.kill(raylet.pid, signal.SIGKILL)
                    # Nobody can stop us now. When we wake, another group has our row, and we go on all the same.
                    while not (folder / "went-on").exists():
                        time.sleep(0.1)
                if task.index and not (folder / "went-on").exists():
                    (folder / "went-on").write_text(str(time.time()))

    return Doomed


def unable_on_one_node(folder: Path) -> type[WorkerActor]:
    class Unable(noting(folder)):  # type: ignore[misc]
        @on_concurrency_group("work")
        def carry_out(self, plan: RowPlan, task: Task, attempt: int) -> Iterator[Any]:
            node = self._begun(plan)
            bad = folder / "bad-node"
            if not bad.exists():
                bad.write_text(node)
            if bad.read_text() == node:
                raise RuntimeError("this node's memory is rotten")
            yield from super().carry_out(plan, task, attempt)

    return Unable


def main(case: str, root: str, run_id: str, folder: str) -> None:
    prepare_ray_environment()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        store = LocalStore(Path(root))
        denoise = {"raylet": whose_raylet_dies, "node": unable_on_one_node}[case](Path(folder))
        outcome = render_on_ray(store, open_run(store, run_id), actors={**ACTORS, TaskKind.DENOISE: denoise})
        end = {"published": outcome.published, "failed": [failed.message for failed in outcome.failed]}
        (Path(folder) / "end.json").write_text(json.dumps(end))  # Ray prints to stdout
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
