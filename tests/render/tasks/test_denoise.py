"""The denoiser's body with a network that computes nothing: what it commits and reports, and in which order."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Generator
from typing import Any

import pytest
from runs import MakeRun

from magi_ray.errors import StoreError
from magi_ray.events import StageCommitted, StepDone
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.tasks.denoise import COMMIT_DEADLINE_S, Denoiser, Pack, RunStage
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.records import read_commit
from magi_ray.system import System


class Background:
    """Work that is done when it is asked for, or never."""

    def __init__(self, system: Machine, work: Callable[[], Any]) -> None:
        self._system, self._work = system, work

    def result(self, within_s: float) -> Any:
        self._system.log.append("wait")
        if self._system.hangs:
            raise TimeoutError(within_s)
        return self._work()


class Machine(System):
    """A clock that only networks move, and background work that waits."""

    def __init__(self, log: list[Any], *, hangs: bool = False) -> None:
        self.now, self.log, self.hangs = 0.0, log, hangs

    def clock(self) -> float:
        return self.now

    def start(self, work: Callable[[], Any], *, name: str) -> Any:
        self.log.append("write")
        return Background(self, work)


class Network:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def begin_video(self, plan: RowPlan, first_stage: int) -> RunStage:
        self._machine.log.append(f"begin {first_stage}")
        self._steps = plan.forwards_per_stage
        return self.run_stage

    def run_stage(self, stage: int) -> Generator[None, None, Pack]:
        for step in range(self._steps):
            self._machine.now += 1 + step
            self._machine.log.append(f"forward {stage}.{step}")
            yield
        return lambda: {"state": b"%d" % stage, "chunk": b"clean"}


@pytest.fixture
def plan(make_run: MakeRun) -> RowPlan:
    run = make_run(MemoryStore(), [{"job_id": "sea", "prompt": "sea", "num_chunks": 2, "num_steps": 8}])
    return run.plans["sea"]


def carry_out(store: MemoryStore, plan: RowPlan, first_stage: int, **machine: Any) -> list[Any]:
    """Everything that happens, in order: what the network and the machine did, and what was reported."""
    log: list[Any] = []
    system = Machine(log, **machine)
    for happened in Denoiser(store, Network(system).begin_video, system=system).carry_out(plan, first_stage):
        log.append((type(happened).__name__, happened.stage, happened.seconds))
    return log


def test_a_stage_is_written_beside_the_first_forward_of_the_next_and_reported_behind_it(plan: RowPlan) -> None:
    store = MemoryStore()
    log = carry_out(store, plan, 3)
    assert plan.timeline.num_stages == 5
    assert log == [
        "begin 3",
        *("forward 3.0", ("StepDone", 3, 1.0), "forward 3.1", ("StepDone", 3, 2.0), "write"),
        *("forward 4.0", ("StepDone", 4, 1.0), "wait", ("StageCommitted", 3, 3.0)),
        *("forward 4.1", ("StepDone", 4, 2.0), "write", "wait", ("StageCommitted", 4, 3.0)),
    ]
    for stage in (3, 4):
        commit = read_commit(store, "stage", plan.stage_keys[stage])
        assert commit is not None
        assert set(commit.payloads) == {"state", "chunk"}


def test_a_step_says_which_of_how_many_it_is_and_a_stage_which_chunk_it_completed(plan: RowPlan) -> None:
    system = Machine([])
    happenings = list(Denoiser(MemoryStore(), Network(system).begin_video, system=system).carry_out(plan, 4))
    assert happenings == [
        StepDone(job_id="sea", stage=4, step=1, steps=2, seconds=1.0),
        StepDone(job_id="sea", stage=4, step=2, steps=2, seconds=2.0),
        StageCommitted(job_id="sea", stage=4, chunk=1, seconds=3.0),
    ]


def test_a_stage_that_is_there_is_reported_and_not_computed(plan: RowPlan) -> None:
    store = MemoryStore()
    carry_out(store, plan, 3)
    for key in [key for key in store.list("stages/") if plan.stage_keys[3] in key]:
        store.delete(key)
    assert carry_out(store, plan, 3) == [
        "begin 3",
        *("forward 3.0", ("StepDone", 3, 1.0), "forward 3.1", ("StepDone", 3, 2.0), "write"),
        *("wait", ("StageCommitted", 3, 3.0), ("StageCommitted", 4, 0.0)),
    ]
    assert carry_out(store, plan, 3) == [("StageCommitted", 3, 0.0), ("StageCommitted", 4, 0.0)]


def test_a_store_that_does_not_answer_ends_the_task(plan: RowPlan) -> None:
    with pytest.raises(StoreError, match=f"Stage 4 of job sea was not written in {COMMIT_DEADLINE_S:.0f} s"):
        carry_out(MemoryStore(), plan, 4, hangs=True)


def test_the_body_needs_no_torch() -> None:
    code = "import sys, magi_ray.render.tasks.denoise; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
