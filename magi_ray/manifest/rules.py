"""The rules of rows: strict pydantic models of a row's cells, and what is checked across rows.

A rule that compares cells is a function beside the models, so that all that is wrong with a row is told at once: only a
cell of a wrong type hides a rule that needs it.
"""

from __future__ import annotations

import difflib
import math
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo
from pydantic_core import PydanticCustomError

from magi_ray.errors import Problem
from magi_ray.manifest.casting import EXACT, MAX_ENTRIES, Unfit, too_many_entries
from magi_ray.manifest.messages import shown
from magi_ray.manifest.parquet import COLUMNS, CONTROLS, column_meant
from magi_ray.manifest.rows import Defaults
from magi_ray.settings import nearest, step_problems
from magi_ray.timeline import (
    FRAMES_PER_CHUNK,
    FRAMES_PER_LATENT,
    LATENTS_PER_CHUNK,
    SIZE_MULTIPLE,
    chunks_for_frames,
    frames_for_seconds,
)

MAX_FPS = 120
MAX_SEED = 2**63 - 1
# What is larger was hardly meant, and is told before a plan grows by it. They are not asked of runs that are stored.
MAX_CHUNKS = 100_000  # 28 hours at 24 frames per second; each chunk is planned
MAX_PREFIX_FRAMES = 10_000
MAX_STEPS = 1_000
MAX_SIDE, MAX_AREA = 8_192, 4_096 * 2_304
MAX_PRIORITY = 1_000_000
_JOB_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_NULLS = ("na", "n/a", "#n/a", "null", "none", "\\n")  # as other programs write null
_LEFT_EMPTY = "leave the cell empty where it says nothing"
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What rules need besides the row's cells. number: the row's, from 1.  base: where relative media paths start, an
    absolute path or s3://bucket/folder.  stored: the row was submitted before: bounds that are newer than it do not
    apply."""

    defaults: Defaults
    base: Path | str
    media_must_exist: bool
    stored: bool = False
    number: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Broken:
    """A rule that a cell breaks. value: as shown, None for the cell's.  column: None for the cell's own.
    missing: a file that the cell names is not there."""

    rule: str
    remedy: str
    value: str | None = None
    column: str | None = None
    missing: bool = False


Rule = Callable[[Any, Context], Iterable[Broken]]
CellsRule = Callable[[Mapping[str, Any], Context], Iterable[Broken]]


def rules(*asked: Rule) -> AfterValidator:
    """Asks each rule of the cell. Without a context only types are checked."""

    def ask(cell: Any, info: ValidationInfo) -> Any:
        if info.context is not None:
            broken = [found for rule in asked for found in rule(cell, info.context)]
            if broken:
                raise PydanticCustomError("rules", "rules are broken", {"cell": cell, "broken": broken})
        return cell

    return AfterValidator(ask)


# Rules of one cell


def must(holds: Callable[[Any], bool], rule: str, remedy: str) -> Rule:
    """``holds`` is true of the cell; ``rule`` says what is wrong otherwise."""

    def ask(cell: object, context: Context) -> Iterator[Broken]:
        if not holds(cell):
            yield Broken(rule=rule, remedy=remedy)

    return ask


def _between(low: int, high: int, high_shown: str) -> Rule:
    rule = f"is not between {low} and {high_shown}"
    return must(lambda value: low <= value <= high, rule, "use a number between them")


def _at_most(limit: int, what: str, remedy: str) -> Rule:
    """A bound that a row must keep when it is submitted."""

    def rule(value: int, context: Context) -> Iterator[Broken]:
        if value > limit and not context.stored:
            yield Broken(rule=f"is more than {limit:,}, {what}", remedy=remedy)

    return rule


_is_described = must(lambda prompt: bool(prompt and prompt.strip()), "is blank", "describe what is to be seen")
_is_a_start = must(lambda start: start is not None, "is not a number", "write the chunk at which it begins")
_is_not_empty = must(bool, "is empty", "leave it null, or write how many chunks are seen")
_sees_itself = must(
    lambda kv_range: all(chunks is not None and chunks >= 1 for chunks in kv_range),
    "has a value below 1, but a chunk always sees itself",
    "use 1 for the chunk alone, 2 for one more, and so on",
)
_holds_a_latent = must(
    lambda frames: frames >= FRAMES_PER_LATENT,
    f"is shorter than one latent frame, which is {FRAMES_PER_LATENT} frames",
    f"use {FRAMES_PER_LATENT} or more, or an image",
)
_is_a_length = must(
    lambda seconds: math.isfinite(seconds) and seconds > 0, "is not a length", "write a number above 0, for example 2.5"
)
_is_some_chunks = must(lambda chunks: chunks >= 1, "is below 1", "write how many chunks of 24 frames to make")


_most_chunks = _at_most(MAX_CHUNKS, "the most chunks of a video", "make several rows of it")
_longest_prefix = _at_most(MAX_PREFIX_FRAMES, "the most frames of a clip in front of a video", "use fewer")


def _is_a_priority(priority: int, context: Context) -> Iterator[Broken]:
    if abs(priority) > MAX_PRIORITY and not context.stored:
        rule = f"is not between -{MAX_PRIORITY:,} and {MAX_PRIORITY:,}"
        yield Broken(rule=rule, remedy="use a number between them")


def _is_a_name(job_id: str | None, context: Context) -> Iterator[Broken]:
    if job_id is None:
        yield Broken(value="", rule="is missing", remedy="give every row a name of its own")
        return
    names_a_folder = job_id in (".", "..")
    if _JOB_ID.fullmatch(job_id) and not names_a_folder:
        return
    better = re.sub(r"[^A-Za-z0-9._-]+", "-", job_id)[:128].strip("-.") or f"row-{context.number}"
    rule = "names a folder" if names_a_folder else "is not 1 to 128 letters, digits, dots, hyphens or underscores"
    yield Broken(rule=rule, remedy=f"use for example {shown(better)}")


def _guides(of_run: str) -> Rule:
    """Guidance scales fit a run that has guidance. of_run: the field whose values they replace."""

    def rule(scales: list[float | None], context: Context) -> Iterator[Broken]:
        runtime = context.defaults.runtime
        if runtime.cfg_number != 3:
            rule = f"asks for guidance, but this model has none (cfg_number {runtime.cfg_number})"
            yield Broken(rule=rule, remedy="leave it null, or use a base model")
            return
        if len(scales) != len(runtime.cfg_t_range):
            rule = f"has {len(scales)} values, but cfg_t_range has {len(runtime.cfg_t_range)}"
            yield Broken(rule=rule, remedy=f"write one for each of {shown(list(runtime.cfg_t_range))}")
        if any(scale is None or not math.isfinite(scale) or scale < 0 for scale in scales):
            remedy = f"write numbers, as the run's {shown(list(getattr(runtime, of_run)))}"
            yield Broken(rule="has a value that is not a number from 0 on", remedy=remedy)

    return rule


def _can_be_read(written: str, context: Context) -> Iterator[Broken]:
    scheme = _scheme(written)
    url = urlsplit(written) if scheme else None
    if not written.strip():
        yield Broken(rule="is blank", remedy="write where the file lies, or leave the cell null")
    elif scheme not in ("", "file", "s3"):
        yield Broken(rule=f"has the scheme {scheme}, which is not read", remedy="use a path, file:// or s3://")
    elif url is not None and scheme == "s3" and (not url.netloc or not url.path.strip("/")):
        yield Broken(rule="does not name a bucket and a key", remedy="write s3://bucket/key")
    elif url is not None and scheme == "file" and url.netloc not in ("", "localhost"):
        rule = f"names the machine {url.netloc}, but only files of this one are read"
        yield Broken(rule=rule, remedy="write file:///absolute/path")
    elif not location(written, context.base).startswith("s3:") and context.media_must_exist:
        yield from is_a_file(Path(location(written, context.base)))


def is_a_file(path: Path) -> Iterator[Broken]:
    """Why ``path`` is no file that can be read, if it is none."""
    try:
        if not S_ISREG(path.stat().st_mode):
            yield Broken(rule="is not a file", remedy="write the path of a file")
    except (FileNotFoundError, NotADirectoryError):
        yield Broken(rule="does not exist", remedy=_found_instead(path), missing=True)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        yield Broken(rule=f"cannot be read ({reason})", remedy="correct the path")


def _found_instead(path: Path) -> str:
    """The remedy for a file that is not there."""
    if "~" in path.parts:
        return "write the whole path: ~ is not read as a home folder"
    if path.name.lower() in _NULLS:
        return _LEFT_EMPTY
    bare = path.name.strip()
    if bare and bare != path.name and path.with_name(bare).is_file():
        return f"write {shown(bare)}, without blanks around it"
    return f"put the file at {path}, or correct the path"


def _scheme(written: str) -> str:
    found = _URI.match(written)
    return found[1].lower() if found else ""


def location(written: str, base: Path | str) -> str:
    """Where an image or clip lies whose cell breaks no rule: an absolute path, or its s3:// URI."""
    scheme = _scheme(written)
    if scheme == "s3":
        return written
    path = unquote(urlsplit(written).path) if scheme == "file" else written
    if isinstance(base, Path) or path.startswith("/"):
        return str(Path(base) / path)
    return f"s3://{posixpath.normpath(f'{base}/{path}'.removeprefix('s3://'))}"


def _one_of(*known: str) -> Rule:
    def rule(value: str, context: Context) -> Iterator[Broken]:
        if value not in known:
            close = difflib.get_close_matches(value.strip().lower(), known, n=1, cutoff=0.5)
            yield Broken(rule=f"is none of {', '.join(known)}", remedy=f"use {close[0] if close else known[0]}")

    return rule


def _is_a_multiple(size: int, context: Context) -> Iterator[Broken]:
    if size > MAX_SIDE and not context.stored:
        yield Broken(rule=f"is more than {MAX_SIDE:,} pixels", remedy=f"use {MAX_SIDE} or less")
    elif size < SIZE_MULTIPLE or size % SIZE_MULTIPLE:
        yield Broken(rule=f"is not a multiple of {SIZE_MULTIPLE}", remedy=nearest(max(size, 1)))


def _fits_the_run(num_steps: int, context: Context) -> Iterator[Broken]:
    if num_steps < 1:
        yield Broken(rule="is below 1", remedy=f"use the run's {context.defaults.num_steps}")
        return
    if num_steps > MAX_STEPS and not context.stored:
        yield Broken(rule=f"is more than {MAX_STEPS:,} steps", remedy=f"use the run's {context.defaults.num_steps}")
        return
    for problem in step_problems(num_steps, context.defaults.runtime):
        yield Broken(rule=problem.rule, remedy=problem.remedy)


def _is_complete(tags: list[tuple[str, str | None]], context: Context) -> Iterator[Broken]:
    if len(dict(tags)) < len(tags):
        for key, count in Counter(key for key, _ in tags).items():
            if count > 1:
                yield Broken(value=shown(key), rule="is there twice", remedy="keep one of them")
    for key, value in tags:
        if value is None:
            yield Broken(value=shown(key), rule="has no value", remedy="give it one, or leave the tag out")


# Rules that compare cells. They get the cells as written, those of a wrong type left out.


def _not_beside(column: str, other: str, said: str = "a row has one or the other") -> CellsRule:
    """A row has ``column`` or ``other``."""

    def rule(cells: Mapping[str, Any], context: Context) -> Iterator[Broken]:
        if cells[column] is not None and cells[other] is not None:
            rule = f"stands beside {other} {shown(cells[other])}, but {said}"
            yield Broken(column=column, value=shown(cells[column]), rule=rule, remedy="leave one of the two empty")

    return rule


def _captions(cells: Mapping[str, Any], context: Context) -> Iterator[Broken]:
    """A row has a prompt or a schedule."""
    prompt, schedule = cells["prompt"], cells["schedule"]
    if prompt is None and schedule is None:
        rule = "is missing, and there is no schedule either"
        yield Broken(column="prompt", value="", rule=rule, remedy="write one of the two")
    elif prompt is not None and schedule is not None:
        rule = "stands beside a schedule, but a row has one or the other"
        remedy = "keep prompt for one caption, schedule for several"
        yield Broken(column="prompt", value=shown(prompt), rule=rule, remedy=remedy)
    elif prompt is not None:
        for broken in _is_described(prompt, context):
            yield replace(broken, column="prompt", value=shown(prompt))
    elif not schedule:
        remedy = "write at least the caption that begins at chunk 0"
        yield Broken(column="schedule", value="[]", rule="is empty", remedy=remedy)


def _rises(cells: Mapping[str, Any], context: Context) -> Iterator[Broken]:
    before: int | None = None
    for place, entry in enumerate(cells["schedule"] or (), 1):
        start = entry.get("start_chunk")
        if start is None:
            continue  # which is told of the entry
        value = f"start_chunk {start}"
        if place == 1 and start != 0:
            rule = "of entry 1 is not 0"
            yield Broken(column="schedule", value=value, rule=rule, remedy="begin the first caption at chunk 0")
        elif before is not None and start <= before:
            rule = f"of entry {place} does not come after start_chunk {before} of the entry before it"
            yield Broken(column="schedule", value=value, rule=rule, remedy="sort the entries, one caption per chunk")
        before = start


def _divides_the_steps(cells: Mapping[str, Any], context: Context) -> Iterator[Broken]:
    runtime = context.defaults.runtime
    steps = runtime.num_steps if cells["num_steps"] is None else cells["num_steps"]
    for place, entry in enumerate(cells["schedule"] or (), 1):
        kv_range = entry.get("kv_range")
        if kv_range and steps >= 1 and steps % len(kv_range):
            rule = f"of entry {place} has {len(kv_range)} values, but the {steps} steps are not divisible by that"
            example = list(runtime.noise2clean_kvrange) or [5, 4, 3, 2]
            remedy = f"write as many as noise2clean_kvrange has, for example {shown(example)}"
            yield Broken(column="schedule", value=f"kv_range {shown(kv_range)}", rule=rule, remedy=remedy)


def _ends_in_time(cells: Mapping[str, Any], context: Context) -> Iterator[Broken]:
    """Captions begin within the video. Lengths that are wrong themselves are left to the other rules."""
    seconds, num_chunks = cells["seconds"], cells["num_chunks"]
    last = max((entry.get("start_chunk") or 0 for entry in cells["schedule"] or ()), default=0)
    if not last or (seconds is not None and num_chunks is not None):
        return
    if seconds is not None:
        fps = context.defaults.fps if cells["fps"] is None else cells["fps"]
        if not (math.isfinite(seconds * fps) and seconds > 0 and 1 <= fps <= MAX_FPS):
            return
        frames = frames_for_seconds(seconds, fps)
    else:
        frames = FRAMES_PER_CHUNK * (context.defaults.num_chunks if num_chunks is None else num_chunks)
    # How many frames a clip takes from its first chunk is known once it is read; at most all but one latent.
    taken = LATENTS_PER_CHUNK - 1 if cells["video"] is not None else 0
    if frames >= 1 and last >= (chunks := chunks_for_frames(frames, taken)):
        rule = f"lies beyond the last chunk of the video, {chunks - 1}"
        remedy = f"begin at {chunks - 1} or before, or make the video longer"
        yield Broken(column="schedule", value=f"start_chunk {last}", rule=rule, remedy=remedy)


def _can_be_planned(cells: Mapping[str, Any], context: Context) -> Iterator[Broken]:
    """A length in seconds, or that of the run, is no more chunks than a video may have. A num_chunks is asked alone."""
    seconds = cells["seconds"]
    fps = context.defaults.fps if cells["fps"] is None else cells["fps"]
    if context.stored or not 1 <= fps <= MAX_FPS:
        return
    longest = MAX_CHUNKS * FRAMES_PER_CHUNK
    if seconds is not None:
        if math.isfinite(seconds) and seconds * fps > longest:
            rule = f"is {seconds * fps:,.6g} frames at {fps} fps, but a video has at most {longest:,}"
            remedy = f"use {longest // fps} or less, or several rows"
            yield Broken(column="seconds", value=shown(seconds), rule=rule, remedy=remedy)
    elif cells["num_chunks"] is None and context.defaults.num_chunks > MAX_CHUNKS:
        rule = f"is left to the run's {context.defaults.num_chunks:,} chunks, but a video has at most {MAX_CHUNKS:,}"
        yield Broken(column="num_chunks", value="", rule=rule, remedy="set a smaller num_frames, or num_chunks here")


def _is_no_poster(cells: Mapping[str, Any], context: Context) -> Iterator[Broken]:
    """The picture is no larger than a video may be."""
    own = {name: cells[name] for name in ("width", "height") if cells[name] is not None}
    size = {"width": context.defaults.width, "height": context.defaults.height} | own
    if not own or context.stored or max(size.values()) > MAX_SIDE:  # told of the side
        return
    area = size["width"] * size["height"]
    if area > MAX_AREA:
        column = max(own, key=lambda name: own[name])
        rule = f"makes {size['width']}×{size['height']}, {area:,} pixels, but a frame has at most {MAX_AREA:,}"
        yield Broken(column=column, value=shown(own[column]), rule=rule, remedy="use a smaller size")


# Each with the cells it needs.
_COMPARED: Sequence[tuple[Collection[str], CellsRule]] = (
    (("prompt", "schedule"), _captions),
    (("schedule",), _rises),
    (("schedule", "num_steps"), _divides_the_steps),
    (("schedule", "video", "seconds", "num_chunks", "fps"), _ends_in_time),
    (("image", "video"), _not_beside("image", "video", "a row begins from one or the other")),
    (("seconds", "num_chunks"), _not_beside("seconds", "num_chunks")),
    (("seconds", "num_chunks", "fps"), _can_be_planned),
    (("width", "height"), _is_no_poster),
)


# The cells

Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Medium = Annotated[str, rules(_can_be_read)]
Size = Annotated[Int, rules(_is_a_multiple)]


def _few_entries(schedule: Any, info: ValidationInfo) -> Any:
    """Refuses a schedule by its length, before its entries are looked at one by one."""
    if info.context is not None and not info.context.stored and isinstance(schedule, list):
        count = len(schedule)
        if count > MAX_ENTRIES:
            unfit = too_many_entries(count)
            broken = Broken(value=unfit.value, rule=unfit.rule, remedy=unfit.remedy)
            raise PydanticCustomError("rules", "rules are broken", {"cell": [], "broken": [broken]})
    return schedule


# Arrow has a map as pairs, in which a key may come twice.
Tags = Annotated[
    list[tuple[str, str | None]],
    BeforeValidator(lambda tags: list(tags.items()) if isinstance(tags, dict) else tags),
    rules(_is_complete),
]


class Entry(BaseModel):
    """An entry of a schedule."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", validate_default=True)

    start_chunk: Annotated[Int | None, rules(_is_a_start)] = None
    prompt: Annotated[str | None, rules(_is_described)] = None
    kv_range: Annotated[list[Int | None], rules(_is_not_empty, _sees_itself)] | None = None
    text_scales: Annotated[list[float | None], rules(_guides("text_scales"))] | None = None
    prev_chunk_scales: Annotated[list[float | None], rules(_guides("prev_chunk_scales"))] | None = None


class Cells(BaseModel):
    """The cells of a row as written. A missing one is null; columns that magi-ray does not know are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", validate_default=True)

    job_id: Annotated[str | None, rules(_is_a_name)] = None
    prompt: str | None = None
    image: Medium | None = None
    video: Medium | None = None
    prefix_from: Annotated[str, rules(_one_of("start", "end"))] | None = None
    prefix_frames: Annotated[Int, rules(_holds_a_latent, _longest_prefix)] | None = None
    fit: Annotated[str, rules(_one_of("crop", "pad", "fit"))] | None = None
    include_prefix: bool | None = None
    seconds: Annotated[float, rules(_is_a_length)] | None = None
    num_chunks: Annotated[Int, rules(_is_some_chunks, _most_chunks)] | None = None
    width: Size | None = None
    height: Size | None = None
    fps: Annotated[Int, rules(_between(1, MAX_FPS, str(MAX_FPS)))] | None = None
    seed: Annotated[Int, rules(_between(0, MAX_SEED, "2^63 - 1"))] | None = None
    num_steps: Annotated[Int, rules(_fits_the_run)] | None = None
    priority: Annotated[Int, rules(_is_a_priority)] | None = None
    tags: Tags | None = None
    schedule: Annotated[list[Entry] | None, BeforeValidator(_few_entries)] = None


# Columns that override for one row a field of the run's PrefixSettings.
PREFIX_COLUMNS = {"prefix_from": "take", "prefix_frames": "max_frames", "fit": "fit", "include_prefix": "include"}

_TYPES: Mapping[pa.DataType, str] = {
    pa.string(): "text",
    pa.int64(): "a whole number below 2^63",
    pa.float64(): "a number",
    pa.bool_(): "true or false",
    COLUMNS["tags"]: "a map from text to text",
    COLUMNS["schedule"]: f"a list of {{start_chunk, prompt}}, each with or without {', '.join(CONTROLS)}",
}
_REMEDIES: Mapping[pa.DataType, str] = {
    COLUMNS["tags"]: 'write it as {"team": "film"}',
    COLUMNS["schedule"]: 'write it as [{"start_chunk": 0, "prompt": "A cat"}]',
}
_UNUSABLE = object()  # of no column's type


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Rows by number, from 1. cells: of those without problems.  unfit: of the others, without what is wrong.
    written: the others as they were written."""

    cells: dict[int, Cells]
    unfit: dict[int, Cells]
    written: dict[int, Mapping[str, Any]]
    problems: list[Problem]


def check(rows: Iterable[Mapping[str, Any]], context: Context | None, *, unusable: Collection[str] = ()) -> Checked:
    """Checks every row.

    context: its number is ignored; None checks types only.  unusable: columns with problems already reported; nothing
    more is reported of them, nor of what depends on them.
    """
    cells: dict[int, Cells] = {}
    unfit: dict[int, Cells] = {}
    written: dict[int, Mapping[str, Any]] = {}
    problems: list[Problem] = []
    first: dict[str, int] = {}
    order = {column: place for place, column in enumerate(COLUMNS)}
    hidden = dict.fromkeys(unusable, _UNUSABLE)
    for number, row in enumerate(rows, 1):
        row = {**row, **hidden}
        found: list[Problem] = []
        typed = dict.fromkeys(COLUMNS) | {column: cell for column, cell in row.items() if column not in hidden}
        try:
            valid = Cells.model_validate(row, context=context and replace(context, number=number))
        except ValidationError as exc:
            found += _problems(exc, number, row)
            for column in _mistyped(exc) | _too_long(exc):
                typed.pop(column, None)
        for column in hidden:
            typed.pop(column, None)
        job_id = row.get("job_id")
        if context is not None:
            found += [
                _problem(number, job_id, str(broken.column), str(broken.value), broken.rule, broken.remedy)
                for needed, rule in _COMPARED
                if typed.keys() >= set(needed)
                for broken in rule(typed, context)
            ]
        if context is not None and isinstance(job_id, str) and first.setdefault(job_id, number) != number:
            rule, remedy = f"is the job_id of row {first[job_id]} too", "give every row a name of its own"
            found.append(_problem(number, job_id, "job_id", shown(job_id), rule, remedy))
        if not found:
            cells[number] = valid
        else:
            wrong = {problem.column for problem in found}
            unfit[number] = Cells.model_validate({column: row[column] for column in row.keys() - wrong - hidden.keys()})
            written[number] = row
        problems += sorted(
            (problem for problem in found if problem.column not in unusable), key=lambda problem: order[problem.column]
        )
    return Checked(cells=cells, unfit=unfit, written=written, problems=problems)


def _problems(error: ValidationError, number: int, row: Mapping[str, Any]) -> Iterator[Problem]:
    faults, mistyped = error.errors(include_url=False, include_input=False), _mistyped(error)
    for column in mistyped:
        wanted = COLUMNS[column]
        cell, rule, remedy = row[column], f"must be {_TYPES[wanted]}", _REMEDIES.get(wanted, "correct the value")
        unknown = [fault["loc"] for fault in faults if fault["loc"][0] == column and fault["type"] == "extra_forbidden"]
        if unknown:
            remedy = f"leave {unknown[0][-1]} out of entry {int(unknown[0][1]) + 1}, or correct its name"
        if isinstance(cell, Unfit):
            yield _problem(number, row.get("job_id"), column, cell.value, cell.rule, cell.remedy)
            continue
        if wanted == pa.int64() and isinstance(cell, float) and EXACT < abs(cell) < 2**63:
            rule += " without a rounding, which a float above 2^53 may have had"
            remedy = "write it as an integer or as text"
        if isinstance(cell, str) and cell.strip().lower() in _NULLS:
            remedy = _LEFT_EMPTY
        yield _problem(number, row.get("job_id"), column, shown(cell), rule, remedy)
    for fault in faults:
        column, inside = str(fault["loc"][0]), fault["loc"][1:]
        if column in mistyped:
            continue
        cell = shown(fault["ctx"]["cell"])
        for broken in fault["ctx"]["broken"]:
            value, rule = cell if broken.value is None else broken.value, broken.rule
            if inside:  # an entry of the schedule: its place, its field
                value, rule = f"{inside[1]} {value}", f"of entry {int(inside[0]) + 1} {rule}"
            yield _problem(number, row.get("job_id"), broken.column or column, value, rule, broken.remedy)


def _mistyped(error: ValidationError) -> set[str]:
    """Columns whose cell has a wrong type."""
    faults = error.errors(include_url=False, include_input=False)
    return {str(fault["loc"][0]) for fault in faults if fault["type"] != "rules"}


def _too_long(error: ValidationError) -> set[str]:
    """The schedule, if its entries were not looked at."""
    faults = error.errors(include_url=False, include_input=False)
    return {"schedule" for fault in faults if fault["loc"] == ("schedule",) and fault["type"] == "rules"}


def _problem(row: int, job_id: object, column: str, value: str, rule: str, remedy: str) -> Problem:
    name = job_id if isinstance(job_id, str) else ""
    return Problem(row=row, job_id=name, column=column, value=value, rule=rule, remedy=remedy)


# What diffusers and others call columns of ours.
_ELSEWHERE = {
    "num_frames": "num_chunks or seconds",
    "frames": "num_chunks or seconds",
    "duration": "seconds",
    "num_inference_steps": "num_steps",
}


def notes(cells: Mapping[int, Cells], unknown: Iterable[str]) -> Iterator[str]:
    """Notes on what is allowed but probably not meant. cells: by row.  unknown: the columns that magi-ray does not
    know."""
    for name in unknown:
        near = difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.7)
        close = column_meant(name) or _ELSEWHERE.get(name) or next(iter(near), "")
        if close:
            yield f"Column {name} is not one of ours and only travels into the results. Did you mean {close}?"
    for column in PREFIX_COLUMNS:
        what = "an image or a clip" if column == "fit" else "a clip"
        idle = [
            number
            for number, row in cells.items()
            if getattr(row, column) and row.video is None and (column != "fit" or row.image is None)
        ]
        if idle:
            yield f"Row {_first(idle)} says {column}, which counts only where a video begins from {what}."


def _first(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}{f' ({len(numbers)} rows)' if len(numbers) > 1 else ''}"
