"""Promise 1, as strictly as it can be put: killed at any call to the store, and resumed, nobody can tell."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from crashing import CrashingStore, Death
from runs import MakeRun, contents, stage_commits

from magi_ray.render.driving.local import render_locally
from magi_ray.render.runs.record import Run
from magi_ray.settings import Settings, override
from magi_ray.storage.leases import Owner
from magi_ray.storage.memory import MemoryStore

IMAGE = str(Path(__file__).parents[1] / "manifests" / "quickstart-image.png")
ROWS: list[dict[str, Any]] = [
    {"job_id": "text", "schedule": [{"start_chunk": 0, "prompt": "sea"}, {"start_chunk": 2, "prompt": "storm"}],
     "num_chunks": 4},
    {"job_id": "image", "prompt": "hills at dusk", "image": IMAGE, "num_chunks": 4},
    {"job_id": "same", "prompt": "sea", "seed": 1, "num_chunks": 4},
]  # fmt: skip
POINTS_IN_CI = 48


@pytest.fixture
def make_rows(make_run: MakeRun, settings: Settings) -> Any:
    quick = override(settings, {"runtime": {"num_steps": 4}})
    return lambda store: make_run(store, ROWS, settings=quick)


@pytest.fixture(scope="session")
def dead_pid() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(timeout=60)
    return ended.pid


def committed(store: MemoryStore) -> dict[str, bytes]:
    return {key: store.get(key) for key in store.list("") if not key.startswith(("runs/", "probes/"))}


def test_1_killed_at_any_call_to_the_store_and_resumed_a_run_has_the_same_bytes(
    make_rows: Any, dead_pid: int, request: pytest.FixtureRequest
) -> None:
    undisturbed = MemoryStore()
    run: Run = make_rows(undisturbed)
    watched = CrashingStore(undisturbed)
    assert not render_locally(watched, run).failed
    expected, total = contents(undisturbed, run), len(watched.calls)
    everywhere = request.config.getoption("--all-crash-points")
    points = range(0, total, 1 if everywhere else max(1, total // POINTS_IN_CI))
    stages = sum(plan.timeline.num_stages for plan in run.plans.values())
    deaths = 0
    # What those who come after are to think of this process: that it is gone.
    here = Owner.here("driver")
    dead = patch.object(Owner, "here", lambda name: here.model_copy(update={"name": name, "pid": dead_pid}))
    for number, at in enumerate(points):
        for lands in (False, True) if everywhere else (bool(number % 2),):
            store = MemoryStore()
            make_rows(store)
            crashing = CrashingStore(store, at, lands=lands)
            with suppress(Death), dead:
                render_locally(crashing, run)
            deaths += crashing.dead  # how often progress is noted, and so how many calls there are, is up to the clock
            where = f"call {at} ({crashing.calls[-1]}), which {'landed' if lands else 'did not land'}"
            kept, reused = committed(store), len(stage_commits(store))
            outcome = render_locally(store, run)
            assert not outcome.failed, where
            assert contents(store, run) == expected, where
            assert {key: store.get(key) for key in kept} == kept, f"something committed was altered or lost: {where}"
            assert outcome.stages_rendered == (0 if outcome.already_published == len(ROWS) else stages - reused), where
    assert deaths >= min(40, total)
