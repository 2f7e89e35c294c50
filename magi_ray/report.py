"""What people see while a run goes on and when it has ended. Progress goes to stderr, data to stdout."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from magi_ray.render.progress import Phase, RunProgress, VideoProgress

MAX_BARS = 12
LINE_INTERVAL_S = 5.0
_COLOURS = {Phase.DONE: "green", Phase.FAILED: "red", Phase.WAITING: "dim"}
_ACTIVE = (Phase.EMBEDDING, Phase.RENDERING, Phase.FINISHING)


@contextmanager
def follow(console: Console, *, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[RunProgress], None]]:
    """A function to call with every change. A terminal gets a bar per video, anything else a line per interval."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=8, transient=False) as live:
            yield lambda progress: live.update(bars(progress))
        return
    last: float | None = None

    def line(progress: RunProgress) -> None:
        nonlocal last
        now = clock()
        if last is None or now - last >= LINE_INTERVAL_S:
            last = now
            console.print(summary(progress), soft_wrap=True, highlight=False)

    yield line


def bars(progress: RunProgress) -> Table:
    """A bar per video, moving with every step; in a large run the videos in work and a count of the rest."""
    shown = list(progress.videos.values())
    if len(shown) > MAX_BARS:
        shown = [video for video in shown if video.phase in _ACTIVE][:MAX_BARS]
    table = Table.grid(padding=(0, 1))
    for video in shown:
        bar = ProgressBar(total=video.steps_total, completed=video.steps_done, width=28)
        table.add_row(video.job_id, bar, describe(video), style=_COLOURS.get(video.phase, ""))
    table.add_row(_counts(progress), "", "")
    return table


def summary(progress: RunProgress) -> str:
    """The run in one line."""
    active = [f"{v.job_id}: {describe(v)}" for v in progress.videos.values() if v.phase in _ACTIVE]
    return " | ".join([_counts(progress), *active[:4]])


def describe(video: VideoProgress) -> str:
    """Where a video is, in a few words."""
    match video.phase:
        case Phase.DONE:
            return f"done, {video.chunks} chunks"
        case Phase.FAILED:
            return f"failed: {video.message.splitlines()[0] if video.message else 'no reason given'}"
        case Phase.RENDERING:
            share = 100 * video.steps_done // max(1, video.steps_total)
            stage = f"stage {min(video.stages_done + 1, video.stages)}/{video.stages} step {video.step}/{video.steps}"
            return f"{share}% {stage}, {video.chunks_done}/{video.chunks} chunks decoded"
        case _:
            reused = f", {video.stages_done} of {video.stages} stages from the store" if video.reused_stages else ""
            return f"{video.phase}{reused}"


def status_table(progress: RunProgress) -> Table:
    table = Table("job", "phase", "stages", "chunks", "", box=None, pad_edge=False)
    for video in progress.videos.values():
        table.add_row(
            video.job_id,
            str(video.phase),
            f"{video.stages_done}/{video.stages}",
            f"{video.chunks_done}/{video.chunks}",
            video.message.splitlines()[0] if video.message else "",
            style=_COLOURS.get(video.phase, ""),
        )
    return table


def manifest_table(rows: Sequence[dict[str, object]]) -> Table:
    columns = ("row", "job_id", "mode", "captions", "from", "length", "size", "fps", "seed", "num_steps", "priority")
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        captions = row["captions"]
        assert isinstance(captions, dict)
        text = "\n".join(f"{start}: {prompt}" for start, prompt in captions.items())
        table.add_row(
            *(text if name == "captions" else "" if row[name] is None else str(row[name]) for name in columns)
        )
    return table


def _counts(progress: RunProgress) -> str:
    parts = [f"{progress.count(Phase.DONE)} of {len(progress.videos)} videos done"]
    if failed := progress.count(Phase.FAILED):
        parts.append(f"{failed} failed")
    return ", ".join(parts)
