"""A run on Ray whose store is a bucket of a real S3 server.

How workers come to the credentials: `magi-ray` starts Ray itself, and Ray's processes inherit the environment of who
starts them. Nothing of it travels through Ray, which would show a secret in its dashboard and keep it in its tables.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from magi_ray.cluster.driver import render_on_ray
from on_ray import SMALL, wait_until
from rgw import Rgw
from runs import MakeRun, contents, stage_commits
from typed import Command

from magi_ray.errors import StoreDenied
from magi_ray.manifest import write_manifest
from magi_ray.render.driving.local import render_locally
from magi_ray.render.runs.record import create, prepare
from magi_ray.settings import preset
from magi_ray.storage import keys
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.opening import open_store

ROWS: list[dict[str, Any]] = [
    {"job_id": "one", "prompt": "sea", "num_chunks": 10, **SMALL},
    {"job_id": "two", "prompt": "dusk", "num_chunks": 4, **SMALL},
]


def test_a_worker_and_the_server_killed_in_mid_run_cost_only_time(
    rgw: Rgw, s3_address: str, tiny_weights: Path, tmp_path: Path
) -> None:
    write_manifest(ROWS, tmp_path / "m.parquet")
    data, settings = (tmp_path / "m.parquet").read_bytes(), preset("magi-tiny", weights=tiny_weights)
    run, files = prepare(data, name="m.parquet", base=tmp_path, settings=settings)
    memory, store = MemoryStore(), open_store(s3_address)
    create(memory, run, files)
    create(store, run, files)
    render_locally(memory, run)

    drive = Command(tmp_path, "drive", run.run_id, "--store", s3_address, "--no-dashboard")
    try:
        wait_until(lambda: len(stage_commits(store)) >= 3, "the first stages are committed", within_s=120)
        [worker] = drive.processes("ray::DenoiseWorker")
        worker.kill()
        before = stage_commits(store)
        wait_until(lambda: len(stage_commits(store)) > len(before), "another worker goes on", within_s=120)
        before = stage_commits(store)
        rgw.kill_gateway()
        time.sleep(3)
        rgw.start()
        code, stdout = drive.end()
    finally:
        drive.clean_up()
    assert code == 0, drive.stderr
    videos = [f"{s3_address}/{keys.video(run.run_id, job_id)}" for job_id in ("one", "two")]
    assert stdout.splitlines() == videos
    assert len(before) < sum(plan.timeline.num_stages for plan in run.plans.values())
    assert before.items() <= stage_commits(store).items()
    assert contents(store, run) == contents(memory, run)
    wait_until(drive.has_left_nothing, "Ray's processes are gone")


def test_workers_that_may_not_use_the_bucket_end_the_run_at_once_with_that_reason(
    ray_here: None, make_run: MakeRun, s3_address: str
) -> None:
    """Ray has been started without the environment in which this test finds the bucket."""
    run = make_run(open_store(s3_address), ROWS)
    with pytest.raises(StoreDenied, match="credentials") as caught:
        render_on_ray(open_store(s3_address), run)
    assert "on every machine of the run" in caught.value.remedy
