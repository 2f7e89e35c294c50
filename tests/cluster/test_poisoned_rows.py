"""Rows that cannot be rendered, one of each failure class, among good ones; and workers killed while they commit."""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest
import ray
import torch
from on_ray import wait_until, working_actors
from runs import MakeRun, contents

from magi_ray.cluster.actors import ACTORS, WorkerActor, on_concurrency_group
from magi_ray.cluster.workers import render_on_ray
from magi_ray.errors import FailureClass, StoreUnavailable, Superseded
from magi_ray.events import StepDone, Task, TaskKind
from magi_ray.render.artifacts.latents import load_clean_chunk
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.scheduler import BUDGETS
from magi_ray.render.driving.session import DriveOptions
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.runs.record import Run
from magi_ray.sampling.sampler import Sampler
from magi_ray.storage import keys
from magi_ray.storage.local import LocalStore
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.store import Store

IMAGE = str(Path(__file__).parents[2] / "manifests" / "quickstart-image.png")
# More than any class with a budget may fail.
PREEMPTIONS = 7


@pytest.fixture(scope="module", autouse=True)
def classes_of_this_module(ray_here: None) -> Iterator[None]:
    """Ray sends the workers and stores that are defined here along, since no other process can import this module."""
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)
    yield
    ray.cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture(autouse=True)
def no_worker_is_left(ray_here: None) -> Iterator[None]:
    yield
    wait_until(lambda: not working_actors(), "the workers are gone")


def row(job_id: str, seed: int, **others: Any) -> dict[str, Any]:
    """Two chunks that share no stage with those of another seed."""
    return {"job_id": job_id, "prompt": "sea", "seed": seed, "num_chunks": 2, **others}


def undisturbed(make_run: MakeRun, rows: list[dict[str, Any]]) -> dict[str, bytes]:
    store = MemoryStore()
    run = make_run(store, rows)
    assert not render_locally(store, run).failed
    return contents(store, run)


def of_rows(store: Store, run: Run, job_ids: set[str]) -> dict[str, bytes]:
    """``contents`` of these rows alone: the others have none."""
    found = {f"{job_id}.mp4": store.get(keys.video(run.run_id, job_id)) for job_id in job_ids}
    for job_id in job_ids:
        for chunk in range(run.plans[job_id].timeline.num_chunks):
            found[f"{job_id}/{chunk}"] = load_clean_chunk(store, run.plans[job_id], chunk).numpy().tobytes()
    return found


def table(store: Store, key: str) -> dict[str, dict[str, Any]]:
    return {line["job_id"]: line for line in pq.read_table(io.BytesIO(store.get(key))).to_pylist()}


@dataclass(frozen=True)
class Unreadable(LocalStore):
    """What lies under ``hidden`` can be read by the process ``reader`` alone."""

    hidden: str = ""
    reader: int = 0

    def get(self, key: str) -> bytes:
        if key.startswith(self.hidden) and os.getpid() != self.reader:
            raise StoreUnavailable(f"{key}: the disk does not answer.")
        return super().get(key)


def poisoned_denoising(folder: Path) -> type[WorkerActor]:
    class Poisoned(WorkerActor):
        @on_concurrency_group("work")
        def carry_out(self, plan: RowPlan, task: Task, attempt: int) -> Iterator[Any]:
            with (folder / "attempts").open("a") as attempts:
                attempts.write(f"{plan.job_id}\n")
            before = (folder / "attempts").read_text().splitlines().count(plan.job_id)
            if plan.job_id == "preempted" and before <= PREEMPTIONS:
                raise Superseded("its lease was taken")
            if plan.job_id == "out_of_memory":
                with patch.object(Sampler, "run_stage", too_large):
                    yield from super().carry_out(plan, task, attempt)
                return
            for happened in super().carry_out(plan, task, attempt):
                yield happened
                # With its second forward, lest the stage before be still on its way into the store.
                match happened:
                    case StepDone(job_id="infrastructure", stage=2, step=2):
                        os.abort()

    return Poisoned


def too_large(*_: object) -> Iterator[Any]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB.")
    yield


class PoisonedDecoding(WorkerActor):
    @on_concurrency_group("work")
    def carry_out(self, plan: RowPlan, task: Task, attempt: int) -> Iterator[Any]:
        poison: dict[str, Any] = {
            "code": {"side_effect": RuntimeError("a bug of ours")},
            "nan": {"return_value": torch.full((1, 3, 24, 32, 32), torch.nan)},
            "black": {"return_value": torch.full((1, 3, 24, 32, 32), -1.0)},
        }
        if plan.job_id not in poison:
            yield from super().carry_out(plan, task, attempt)
            return
        with patch("magi_ray.render.tasks.decode_network.decode_tiled", **poison[plan.job_id]):
            yield from super().carry_out(plan, task, attempt)


def test_of_poisoned_rows_of_each_class_exactly_those_fail_each_with_its_reason(
    make_run: MakeRun, tmp_path: Path
) -> None:
    # By job_id: class, task, stage of the row's first failure (its 2 chunks are 5 stages, chunk 0 is clean after 3),
    # and what its message and its worker's log tell.
    expected: dict[str, tuple[FailureClass, TaskKind, int, str, str]] = {
        "infrastructure": (FailureClass.INFRASTRUCTURE, TaskKind.DENOISE, 2, "A worker was lost", "Fatal Python error"),
        "store": (FailureClass.STORE, TaskKind.DECODE, 3, "the disk does not answer", "StoreUnavailable"),
        "out_of_memory": (FailureClass.OUT_OF_MEMORY, TaskKind.DENOISE, 0, "allocate 80.00 GiB", "in too_large"),
        "input": (FailureClass.INPUT, TaskKind.EMBED, 0, "sha256", "Embedding job input failed"),
        "code": (FailureClass.CODE, TaskKind.DECODE, 3, "RuntimeError", "RuntimeError: a bug of ours"),
        "nan": (FailureClass.NUMERIC, TaskKind.DECODE, 3, "NaN", "in require_finite"),
        "black": (FailureClass.NUMERIC, TaskKind.DECODE, 3, "black in every pixel", "in _require_no_black_frame"),
    }
    rows = [row("first", 1), row("preempted", 2)]
    rows += [row(job_id, 10 + number) for number, job_id in enumerate(expected)] + [row("last", 3)]
    [picture] = [one for one in rows if one["job_id"] == "input"]
    picture["image"] = IMAGE
    whole = [one for one in rows if one["job_id"] not in expected]
    root = tmp_path / "store"
    run = make_run(LocalStore(root), rows)
    LocalStore(root).put(keys.media(run.record.media["input"].sha256), b"rotten")
    # The latent of chunk 0 and its commit.
    hidden = keys.commit_folder("stage", run.plans["store"].stage_keys[run.plans["store"].timeline.finishing_stage(0)])
    store = Unreadable(root, hidden=f"{hidden}chunk-", reader=os.getpid())
    actors = {**ACTORS, TaskKind.DENOISE: poisoned_denoising(tmp_path), TaskKind.DECODE: PoisonedDecoding}
    outcome = render_on_ray(store, run, actors=actors)

    assert set(outcome.published) == {"first", "preempted", "last"}
    assert of_rows(store, run, set(outcome.published)) == undisturbed(make_run, whole)
    errors = table(store, keys.run_errors(run.run_id))
    assert set(errors) == {failed.job_id for failed in outcome.failed} == set(expected)
    results = table(store, keys.run_results(run.run_id))
    assert {job_id for job_id, line in results.items() if line["status"] == "done"} == set(outcome.published)
    for job_id, (failure, kind, stage, message, logged) in expected.items():
        line = errors[job_id]
        assert (line["class"], line["task"], line["stage"]) == (failure, kind, stage), line
        budget = BUDGETS[failure]
        assert budget is not None
        assert line["attempts"] == budget + 1, line
        assert message in line["message"]
        host, _, path = line["log"].partition(":")
        assert host == socket.gethostname()
        assert logged in Path(path).read_text(), line
        assert not store.exists(keys.video(run.run_id, job_id))
    attempts = Counter((tmp_path / "attempts").read_text().split())
    assert attempts["preempted"] == PREEMPTIONS + 1
    assert attempts["infrastructure"] == errors["infrastructure"]["attempts"]


def test_a_run_in_which_too_many_rows_fail_is_stopped(make_run: MakeRun, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    bad = [row(f"bad-{number}", number, image=IMAGE, priority=1) for number in range(3)]
    run = make_run(store, [row("good", 9, num_chunks=200), *bad])
    store.put(keys.media(run.record.media["bad-0"].sha256), b"rotten")
    outcome = render_on_ray(store, run, DriveOptions(max_failed_rows=1))
    assert outcome.state == "broken"
    assert not outcome.published
    assert [failed.job_id for failed in outcome.failed] == ["bad-0", "bad-1"]
    results = table(store, keys.run_results(run.run_id))
    assert {job_id: line["status"] for job_id, line in results.items()} == {
        "good": "broken", "bad-0": "failed", "bad-1": "failed", "bad-2": "broken",
    }  # fmt: skip


@dataclass(frozen=True)
class Deadly(LocalStore):
    """Kills whoever creates the first commit of a kind, after its payloads and before the commit."""

    marks: Path = Path()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        kind = next((kind for kind in ("texts", "stages", "segments", "videos") if f"{kind}/" in key), None)
        if kind is not None:
            try:
                (self.marks / kind).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().put_if_absent(key, data)


def test_workers_of_each_kind_killed_between_a_payload_and_its_commit_cost_no_byte(
    make_run: MakeRun, tmp_path: Path
) -> None:
    rows = [row("one", 1)]
    run = make_run(LocalStore(tmp_path / "store"), rows)
    store = Deadly(tmp_path / "store", marks=tmp_path)
    outcome = render_on_ray(store, run)
    assert all((tmp_path / kind).exists() for kind in ("texts", "stages", "segments", "videos"))
    assert outcome.published == ("one",)
    assert contents(store, run) == undisturbed(make_run, rows)
    whole = LocalStore(tmp_path / "store")
    for kind in ("texts", "stages", "segments"):
        folders = Counter(key.rpartition("/")[0] for key in whole.list(f"{kind}/") if "commit.json" not in key)
        assert max(folders.values()) > 1, f"{kind}: there is no payload of the one that was killed"
