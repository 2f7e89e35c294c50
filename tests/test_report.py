from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from magi_ray.events import StepDone
from magi_ray.render.driving.progress import Phase, RunProgress, Times, VideoProgress
from magi_ray.report import (
    LINE_INTERVAL_S,
    MAX_BARS,
    bars,
    describe,
    describe_times,
    follow,
    in_time,
    manifest_table,
    status_table,
    summary,
)


def video(job_id: str, phase: Phase = Phase.WAITING, **changes: object) -> VideoProgress:
    values: dict[str, object] = {
        "job_id": job_id, "phase": phase, "stages": 5, "stages_done": 0, "steps": 4, "chunks": 2,
        "chunks_done": 0,
    }  # fmt: skip
    return VideoProgress(**(values | changes))  # type: ignore[arg-type]


def progress_of(*videos: VideoProgress) -> RunProgress:
    return RunProgress("run-1", {video.job_id: video for video in videos})


def drawn(what: object, *, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(what)
    return captured.get().splitlines()


def coloured(progress: RunProgress) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor")
    with console.capture() as captured:
        console.print(bars(progress))
    return captured.get()


def test_a_bar_moves_with_every_step() -> None:
    progress = progress_of(video("a", Phase.RENDERING))
    seen = [coloured(progress)]
    for step in (1, 2, 3, 4):
        progress.note(StepDone(job_id="a", stage=0, step=step, steps=4))
        seen.append(coloured(progress))
    # The bar alone, without the percentage behind it.
    assert len({re.split(r"\d+%", picture)[0] for picture in seen}) == 5


@pytest.mark.parametrize("width", [40, 80, 200])
def test_every_video_has_one_line_however_narrow_the_terminal(width: int) -> None:
    progress = progress_of(
        video("a-video-with-a-name-that-is-longer-than-anybody-would-want-to-type", Phase.RENDERING, stages_done=2),
        video("b", Phase.FAILED, message="[red] is no markup[/x]\nsecond line"),
        video("c", Phase.DONE),
    )
    lines = drawn(bars(progress, width=width), width=width)
    assert len(lines) == 4
    assert max(map(len, lines)) <= width
    assert lines[-1].strip() == "1 of 3 videos done, 1 failed"
    if width == 200:
        assert "failed: [red] is no markup[/x]" in lines[1]


def test_a_large_run_shows_the_videos_in_work_and_counts_the_rest() -> None:
    videos = [video(f"v{n}") for n in range(100)]
    videos[70].phase, videos[71].phase = Phase.RENDERING, Phase.FAILED
    lines = drawn(bars(progress_of(*videos)))
    assert [line.split()[0] for line in lines[:-1]] == ["v70", "v71"]
    assert lines[-1].strip() == "0 of 100 videos done, 98 waiting, 1 failed"
    for one in videos:
        one.phase = Phase.RENDERING
    assert len(drawn(bars(progress_of(*videos)))) == MAX_BARS + 1
    assert len(drawn(bars(progress_of(*videos), height=8))) == 7, "a low terminal is not overrun"


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (video("a"), "waiting"),
        (video("a", stages_done=3), "waiting, 3/5 stages from the store"),
        (video("a", Phase.RENDERING, stages_done=1, step=3), " 35%  stage 2/5 step 3/4, 0/2 chunks"),
        (video("a", Phase.RENDERING, stages_done=5, chunks_done=1), "100%  1/2 chunks decoded"),
        (video("a", Phase.DONE, chunks=1), "done, 1 chunk"),
        (video("a", Phase.FAILED), "failed: no reason given"),
    ],
)
def test_where_a_video_is_takes_a_few_words(one: VideoProgress, words: str) -> None:
    assert describe(one) == words


def test_without_a_terminal_there_is_a_line_per_interval_and_few_while_nothing_changes() -> None:
    now = 0.0
    out = io.StringIO()
    progress = progress_of(video("a", Phase.RENDERING), video("b"))
    with follow(Console(file=out, width=20), clock=lambda: now) as show:
        for step in range(1, 11):
            progress.note(StepDone(job_id="a", stage=0, step=1 + step // 5, steps=4))
            show(progress)
            now += LINE_INTERVAL_S / 5
        for _ in range(20):
            progress.times = Times(elapsed_s=now)
            show(progress)
            now += LINE_INTERVAL_S
    first, second, third, *rest = out.getvalue().splitlines()
    assert first == "0 of 2 videos done, 1 waiting | a:   5%  stage 1/5 step 1/4, 0/2 chunks"
    assert (" step 2/4" in second, " step 3/4" in third) == (True, True)
    assert [line.split(" | ")[1] for line in rest] == ["1 min 10 s elapsed"]


def test_times_are_told_as_far_as_they_are_known() -> None:
    progress = progress_of(video("a", Phase.RENDERING))
    assert summary(progress).startswith("0 of 1 video done | a:")
    progress.times = Times(elapsed_s=75, left_s=7500, video_seconds_per_hour=90)
    times = "1 min 15 s elapsed, about 2 h 5 min left, 1 min 30 s of video an hour"
    assert summary(progress).startswith(f"0 of 1 video done | {times} | a:")
    assert drawn(bars(progress), width=120)[-1].strip() == f"0 of 1 video done; {times}"
    assert describe_times(Times(elapsed_s=4, left_s=0)) == "4 s elapsed"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0 s"), (2.34, "2.3 s"), (45.4, "45 s"), (59.6, "1 min"), (750, "12 min 30 s"), (3600, "1 h"),
        (11_130, "3 h 5 min"), (187_300, "2 d 4 h"),
    ],
)  # fmt: skip
def test_lengths_of_time_have_the_units_that_fit(seconds: float, words: str) -> None:
    assert in_time(seconds) == words


def test_a_terminal_gets_bars_that_stay_when_the_run_ends() -> None:
    out = io.StringIO()
    progress = progress_of(video("a", Phase.RENDERING))
    with follow(Console(file=out, width=80, force_terminal=True, _environ={"TERM": "xterm"})) as show:
        show(progress)
        progress.videos["a"].phase = Phase.DONE
        show(progress)
    assert "done, 2 chunks" in out.getvalue()
    assert "1 of 1 video done" in out.getvalue()


def test_tables_show_captions_and_messages_as_they_are() -> None:
    rows = [
        {"row": 1, "job_id": "a", "mode": "i2v", "captions": {"0": "[red]sea[/] :cat: 海"}, "from": "p.png",
         "length": "1 chunks", "size": "64×64", "fps": 24, "seed": 1, "num_steps": 8, "priority": 0},
        {"row": 2, "job_id": "b", "mode": "t2v", "captions": {"0": "sun", "2": "moon"}, "from": None,
         "length": "2 s", "size": "64×64", "fps": 24, "seed": 1, "num_steps": 8, "priority": 0},
    ]  # fmt: skip
    header, *lines = drawn(manifest_table(rows), width=120)
    assert header.split() == ["row", "job_id", "length", "size", "fps", "seed", "steps", "captions"]
    text = "\n".join(lines)
    for part in ("(from image p.png)", "[red]sea[/] :cat: 海", "0: sun", "2: moon"):
        assert part in text
    failed = progress_of(video("a", Phase.FAILED, message="[/] happened\nand more"))
    assert "[/] happened" in drawn(status_table(failed))[1]
