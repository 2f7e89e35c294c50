"""Runs that earlier versions left behind are resumed by this one; see golden_runs/make.py.

If one of these fails, the change that made it fail would strand the runs of users: keep reading the older format, and
keep the keys of what exists. The golden runs themselves are never made again.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import av
import pytest

from magi_ray.media.encoder import encoder_identity, find_ffmpeg
from magi_ray.render.driving.local import render_locally
from magi_ray.render.runs.record import all_runs, open_run
from magi_ray.render.upkeep.gc import garbage
from magi_ray.render.upkeep.verify import verify
from magi_ray.storage import keys
from magi_ray.storage.local import LocalStore

GOLDEN = Path(__file__).parents[1] / "golden_runs"
VERSIONS = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "expected.json").is_file())


def test_the_golden_runs_are_there_and_small() -> None:
    assert {"v0", "v1", "v2", "v3"} <= set(VERSIONS)
    for version in VERSIONS:
        assert sum(path.stat().st_size for path in (GOLDEN / version).rglob("*") if path.is_file()) < 1_000_000


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_of_an_earlier_version_is_resumed_and_nothing_of_it_is_rendered_again(
    version: str, tmp_path: Path, tiny_weights: Path
) -> None:
    expected = json.loads((GOLDEN / version / "expected.json").read_text())
    shutil.copytree(GOLDEN / version / "store", tmp_path / "store")
    store = LocalStore(tmp_path / "store")
    committed = {key: store.get(key) for key in store.list("") if not key.startswith(keys.RUNS)}
    assert verify(store).damages == []

    assert all_runs(store) == ([expected["run_id"]], {})
    run = open_run(store, expected["run_id"], weights=tiny_weights)
    assert {job_id: list(plan.stage_keys) for job_id, plan in run.plans.items()} == expected["stage_keys"]
    assert set(expected["committed"]) <= {key for plan in run.plans.values() for key in plan.stage_keys}
    video = store.get(keys.video(run.run_id, "done"))

    outcome = render_locally(store, run)
    assert (outcome.published, outcome.failed, outcome.already_published) == (("done", "mid"), (), 1)
    stages = sum(map(len, expected["stage_keys"].values()))
    assert (outcome.stages_reused, outcome.stages_rendered) == (
        len(expected["committed"]),
        stages - len(expected["committed"]),
    )
    assert 0 < outcome.stages_rendered < stages
    assert {key: store.get(key) for key in committed} == committed
    assert store.get(keys.video(run.run_id, "done")) == video
    for job_id, frames in expected["frames"].items():
        with av.open(str(store.root / keys.video(run.run_id, job_id))) as container:
            assert sum(1 for _ in container.decode(video=0)) == frames
            assert len(container.streams) == 1
    assert verify(store).damages == []
    assert {item.reason for item in garbage(store, min_age_s=0)} <= {"left behind by a check of the store"}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_lost_video_of_an_earlier_version_is_joined_again_to_the_same_bytes(
    version: str, tmp_path: Path, tiny_weights: Path
) -> None:
    shutil.copytree(GOLDEN / version / "store", tmp_path / "store")
    store = LocalStore(tmp_path / "store")
    [run_id], _ = all_runs(store)
    run = open_run(store, run_id, weights=tiny_weights)
    only = replace(run, plans={"done": run.plans["done"]}, manifest=replace(run.manifest, rows=run.manifest.rows[:1]))
    record = json.loads(store.get(keys.video_record(run_id, "done")))
    if record["encoder"] != encoder_identity(find_ffmpeg()):
        pytest.skip(f"made with {record['encoder']}")
    video = store.get(keys.video(run_id, "done"))
    store.delete(keys.video(run_id, "done"))
    assert render_locally(store, only).stages_rendered == 0
    assert store.get(keys.video(run_id, "done")) == video
