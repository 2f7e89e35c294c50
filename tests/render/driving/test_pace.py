"""How fast a driver is and how long the rest takes, with a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from runs import MakeRun

from magi_ray.events import RowInventory, StageCommitted, StepDone
from magi_ray.render.driving.pace import Pace, Speed, seconds_per_chunk
from magi_ray.render.driving.progress import Phase, RunProgress, Times
from magi_ray.render.runs.record import Run
from magi_ray.storage.memory import MemoryStore

SHORT, LONG = {"job_id": "short", "prompt": "sea", "num_chunks": 1}, {"job_id": "long", "prompt": "x", "num_chunks": 50}


class Driver:
    """Computes one stage after the other; a stage takes ``seconds(row, chunks in flight)``."""

    def __init__(self, run: Run, *, done: Mapping[str, int] = {}) -> None:
        self.now, self.run = 1000.0, run
        rows = [
            RowInventory(job_id=job_id, priority=0, num_stages=plan.timeline.num_stages,
                         num_chunks=plan.timeline.num_chunks, stages_done=done.get(job_id, 0))
            for job_id, plan in run.plans.items()
        ]  # fmt: skip
        self.progress = RunProgress.of(run.run_id, rows, {job: p.forwards_per_stage for job, p in run.plans.items()})
        self.pace = Pace(run.plans, lambda: self.now)

    def denoise(self, job_id: str, stages: Sequence[int], *, seconds: Callable[[int], float]) -> None:
        plan = self.run.plans[job_id]
        steps = plan.forwards_per_stage
        for stage in stages:
            for step in range(1, steps + 1):
                self.now += seconds(len(plan.timeline.window(stage))) / steps
                self.note(StepDone(job_id=job_id, stage=stage, step=step, steps=steps, device="H200"))
            self.note(StageCommitted(job_id=job_id, stage=stage, chunk=None))
        if stages and stages[-1] == plan.timeline.num_stages - 1:
            self.progress.videos[job_id].phase = Phase.DONE

    def note(self, event: StepDone | StageCommitted) -> None:
        self.progress.note(event)
        self.pace.note(event)

    @property
    def times(self) -> Times:
        return self.pace.times(self.progress)


def by_chunks(chunks: int) -> float:
    """A chunk in flight takes ten seconds a stage, so a clean chunk takes 40."""
    return 10.0 * chunks


@pytest.fixture
def of_rows(make_run: MakeRun) -> Callable[..., Run]:
    return lambda *rows: make_run(MemoryStore(), rows)


def test_nothing_is_said_of_speed_before_something_was_measured(of_rows: Callable[..., Run]) -> None:
    driver = Driver(of_rows(SHORT))
    driver.now += 300  # weights load
    assert driver.times == Times(elapsed_s=300)
    driver.note(StepDone(job_id="short", stage=0, step=1, steps=2))
    driver.now += 0.5  # a bunch of events says nothing
    driver.note(StepDone(job_id="short", stage=0, step=2, steps=2))
    assert driver.times == Times(elapsed_s=300.5)
    assert driver.pace.speeds() == []


def test_the_time_left_comes_true_with_rows_of_different_lengths(of_rows: Callable[..., Run]) -> None:
    driver = Driver(of_rows(SHORT, LONG, LONG | {"job_id": "fast", "fps": 48}))
    driver.denoise("short", range(4), seconds=by_chunks)
    # 24 frames at 24 fps each 40 s.
    assert driver.times.video_seconds_per_hour == pytest.approx(90)
    assert driver.times.left_s == pytest.approx(100 * 40)
    driver.denoise("long", range(53), seconds=by_chunks)
    assert driver.times.left_s == pytest.approx(50 * 40)
    driver.denoise("fast", range(53), seconds=by_chunks)
    assert (driver.times.left_s, driver.times.elapsed_s) == (0, pytest.approx(101 * 40))


def test_a_larger_row_is_thought_to_cost_more_until_it_was_measured(of_rows: Callable[..., Run]) -> None:
    driver = Driver(of_rows(SHORT, LONG | {"width": 64, "num_steps": 16}))
    driver.denoise("short", range(4), seconds=by_chunks)
    assert driver.times.left_s == pytest.approx(50 * 40 * 4)
    driver.denoise("long", range(4), seconds=lambda chunks: 100.0 * chunks)
    assert driver.times.left_s == pytest.approx(47.5 * 400)


def test_stages_that_were_there_count_neither_as_speed_nor_as_left(of_rows: Callable[..., Run]) -> None:
    driver = Driver(of_rows(LONG), done={"long": 43})
    for stage in (43, 44):  # another run has computed these
        driver.note(StageCommitted(job_id="long", stage=stage, chunk=stage - 3))
    assert driver.times.left_s is None
    driver.denoise("long", (45, 46), seconds=by_chunks)
    assert driver.times.video_seconds_per_hour == pytest.approx(90)
    # Chunk 43 is clean; of 44, 45 and 46 are one, two and three stages left, of 47 to 49 all four.
    assert driver.times.left_s == pytest.approx((1 + 2 + 3 + 12) * 10)


def test_failed_rows_are_not_waited_for(of_rows: Callable[..., Run]) -> None:
    driver = Driver(of_rows(SHORT, LONG))
    driver.denoise("short", range(4), seconds=by_chunks)
    driver.progress.videos["long"].phase = Phase.FAILED
    assert driver.times.left_s == 0


def test_progress_keeps_the_times_as_numbers(of_rows: Callable[..., Run]) -> None:
    run = of_rows(SHORT)
    progress = Driver(run).progress
    progress.times = Times(elapsed_s=12.345, left_s=None, video_seconds_per_hour=90.04)
    content: dict[str, Any] = progress.as_json()
    assert (content["elapsed_s"], content["left_s"], content["video_seconds_per_hour"]) == (12.3, None, 90.0)
    assert RunProgress.from_json(content).times == Times(elapsed_s=12.3, video_seconds_per_hour=90.0)
    old = {name: value for name, value in content.items() if not name.endswith(("_s", "_per_hour"))}
    assert RunProgress.from_json(old).times == Times()


def test_speeds_hold_for_the_same_settings_on_the_same_device_only(of_rows: Callable[..., Run]) -> None:
    first = Driver(of_rows(SHORT, LONG | {"width": 64}))
    first.denoise("short", range(4), seconds=by_chunks)
    first.denoise("long", range(2), seconds=by_chunks)
    small, large = first.pace.speeds()
    again = Driver(of_rows(SHORT | {"prompt": "other", "seed": 3, "fps": 10, "num_chunks": 9}))
    again.denoise("short", range(2), seconds=by_chunks)
    assert again.pace.speeds()[0].settings == small.settings != large.settings
    speeds = [small, large, Speed(settings=small.settings, device="H200", chunks=2, seconds=20)]
    assert small.chunks == pytest.approx(7 / 8), "the first step loads and compiles"
    assert seconds_per_chunk(speeds, small.settings, "H200") == pytest.approx((35 + 20) / (7 / 8 + 2))
    assert seconds_per_chunk(speeds, small.settings, "A100") is None
    assert seconds_per_chunk([], small.settings, "H200") is None
