"""What a run leaves behind for people."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from runs import MakeRun, by_progress

from magi_ray.events import Inspected, RowInventory, Task, TaskDone, TaskKind
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.progress import Phase, RunProgress
from magi_ray.render.driving.reports import RunReports, read_progress
from magi_ray.storage import keys
from magi_ray.storage.memory import MemoryStore
from magi_ray.system import System

ROWS = [
    {"job_id": "a", "prompt": "sea", "num_chunks": 1, "tags": {"shot": "1"}, "scene": "harbour", "take": 3},
    {"job_id": "b", "prompt": "sea", "num_chunks": 2, "scene": None, "take": 4},
]


def test_unknown_columns_and_tags_travel_into_the_results(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, ROWS)
    render_locally(store, run)
    first, second = pq.read_table(io.BytesIO(store.get(keys.run_results(run.run_id)))).to_pylist()
    assert (first["scene"], first["take"], second["scene"], second["take"]) == ("harbour", 3, None, 4)
    assert json.loads(first["tags"]) == {"shot": "1"}
    assert (first["status"], first["frames"], first["duration_s"]) == ("done", 24, 1.0)
    assert store.exists(second["video"])


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
