"""A submission that is interrupted, terminated or killed leaves nothing in the way, and typed again it goes on."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from crashing import CrashingStore, Death
from typed import Command, wait_until

from magi_ray.manifest import Defaults, manifest_of, write_manifest
from magi_ray.render.runs.record import all_runs, open_run
from magi_ray.render.runs.submission import create, prepare
from magi_ray.render.upkeep.gc import collect, garbage
from magi_ray.render.upkeep.verify import verify
from magi_ray.settings import Settings
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.probe import check_store

IMAGE = Path(__file__).parents[1] / "manifests" / "quickstart-image.png"
ROWS: list[dict[str, Any]] = [{"job_id": "a", "prompt": "sea", "image": str(IMAGE), "num_chunks": 1}]


def test_killed_at_any_call_to_the_store_a_submission_leaves_no_broken_run_and_goes_on(settings: Settings) -> None:
    run, files = prepare(manifest_of(ROWS, Defaults.of(settings), base=Path("/")), name="m.parquet", settings=settings)
    watched = CrashingStore(MemoryStore())
    check_store(watched)
    probing = len(watched.calls)
    create(watched, run, files)
    # The calls of the check one in nine, those that write the run all of them.
    for at in [*range(0, probing, 9), *range(probing, len(watched.calls))]:
        for lands in (False, True):
            store = MemoryStore()
            crashing = CrashingStore(store, at, lands=lands)
            with suppress(Death):
                check_store(crashing)
                create(crashing, run, files)
            assert crashing.dead
            where = f"call {at} ({crashing.calls[-1]}), lands: {lands}"
            readable, damaged = all_runs(store)
            assert (damaged, set(readable) <= {run.run_id}) == ({}, True), where
            if readable:
                assert open_run(store, run.run_id).plans == run.plans, where
            collect(store, garbage(store, min_age_s=0, watch_s=0))
            check_store(store)
            create(store, run, files)
            assert open_run(store, run.run_id).plans == run.plans, where
            assert verify(store).damages == [], where
            assert [*garbage(store, min_age_s=0, watch_s=0)] == [], where


@pytest.fixture
def here(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "magi-tiny").symlink_to(tiny_weights)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("MAGI_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    write_manifest([{"job_id": "a", "prompt": "sea", "num_chunks": 1}], tmp_path / "m.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("at", "number"), [("the check of the store", signal.SIGTERM), ("the background process", signal.SIGKILL)]
)
def test_a_submission_that_gets_a_signal_leaves_nothing_and_typed_again_it_goes_on(
    at: str, number: signal.Signals, here: Path
) -> None:
    words = "submit", "m.parquet", "--local"
    command = Command(here, *words)
    try:
        probes = here / "magi-ray-store" / "probes"
        wait_until(lambda: command.driver() if "process" in at else probes.exists(), at, within_s=120)
        os.kill(command.process.pid, number)
        command.process.wait(120)
        if number == signal.SIGTERM:
            assert command.process.returncode == 130, command.stderr
            assert not [path for path in probes.rglob("*") if path.is_file()]
        if "process" in at:
            # It outlives the terminal that it was started from; what was left there is told.
            wait_until(command.has_left_nothing, "the background process is done", within_s=240)
        assert command.has_left_nothing()
        assert not list((here / "temporary").iterdir())
        again = Command(here, *words)
        code, videos = again.end()
        assert code == 0, again.stderr
        assert [Path(line).name for line in videos.split()] == ["a.mp4"]
        wait_until(again.has_left_nothing, "nothing is left running")
    finally:
        command.clean_up()
