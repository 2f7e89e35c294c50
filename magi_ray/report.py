"""What people see of runs, stores and manifests: live progress, and tables.

Captions and messages are shown as they are, so the consoles that print these tables must have markup off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from magi_ray.commands.console import counted
from magi_ray.render.driving.progress import Phase, RunProgress, Times, VideoProgress

if TYPE_CHECKING:
    from magi_ray.render.upkeep.forecast import Forecast
    from magi_ray.render.upkeep.gc import Item
    from magi_ray.render.upkeep.verify import Damage
    from magi_ray.storage.probe import Finding

MAX_BARS = 12
LINE_INTERVAL_S, SAME_LINE_INTERVAL_S = 5.0, 60.0
MAX_PLACES = 40  # nobody reads more lines
_COLOURS = {Phase.DONE: "green", Phase.FAILED: "red", Phase.WAITING: "dim"}
_ACTIVE = (Phase.EMBEDDING, Phase.RENDERING, Phase.FINISHING)


@contextmanager
def follow(console: Console, *, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[RunProgress], None]]:
    """A function to call with every change. A terminal gets a bar per video, anything else a line per interval, and a
    long one while nothing but the time changes.

    console: of stderr.  clock: seconds, for tests.
    """
    if console.is_terminal and not console.is_dumb_terminal:
        # What is printed meanwhile, by us or by Ray, appears above the bars.
        with Live(console=console, refresh_per_second=8) as live:
            yield lambda progress: live.update(bars(progress, width=console.width, height=console.height))
        return
    last: float | None = None
    seen = ""

    def line(progress: RunProgress) -> None:
        nonlocal last, seen
        now, state = clock(), summary(replace(progress, times=Times()))
        if last is None or now - last >= (LINE_INTERVAL_S if state != seen else SAME_LINE_INTERVAL_S):
            last, seen = now, state
            console.print(summary(progress), soft_wrap=True)

    yield line


@contextmanager
def status_line(console: Console, *, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[str], None]]:
    """A function to call with a line that says how far something is, as often as one likes. Arguments as ``follow``."""
    if console.is_terminal and not console.is_dumb_terminal:
        with console.status("") as status:
            yield status.update
        return
    last = clock()

    def line(text: str) -> None:
        nonlocal last
        if clock() - last >= LINE_INTERVAL_S:
            last = clock()
            console.print(text, soft_wrap=True)

    yield line


def bars(progress: RunProgress, *, width: int = 80, height: int = 24) -> Table:
    """A bar per video, moving with every step, and a line of counts, each on one line of ``width`` columns.

    When they do not all fit into ``height`` lines, those being rendered are shown first, then those that failed.
    """
    room = max(1, min(MAX_BARS, height - 2))
    shown = list(progress.videos.values())
    if len(shown) > room:
        wanted = [video for video in shown if video.phase in _ACTIVE or video.phase is Phase.FAILED]
        shown = sorted(wanted, key=lambda video: video.phase is Phase.FAILED)[:room]
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=max(8, width // 4))
    bar_width = max(4, min(30, width // 4))
    table.add_column(width=bar_width)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for video in shown:
        steps = video.steps_total if video.phase is Phase.DONE else video.steps_done
        bar = ProgressBar(total=video.steps_total, completed=steps, width=bar_width)
        table.add_row(video.job_id, bar, describe(video), style=_COLOURS.get(video.phase, ""))
    whole = Table.grid()
    whole.add_column(no_wrap=True, overflow="ellipsis")
    whole.add_row(table)
    whole.add_row("; ".join(filter(None, [_counts(progress), describe_times(progress.times)])))
    return whole


def summary(progress: RunProgress) -> str:
    """The run in one line."""
    active = [f"{v.job_id}: {describe(v)}" for v in progress.videos.values() if v.phase in _ACTIVE]
    return " | ".join(filter(None, [_counts(progress), describe_times(progress.times), *active[:4]]))


def describe_times(times: Times) -> str:
    """``5 min 10 s elapsed, about 2 h 5 min left, 90 s of video an hour``, as far as it is known."""
    parts = [] if times.elapsed_s is None else [f"{in_time(times.elapsed_s)} elapsed"]
    if times.left_s:
        parts.append(f"about {in_time(times.left_s)} left")
    if times.video_seconds_per_hour is not None:
        parts.append(f"{in_time(times.video_seconds_per_hour)} of video an hour")
    return ", ".join(parts)


def describe(video: VideoProgress) -> str:
    """How far a video is, in a few words; the most important first, since a terminal may be narrow."""
    match video.phase:
        case Phase.DONE:
            return f"done, {counted(video.chunks, 'chunk')}"
        case Phase.FAILED:
            return f"failed: {_first_line(video.message) or 'no reason given'}"
        case Phase.RENDERING if video.stages_done == video.stages:
            return f"100%  {video.chunks_done}/{video.chunks} chunks decoded"
        case Phase.RENDERING:
            share = 100 * video.steps_done // video.steps_total
            stage = f"stage {video.stages_done + 1}/{video.stages} step {video.step}/{video.steps}"
            return f"{share:3}%  {stage}, {video.chunks_done}/{video.chunks} chunks"
        case _:
            reused = f", {video.stages_done}/{video.stages} stages from the store" if video.reused_stages else ""
            return f"{video.phase}{reused}"


def status_table(progress: RunProgress) -> Table:
    """A line for each video."""
    table = _table("job", "phase", "stages", "chunks", "")
    for video in progress.videos.values():
        stages, chunks = f"{video.stages_done}/{video.stages}", f"{video.chunks_done}/{video.chunks}"
        style = _COLOURS.get(video.phase, "")
        table.add_row(video.job_id, str(video.phase), stages, chunks, _first_line(video.message), style=style)
    return table


def runs_table(runs: Sequence[Mapping[str, object]]) -> Table:
    """A line for each run of `magi-ray list`."""
    table = _table("run", "submitted", "videos", "done", "failed", "state", "settings")
    for run in runs:
        table.add_row(*(_shown_time(str(run[name])) if name == "submitted" else str(run[name]) for name in run))
    return table


def takes_table(takes: Sequence[Mapping[str, object]]) -> Table:
    """A line for each take of `magi-ray takes`."""
    table = _table("job", "take", "asked", "from chunk", "of take", "stages in the store", "")
    for take in takes:
        asked = _shown_time(str(take["asked"] or ""))
        stages = f"{take['stages_in_store']}/{take['stages']}"
        begins = ("", "") if take["from_chunk"] is None else (str(take["from_chunk"]), str(take["base"]))
        table.add_row(
            str(take["job_id"]), str(take["take"]), asked, *begins, stages, "in use" if take["in_use"] else ""
        )
    return table


def findings_table(findings: Sequence[Finding]) -> Table:
    """A line for each thing that `magi-ray doctor` looked at."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for finding in findings:
        verdict, style = ("ok", "green") if finding.ok else ("missing", "red") if finding.needed else ("note", "yellow")
        table.add_row(verdict, finding.name, finding.seen, style="" if finding.ok else style)
    return table


def damages_table(damages: Sequence[Damage]) -> Table:
    """A line for each damaged object of `magi-ray verify`."""
    table = _table("object", "what is wrong", "needed by")
    for damage in damages:
        needed_by = ", ".join(f"{run_id} {job_id}".rstrip() for run_id, job_id in damage.needed_by)
        table.add_row(damage.key, damage.what, needed_by or "nobody")
    return table


def garbage_table(items: Sequence[Item]) -> Table:
    """What `magi-ray gc` found: a line for each folder of a commit or object; where those are too many, for each kind
    and reason."""
    places = {(_folder(item), item.reason) for item in items}
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        place = _folder(item) if len(places) <= MAX_PLACES else f"{_folder(item).split('/')[0]}/…"
        groups.setdefault((place, item.reason), []).append(item)
    table = _table("where", "objects", "size", "age", "reason")
    for (place, reason), group in groups.items():
        days = [item.age_s / 86400 for item in group]
        ages = dict.fromkeys(f"{days:.0f} d" for days in (min(days), max(days)))
        size = in_bytes(sum(item.size for item in group))
        table.add_row(place, str(len(group)), size, " to ".join(ages), reason)
    return table


def in_bytes(size: float) -> str:
    """A number of bytes in the unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _shown_time(iso: str) -> str:
    return iso.replace("T", " ")


def in_time(seconds: float) -> str:
    """A length of time in the two units that fit: ``45 s``, ``12 min 30 s``, ``3 h 5 min``, ``2 d 4 h``."""
    whole = round(seconds)
    if whole < 10:
        return f"{seconds:.1f} s".replace(".0 s", " s")
    for large, per_large, small, per_small in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= per_large:
            rest = whole % per_large // per_small
            return f"{whole // per_large} {large}" + f" {rest} {small}" * (rest > 0)
    return f"{whole} s"


def _folder(item: Item) -> str:
    return "(half written)" if item.leftover else f"{item.key.rpartition('/')[0]}/"


def plan_table(rows: Sequence[Forecast]) -> Table:
    """A line for each row of `magi-ray plan`."""
    table = _table("job", "what", "why", "frames", "stages left", "forwards left")
    for row in rows:
        numbers = row.frames, row.stages_left, row.forwards_left
        why = "; ".join(row.reasons) + (f"\n(of its clip: {row.clip})" if row.clip else "")
        table.add_row(row.job_id, row.what, why, *map(str, numbers))
    return table


def manifest_table(rows: Sequence[Mapping[str, object]]) -> Table:
    """The rows of ``manifest.table_for_show``. What a video begins from stands above its captions, to save a column."""
    names = ["row", "job_id", "length", "size", "fps", "seed", "num_steps", "priority"]
    if all(row["priority"] == 0 for row in rows):
        names.remove("priority")
    table = _table(*("steps" if name == "num_steps" else name for name in names), "captions")
    kinds = {"i2v": "image", "v2v": "video"}
    for row in rows:
        captions = row["captions"]
        assert isinstance(captions, dict)
        lines = [prompt if len(captions) == 1 else f"{start}: {prompt}" for start, prompt in captions.items()]
        if row["from"] is not None:
            taken = f": {row['clip']}" if row.get("clip") else ""
            lines.insert(0, f"(from {kinds[str(row['mode'])]} {row['from']}{taken})")
        table.add_row(*(str(row[name]) for name in names), "\n".join(lines))
    return table


def _table(*columns: str) -> Table:
    """On a narrow terminal names and sentences wrap, numbers never do."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        long = name in ("job", "job_id", "run", "captions", "settings", "why", "")
        table.add_column(name, overflow="fold", no_wrap=not long)
    return table


def _first_line(message: str) -> str:
    return message.splitlines()[0] if message else ""


def _counts(progress: RunProgress) -> str:
    parts = [f"{progress.count(Phase.DONE)} of {counted(len(progress.videos), 'video')} done"]
    if waiting := progress.count(Phase.WAITING):
        parts.append(f"{waiting} waiting")
    if failed := progress.count(Phase.FAILED):
        parts.append(f"{failed} failed")
    return ", ".join(parts)
