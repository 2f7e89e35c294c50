"""What a run leaves behind for people."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow.parquet as pq
import pytest
from runs import MakeRun, by_progress

from magi_ray.events import Inspected, RowInventory, StepDone, Task, TaskDone, TaskKind
from magi_ray.render.artifacts.provenance import device_name
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.progress import Phase, RunProgress
from magi_ray.render.driving.reports import RunReports, read_progress
from magi_ray.render.driving.scheduler import RunState
from magi_ray.render.runs.record import Run
from magi_ray.storage import keys
from magi_ray.storage.local import LocalStore
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.records import read_commit
from magi_ray.storage.store import Store
from magi_ray.system import System

ROWS = [
    {"job_id": "a", "prompt": "sea", "num_chunks": 1, "tags": {"shot": "1"}, "scene": "harbour", "take": 3},
    {"job_id": "b", "prompt": "sea", "num_chunks": 2, "scene": None, "take": 4},
]


def results(store: Store, run: Run) -> list[dict[str, Any]]:
    return list(pq.read_table(io.BytesIO(store.get(keys.run_results(run.run_id)))).to_pylist())


def test_the_results_have_what_a_row_asked_for_and_what_became_of_it(make_run: MakeRun, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "my store")
    rows = [
        {"job_id": "a", "prompt": "sea", "num_chunks": 1, "tags": {"z": "1", "b": "2"}, "scene": "harbour", "seed": 7,
         "sha256": "mine", "fps": 12},
        {"job_id": "b", "schedule": [{"start_chunk": 0, "prompt": "hills"}], "num_chunks": 2, "scene": None},
    ]  # fmt: skip
    run = make_run(store, rows)
    render_locally(store, run)
    first, second = results(store, run)
    assert (first["prompt"], second["prompt"]) == ("sea", None)
    assert [entry["prompt"] for entry in second["schedule"]] == ["hills"]
    assert (first["tags"], second["tags"]) == ([("z", "1"), ("b", "2")], None), "as they came in, in their order"
    assert (first["scene"], first["sha256_"], second["scene"], second["sha256_"]) == ("harbour", "mine", None, None)
    whole = {"status": "done", "seed": 7, "frames": 24, "fps": 12, "width": 32, "height": 32, "duration_s": 2.0}
    assert first | whole == first
    data = Path(unquote(urlsplit(first["video"]).path)).read_bytes()
    assert first["video"].startswith("file:///")
    assert (first["sha256"], len(data)) == (hashlib.sha256(data).hexdigest(), store_size(store, run, "a"))
    steps = [plan.timeline.num_stages * plan.forwards_per_stage for plan in run.plans.values()]
    assert [(row["forwards_spent"], row["forwards_reused"]) for row in (first, second)] == [(s, 0) for s in steps]


def store_size(store: Store, run: Run, job_id: str) -> int:
    [entry] = store.entries(keys.video(run.run_id, job_id))
    return entry.size


def test_what_a_video_cost_is_the_sum_over_its_drivers_and_what_others_computed_is_reused(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, ROWS)

    def interrupt(progress: RunProgress) -> None:
        if progress.videos["b"].stages_done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_locally(store, run, observers=by_progress(interrupt))
    render_locally(store, run)
    _, row = results(store, run)
    stages = run.plans["b"].timeline.num_stages
    assert row["stages_reused"] > 0, "it was not resumed; the test shows nothing"
    assert (row["forwards_spent"], row["forwards_reused"]) == (stages * 2, 0)
    commits = [read_commit(store, "stage", key) for key in run.plans["b"].stage_keys]
    denoising_s = sum(found.provenance["seconds"] for found in commits if found)
    assert row["render_seconds"] > denoising_s > 0
    assert {found.provenance["device"] for found in commits if found} == {device_name("cpu")}

    # The same video in another run costs it nothing; a longer one costs the rest.
    other = make_run(store, [ROWS[1] | {"scene": "another"}, ROWS[1] | {"job_id": "longer", "num_chunks": 3}])
    render_locally(store, other)
    again, longer = results(store, other)
    assert (again["forwards_spent"], again["forwards_reused"], again["render_seconds"]) == (0, stages * 2, 0.0)
    assert again["sha256"] == row["sha256"]
    assert longer["forwards_spent"] + longer["forwards_reused"] == (stages + 1) * 2
    # Closing a run that is done says the same again.
    before = results(store, run)
    render_locally(store, run)
    volatile = {"stages_reused": None}
    assert [found | volatile for found in results(store, run)] == [found | volatile for found in before]


def test_the_record_beside_a_video_says_what_made_it(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, ROWS)
    render_locally(store, run)
    record = json.loads(store.get(keys.video_record(run.run_id, "b")))
    assert record["stage_keys"] == list(run.plans["b"].stage_keys)
    assert record["captions"] == ["sea", "sea"]
    assert record["bytes"] == len(store.get(keys.video(run.run_id, "b")))
    assert record["settings"]["runtime"]["num_steps"] == 8
    assert record["weights"]["dit"] == run.record.digests.dit


def test_a_run_that_was_interrupted_says_at_once_that_it_is_not_going_on(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, ROWS)

    def interrupt(progress: RunProgress) -> None:
        if progress.videos["b"].step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_locally(store, run, observers=by_progress(interrupt))
    noted = read_progress(store, run.run_id)
    assert noted is not None
    assert noted.state == "stopped"
    assert noted.progress.videos["b"].phase is Phase.RENDERING
    render_locally(store, run)
    noted = read_progress(store, run.run_id)
    assert noted is not None
    assert (noted.state, noted.progress.count(Phase.DONE)) == ("done", 2)


def test_every_step_is_seen(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, ROWS)
    seen: list[int] = []

    def watch(progress: RunProgress) -> None:
        done = progress.videos["b"].steps_done
        if not seen or done != seen[-1]:
            seen.append(done)

    render_locally(store, run, observers=by_progress(watch))
    plan = run.plans["b"]
    assert seen == list(range(plan.timeline.num_stages * plan.forwards_per_stage + 1))


def test_writing_progress_takes_no_more_than_a_share_of_the_time(make_run: MakeRun) -> None:
    now = seconds = 0.0
    written: list[float] = []

    class Slow(MemoryStore):
        def put(self, key: str, data: bytes) -> None:
            nonlocal now
            if key.endswith("progress.json"):
                written.append(now)
                now += seconds
            super().put(key, data)

    store = Slow()
    run = make_run(store, ROWS)
    rows = [RowInventory(job_id=job_id, priority=0, num_stages=1, num_chunks=1) for job_id in run.plans]

    class OtherTime(System):
        def clock(self) -> float:
            return now

    for takes, at_most in ((0.01, 100), (2.0, 6), (30.0, 2)):
        now, seconds, reports = 0.0, takes, RunReports(store, run, rows, earlier={}, system=OtherTime())
        written.clear()
        while now < 100:
            reports.write_if_due()
            now += 0.25
        assert at_most * 0.7 <= len(written) <= at_most


def test_what_a_driver_measured_outlasts_drivers_that_had_nothing_to_denoise(make_run: MakeRun) -> None:
    now = 0.0

    class OtherTime(System):
        def clock(self) -> float:
            return now

    store = MemoryStore()
    run = make_run(store, ROWS)
    rows = [RowInventory(job_id=job_id, priority=0, num_stages=5, num_chunks=2) for job_id in run.plans]
    reports = RunReports(store, run, rows, earlier={}, encoder="ffmpeg 7, x264 164", system=OtherTime())
    for step in (1, 2):
        now += 30
        reports.note(StepDone(job_id="b", stage=0, step=step, steps=2, device="H200"))
    content = json.loads(store.get(keys.run_progress(run.run_id)))
    # Of 2 chunks in a window of 4 an eighth was computed in 30 s, and 15/8 + 1 are left.
    numbers = content["elapsed_s"], content["left_s"], content["video_seconds_per_hour"]
    assert numbers == (60.0, round(30 * 8 * (2 + 1 - 2 / 8), 1), 15.0)
    measured = read_progress(store, run.run_id)
    assert measured is not None
    assert [(speed.device, speed.chunks, speed.seconds) for speed in measured.speeds] == [("H200", 1 / 8, 30.0)]

    now += 1000
    RunReports(store, run, rows, earlier={}, system=OtherTime()).close(RunState.DONE)
    after = read_progress(store, run.run_id)
    assert after is not None
    assert (after.speeds, after.encoder) == (measured.speeds, "ffmpeg 7, x264 164")
    assert after.progress.times == measured.progress.times


def test_chunks_that_turned_out_lost_are_not_counted_twice() -> None:
    row = RowInventory(job_id="a", priority=0, num_stages=5, num_chunks=2)
    progress = RunProgress.of("run", [row], {"a": 4})
    chunks = [
        TaskDone(worker="d", task=Task(kind=TaskKind.DECODE, job_id="a", index=chunk), attempt=chunk)
        for chunk in (0, 1)
    ]
    for happened in (*chunks, Inspected(row=replace(row, segments_done=frozenset({0}))), chunks[1], chunks[1]):
        progress.note(happened)
    assert progress.videos["a"].chunks_done == 2
    progress.note(Inspected(row=row))
    assert progress.videos["a"].chunks_done == 0
