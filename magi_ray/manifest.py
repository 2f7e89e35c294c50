"""The manifest: a Parquet file with one row per video. Read, checked, written, and built from JSONL, CSV or YAML.

Three steps, each its own part below: a source (Parquet bytes, or rows as plain dicts) becomes an Arrow table;
the rules go over every row and complain about all that is wrong at once; what is left becomes ``Row`` values
in which the run's defaults are filled in. ``manifests/README.md`` explains the columns to people.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal, Self, get_args
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from magi_ray.errors import InputError, ManifestError, Problem
from magi_ray.settings import (
    AS_THE_RUN,
    ChunkControl,
    Frozen,
    PrefixSettings,
    RuntimeConfig,
    Settings,
    nearest,
    step_problems,
)
from magi_ray.timeline import FRAMES_PER_LATENT, LATENTS_PER_CHUNK, SIZE_MULTIPLE, chunks_for_seconds

SCHEMA = "magi-ray.manifest"
VERSION = 1
METADATA_KEY = b"magi_ray"

_ENTRY = pa.struct(
    [
        ("start_chunk", pa.int64()),
        ("prompt", pa.string()),
        ("kv_range", pa.list_(pa.int64())),
        ("text_scales", pa.list_(pa.float64())),
        ("prev_chunk_scales", pa.list_(pa.float64())),
    ]
)
# What an entry of a schedule may leave out, also as a field of the Parquet type.
_CONTROLS = tuple(ChunkControl.model_fields)

COLUMNS: Mapping[str, pa.DataType] = {
    "job_id": pa.string(),
    "prompt": pa.string(),
    "schedule": pa.list_(_ENTRY),
    "image": pa.string(),
    "video": pa.string(),
    "prefix_from": pa.string(),
    "prefix_frames": pa.int64(),
    "fit": pa.string(),
    "include_prefix": pa.bool_(),
    "seconds": pa.float64(),
    "num_chunks": pa.int64(),
    "width": pa.int64(),
    "height": pa.int64(),
    "fps": pa.int64(),
    "seed": pa.int64(),
    "num_steps": pa.int64(),
    "priority": pa.int64(),
    "tags": pa.map_(pa.string(), pa.string()),
}

MAX_FPS = 120
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """``prompt`` and ``control`` hold from chunk ``start_chunk`` (from 0) until the next caption begins."""

    start_chunk: int
    prompt: str
    control: ChunkControl = AS_THE_RUN


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One valid row, the run's defaults filled in.

    number: from 1.  captions: at least one, the first at chunk 0, strictly rising.
    image, video: as written, at most one of them; prefix_location: where it lies, an absolute path or an s3:// URI.
    prefix: the run's, with the row's own values.
    seconds (> 0), num_chunks (≥ 1): exactly one is set.  width, height: pixels, multiples of 16.  fps: 1…120.
    seed: 0…2^63−1.  num_steps: fits the run's window and KV ranges.  priority: higher first.
    extra: the columns magi-ray does not know, for the results.
    """

    number: int
    job_id: str
    captions: tuple[Caption, ...]
    image: str | None
    video: str | None
    prefix_location: str | None
    prefix: PrefixSettings
    seconds: float | None
    num_chunks: int | None
    width: int
    height: int
    fps: int
    seed: int
    num_steps: int
    priority: int
    tags: dict[str, str]
    extra: dict[str, Any]

    @property
    def mode(self) -> Literal["t2v", "i2v", "v2v"]:
        """What the video starts from: text alone, an image, a video."""
        return "i2v" if self.image is not None else "v2v" if self.video is not None else "t2v"

    def chunks(self, prefix_latents: int) -> int:
        """Chunks to denoise, once the latent frames of the prefix are known."""
        if self.num_chunks is not None:
            return self.num_chunks
        assert self.seconds is not None
        return chunks_for_seconds(self.seconds, self.fps, prefix_latents)


class Defaults(Frozen):
    """What a row takes where its column is null or absent, and the ``runtime`` its num_steps must fit."""

    width: int
    height: int
    fps: int
    seed: int
    num_steps: int
    num_chunks: int
    runtime: RuntimeConfig
    prefix: PrefixSettings

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The run's values. num_frames rounds up to whole chunks; frames of a prefix are not counted."""
        runtime = settings.runtime
        return cls(
            width=runtime.video_size_w,
            height=runtime.video_size_h,
            fps=runtime.fps,
            seed=runtime.seed,
            num_steps=runtime.num_steps,
            num_chunks=max(1, math.ceil(runtime.num_frames // FRAMES_PER_LATENT / LATENTS_PER_CHUNK)),
            runtime=runtime,
            prefix=settings.prefix,
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest without problems.

    digest: sha256 over the rows as written, before the run's defaults, in their order: job_id, captions (a prompt is
    a schedule of one), every other value that is not null, unknown columns included. Neither the file's bytes nor the
    order of its columns count. Media count by the words that name them: where they lie on this machine says nothing,
    and what is in them is hashed with the prefix of each video.
    table: the whole table with its own types, so that unknown columns can travel on unchanged.
    notes: what is allowed but probably not meant, a sentence each.
    """

    rows: tuple[Row, ...]
    digest: str
    table: pa.Table
    notes: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns, in the file's order."""
        return tuple(self.table.column_names)

    @property
    def unknown(self) -> pa.Table:
        """The columns magi-ray does not know, types and all, a line for each row."""
        return self.table.select(_unknown(self.table))

    def parquet(self) -> bytes:
        """The manifest as a file: what a run keeps."""
        return _encode(self.table)


# ---------------------------------------------------------------------------------------------------------------
# Reading and writing Parquet


def read_manifest(path: Path, defaults: Defaults) -> Manifest:
    """The manifest at ``path``; relative media paths start from its folder.

    Raises ManifestError, which carries every problem of every row.
    """
    try:
        data = path.read_bytes()
    except OSError as exc:
        reason = "does not exist" if isinstance(exc, FileNotFoundError) else f"cannot be read ({exc.strerror})"
        raise _refuse(str(path), [_of_file(str(path), reason, "give the path of a Parquet manifest")]) from exc
    name, again = str(path), f"magi-ray manifest validate {path}"
    table = _decode(data, name)
    problems = _table_problems(table)
    return _validate(table, defaults, base=path.parent, name=name, problems=problems, next_command=again)


def parse_manifest(
    data: bytes, defaults: Defaults, *, base: Path, name: str, media_must_exist: bool = True
) -> Manifest:
    """The manifest in ``data``, the bytes of a Parquet file. ``base``: where relative media paths start.
    ``name``: what errors call it. ``media_must_exist=False`` is for a run that is resumed: its rows were checked
    when it was submitted, and a file that went away since then is the trouble of one row.

    Raises ManifestError.
    """
    table = _decode(data, name)
    problems = _table_problems(table)
    return _validate(table, defaults, base=base, name=name, problems=problems, media_must_exist=media_must_exist)


def manifest_of(
    rows: Sequence[Mapping[str, Any]], defaults: Defaults, *, base: Path, name: str = "the rows"
) -> Manifest:
    """The manifest made of ``rows``, a dict of plain values each, keys as in ``COLUMNS``. Raises ManifestError."""
    table, problems = _tabulate(rows)
    return _validate(table, defaults, base=base, name=name, problems=problems)


def write_manifest(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes ``rows`` (as for ``manifest_of``) to a Parquet file. Their types are checked, the rules are not.

    Raises ManifestError: a value has the wrong type. InputError: the file cannot be written.
    """
    table, problems = _tabulate(rows)
    if problems:
        raise _refuse("the rows", problems, rows=len(rows))
    _store(table, path)


def _decode(data: bytes, name: str) -> pa.Table:
    """The table, with every page checksum verified: without, Arrow reads a flipped bit as another value."""
    magic = b"PAR1"
    if not data.startswith(magic):
        raise _refuse(name, [_of_file(name, "is not a Parquet file", f"make one: {_BUILD}")])
    if len(data) < 12 or not data.endswith(magic):
        raise _refuse(name, [_of_file(name, "is cut off: its end is missing", "copy or build it again")])
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        table = file.read()
    except (pa.ArrowException, OSError, ValueError) as exc:
        reason = "a page does not match its checksum" if "checksum" in str(exc).lower() else str(exc).split("\n")[0]
        raise _refuse(name, [_of_file(name, f"is damaged: {reason}", "copy or build it again")]) from exc
    found = _version(table.schema.metadata or {})
    if isinstance(found, int) and found > VERSION:
        rule = f"has version {found}, but this magi-ray reads up to {VERSION}"
        raise _refuse(name, [_of_file(name, rule, "install a newer magi-ray")])
    return table


def _version(metadata: Mapping[bytes, bytes]) -> int | None:
    try:
        mark = json.loads(metadata[METADATA_KEY])
    except (KeyError, ValueError):
        return None
    if not isinstance(mark, dict) or mark.get("schema") != SCHEMA:
        return None
    version = mark.get("version")
    return version if isinstance(version, int) and version >= 1 else None


def _encode(table: pa.Table) -> bytes:
    # Metadata of others (Hugging Face keeps its features there) stay as they are.
    mark = json.dumps({"schema": SCHEMA, "version": VERSION}).encode()
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA_KEY: mark})
    sink = io.BytesIO()
    pq.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue()


def _store(table: pa.Table, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(_encode(table))
        part.replace(path)
    except OSError as exc:
        raise InputError(f"{path} cannot be written: {exc.strerror}.", remedy="Choose another place.") from exc


# ---------------------------------------------------------------------------------------------------------------
# Plain rows to a table


def build_manifest(source: Path, out: Path, *, defaults: Defaults | None) -> int:
    """Builds the Parquet manifest ``out`` from ``source`` (.jsonl, .csv, .yaml, .yml); gives the number of rows.

    The values get the types of their columns. In CSV an empty cell is null, a schedule or tags are JSON in their
    cell, and unknown columns stay text. Relative media paths start from the folder of ``out``.
    ``defaults=None`` writes rows that break rules as well; types are always checked.

    Raises ManifestError, whose problems name the line of ``source`` too; nothing is written then.
    InputError: ``out`` cannot be written.
    """
    if out.suffix != ".parquet":
        raise InputError(f"{out} does not end in .parquet.", remedy="Name the manifest to write, e.g. -o rows.parquet.")
    lines, rows = _load(source)
    table, problems = _tabulate(rows)
    try:
        if defaults is not None:
            _validate(table, defaults, base=out.parent, name=str(source), problems=problems)
        elif problems:
            raise _refuse(str(source), problems, rows=len(rows))
    except ManifestError as exc:
        located = [
            replace(p, rule=f"{p.rule} ({source.name}:{lines[p.row - 1]})") if p.row else p for p in exc.problems
        ]
        again = f"magi-ray manifest build {source} -o {out}"
        raise _refuse(str(source), located, rows=len(rows), next_command=again) from exc
    _store(table, out)
    return len(rows)


def _load(source: Path) -> tuple[list[int], list[Mapping[str, Any]]]:
    """The rows of ``source`` and the line on which each begins."""
    readers: Mapping[str, Callable[[str], Iterator[tuple[int, Any]]]] = {
        ".jsonl": _read_jsonl, ".csv": _read_csv, ".yaml": _read_yaml, ".yml": _read_yaml,
    }  # fmt: skip
    reader = readers.get(source.suffix.lower())
    if reader is None:
        raise _refuse(str(source), [_of_file(str(source), f"ends in none of {', '.join(readers)}", f"use {_BUILD}")])
    lines: list[int] = []
    rows: list[Mapping[str, Any]] = []
    try:
        # utf-8-sig: spreadsheets begin their CSV with a byte order mark.
        for line, row in reader(source.read_text(encoding="utf-8-sig")):
            if not isinstance(row, dict) or not all(isinstance(key, str) for key in row):
                raise _UnreadableError(f"line {line}: a row must be a map from column to value, but is {_text(row)}")
            lines.append(line)
            rows.append(row)
    except OSError as exc:
        raise _refuse(
            str(source), [_of_file(str(source), f"cannot be read ({exc.strerror})", "check the path")]
        ) from exc
    except (_UnreadableError, UnicodeDecodeError, csv.Error, yaml.YAMLError) as exc:
        kind = source.suffix.lower()[1:]
        reason = " ".join(str(exc).split())
        problem = _of_file(str(source), f"is not readable as UTF-8 {kind}: {reason}", "correct it there")
        raise _refuse(str(source), [problem]) from exc
    return lines, rows


class _UnreadableError(Exception):
    pass


def _read_jsonl(text: str) -> Iterator[tuple[int, Any]]:
    # Split at line feeds alone: a prompt may hold U+2028, where splitlines would cut.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            yield line, json.loads(content, object_pairs_hook=_once)
        except ValueError as exc:
            raise _UnreadableError(f"line {line}: {exc}") from exc


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := _twice(key for key, _ in pairs):
        raise ValueError(f"{twice[0]} is there twice")
    return dict(pairs)


def _read_csv(text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = next(reader, [])
    if twice := _twice(header):
        raise _UnreadableError(f"line 1: column {twice[0]} is there twice")
    begin = reader.line_num + 1
    for cells in reader:
        if cells:
            if len(cells) != len(header):
                raise _UnreadableError(f"line {begin}: {len(cells)} cells, but the header has {len(header)}")
            yield begin, {name: _typed(name, cell) for name, cell in zip(header, cells, strict=True)}
        begin = reader.line_num + 1


def _typed(name: str, cell: str) -> Any:
    """The value of a CSV cell; one that does not parse stays text, which _tabulate then complains about."""
    wanted = COLUMNS.get(name)
    if not cell:
        return None
    if wanted is None or pa.types.is_string(wanted):
        return cell
    # JSON has the words true and false for a bool too.
    parse = int if pa.types.is_integer(wanted) else float if pa.types.is_floating(wanted) else json.loads
    try:
        return parse(cell)
    except ValueError:
        return cell


def _read_yaml(text: str) -> Iterator[tuple[int, Any]]:
    loader = yaml.SafeLoader(text)
    root = loader.get_single_node()
    if root is None:
        return
    if not isinstance(root, yaml.SequenceNode):
        raise _UnreadableError("the file must be a list of rows, each beginning with '- '")
    lines = [node.start_mark.line + 1 for node in root.value]
    yield from zip(lines, loader.construct_document(root), strict=True)


def _tabulate(rows: Sequence[Mapping[str, Any]]) -> tuple[pa.Table, list[Problem]]:
    """A table of ``rows``, columns in order of first appearance. Values of a wrong type become null and a problem."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns, problems = [], []
    for name in names:
        wanted = COLUMNS.get(name)
        cells = [row.get(name) for row in rows]
        for index, cell in enumerate(cells):
            if cell is not None and not _is(cell, wanted):
                rule = f"must be {_words(wanted)}" if wanted is not None else "is not valid Unicode"
                remedy = "put the value in quotes" if wanted == pa.string() else "correct the value"
                problems.append(_of_row(index + 1, rows[index].get("job_id"), name, _text(cell), rule, remedy))
                cells[index] = None
        if wanted is not None and pa.types.is_map(wanted):
            cells = [None if cell is None else list(cell.items()) for cell in cells]
        try:
            column = pa.array(cells, wanted)
            pq.write_table(pa.table([column[:0]], [name]), io.BytesIO())  # not every Arrow type has a Parquet one
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as exc:
            reason = str(exc).split("\n")[0]
            remedy = "give the column one type, in every row the same"
            problems.append(_of_row(0, None, name, "the values", f"do not make a Parquet column: {reason}", remedy))
            column = pa.nulls(len(rows))
        columns.append(column)
    return pa.table(columns, names), problems


def _is(value: Any, wanted: pa.DataType | None) -> bool:
    """Whether a plain value can stand in a column of type ``wanted``; None: an unknown column, any type."""
    if wanted is None or pa.types.is_string(wanted):
        if wanted is not None and not isinstance(value, str):
            return False
        return not isinstance(value, str) or not re.search("[\ud800-\udfff]", value)
    if isinstance(value, bool) or pa.types.is_boolean(wanted):
        return isinstance(value, bool) and bool(pa.types.is_boolean(wanted))
    if pa.types.is_integer(wanted):
        return isinstance(value, int) and -(2**63) <= value < 2**63
    if pa.types.is_floating(wanted):
        return isinstance(value, int | float)
    if pa.types.is_map(wanted):
        return isinstance(value, dict) and all(
            isinstance(key, str) and (item is None or _is(item, pa.string())) for key, item in value.items()
        )
    if pa.types.is_struct(wanted):
        fields = {field.name: field.type for field in wanted}
        return (
            isinstance(value, dict)
            and value.keys() <= fields.keys()
            and all(item is None or _is(item, fields[key]) for key, item in value.items())
        )
    # A null where an entry of a schedule should be is not a value; in a list of numbers a rule speaks of it.
    nulls = not pa.types.is_struct(wanted.value_type)
    return isinstance(value, list) and all((nulls and item is None) or _is(item, wanted.value_type) for item in value)


def _words(wanted: pa.DataType) -> str:
    if pa.types.is_string(wanted):
        return "text"
    if pa.types.is_integer(wanted):
        return "a whole number below 2^63"
    if pa.types.is_floating(wanted):
        return "a number"
    if pa.types.is_boolean(wanted):
        return "true or false"
    if pa.types.is_map(wanted):
        return "a map from text to text"
    return f"a list of {{start_chunk, prompt}}, each with or without {', '.join(_CONTROLS)}"


# ---------------------------------------------------------------------------------------------------------------
# The rules

Complaint = tuple[str, str, str, str]  # column, value, rule, remedy
_JOB_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUILD = "magi-ray manifest build rows.jsonl|rows.csv|rows.yaml -o rows.parquet"


@dataclass(frozen=True, kw_only=True)
class _Context:
    """What the rules need beside a row's own values. ``row_of``: the row in which each job_id was met first."""

    defaults: Defaults
    base: Path
    media_must_exist: bool
    row_of: dict[str, int]


Values = Mapping[str, Any]


def _job_id_complaints(values: Values, number: int, context: _Context) -> Iterator[Complaint]:
    job_id = values["job_id"]
    if job_id is None:
        yield "job_id", "", "is missing", "give every row a name of its own"
        return
    better = re.sub(r"[^A-Za-z0-9._-]+", "-", job_id)[:128].strip("-.") or f"row-{number}"
    if not _JOB_ID.fullmatch(job_id):
        rule = "is not 1 to 128 letters, digits, dots, hyphens or underscores"
        yield "job_id", _text(job_id), rule, f"use for example {_text(better)}"
    elif job_id in (".", ".."):
        yield "job_id", _text(job_id), "names a folder", f"use for example {_text(better)}"
    first = context.row_of.setdefault(job_id, number)
    if first != number:
        yield "job_id", _text(job_id), f"is the job_id of row {first} too", "give every row a name of its own"


def _caption_complaints(values: Values, number: int, context: _Context) -> Iterator[Complaint]:
    prompt, schedule = values["prompt"], values["schedule"]
    if prompt is None and schedule is None:
        yield "prompt", "", "is missing, and there is no schedule either", "write one of the two"
    elif prompt is not None and schedule is not None:
        rule = "stands beside a schedule, but a row has one or the other"
        yield "prompt", _text(prompt), rule, "keep prompt for one caption, schedule for several"
    elif prompt is not None:
        if not prompt.strip():
            yield "prompt", _text(prompt), "is blank", "describe what is to be seen"
    elif not schedule:
        yield "schedule", "[]", "is empty", "write at least the caption that begins at chunk 0"
    else:
        yield from _schedule_complaints(schedule)


def _schedule_complaints(schedule: Sequence[Mapping[str, Any] | None]) -> Iterator[Complaint]:
    before: int | None = None
    for place, entry in enumerate(schedule, 1):
        start, prompt = (None, None) if entry is None else (entry.get("start_chunk"), entry.get("prompt"))
        where = f"of entry {place}"
        if prompt is None or not prompt.strip():
            yield "schedule", f"prompt {_text(prompt)}", f"{where} is blank", "describe what is to be seen"
        if start is None:
            yield "schedule", "start_chunk null", f"{where} is not a number", "write the chunk at which it begins"
        elif place == 1 and start != 0:
            yield "schedule", f"start_chunk {start}", f"{where} is not 0", "begin the first caption at chunk 0"
        elif before is not None and start <= before:
            rule = f"{where} does not come after start_chunk {before} of the entry before it"
            yield "schedule", f"start_chunk {start}", rule, "sort the entries, one caption per chunk"
        before = start if start is not None else before


def _control_complaints(values: Values, number: int, context: _Context) -> Iterator[Complaint]:
    """KV ranges and guidance scales that an entry of the schedule brings."""
    runtime = context.defaults.runtime
    steps = values["num_steps"] if values["num_steps"] is not None else runtime.num_steps
    intervals = len(runtime.cfg_t_range)
    for place, entry in enumerate(values["schedule"] or (), 1):
        where = f"of entry {place}"
        reaches = (entry or {}).get("kv_range")
        if reaches is not None:
            shown = f"kv_range {_text(reaches)}"
            if not reaches:
                yield "schedule", shown, f"{where} is empty", "leave it null, or write how many chunks are seen"
            elif steps >= 1 and steps % len(reaches):
                rule = f"{where} has {len(reaches)} values, but the {steps} steps are not divisible by that"
                yield "schedule", shown, rule, f"write as many as noise2clean_kvrange has, for example {_like(runtime)}"
            if any(reach is None or reach < 1 for reach in reaches):
                rule = f"{where} has a value below 1, but a chunk always sees itself"
                yield "schedule", shown, rule, "use 1 for the chunk alone, 2 for one more, and so on"
        for name in ("text_scales", "prev_chunk_scales"):
            scales = (entry or {}).get(name)
            if scales is None:
                continue
            shown = f"{name} {_text(scales)}"
            if runtime.cfg_number != 3:
                rule = f"{where} asks for guidance, but this model has none (cfg_number {runtime.cfg_number})"
                yield "schedule", shown, rule, "leave it null, or use a base model"
                continue
            if len(scales) != intervals:
                rule = f"{where} has {len(scales)} values, but cfg_t_range has {intervals}"
                yield "schedule", shown, rule, f"write one for each of {_text(list(runtime.cfg_t_range))}"
            if any(scale is None or not math.isfinite(scale) or scale < 0 for scale in scales):
                rule = f"{where} has a value that is not a number from 0 on"
                yield "schedule", shown, rule, f"write numbers, as the run's {_text(list(getattr(runtime, name)))}"


def _like(runtime: RuntimeConfig) -> str:
    return _text(list(runtime.noise2clean_kvrange) or [5, 4, 3, 2])


def _prefix_complaints(values: Values, number: int, context: _Context) -> Iterator[Complaint]:
    frames = values["prefix_frames"]
    if frames is not None and frames < FRAMES_PER_LATENT:
        rule = f"is shorter than one latent frame, which is {FRAMES_PER_LATENT} frames"
        yield "prefix_frames", _text(frames), rule, f"use {FRAMES_PER_LATENT} or more, or an image"
    for column, field in (("prefix_from", "clip_end"), ("fit", "fit")):
        value, known = values[column], get_args(PrefixSettings.model_fields[field].annotation)
        if value is not None and value not in known:
            close = difflib.get_close_matches(value.strip().lower(), known, n=1, cutoff=0.5)
            yield column, _text(value), f"is none of {', '.join(known)}", f"use {close[0] if close else known[0]}"


def _reach_complaints(values: Values, number: int, context: _Context) -> Iterator[Complaint]:
    """Captions must begin within the video. Lengths that are wrong themselves are left to the other rules."""
    starts = [entry["start_chunk"] for entry in values["schedule"] or () if entry and entry.get("start_chunk")]
    if not starts or any(True for _ in _length_complaints(values, number, context)):
        return
    if values["seconds"] is not None:
        fps = values["fps"] if values["fps"] is not None else context.defaults.fps
        if not 1 <= fps <= MAX_FPS:
            return
        # How many frames a clip takes from its first chunk is known once it is read; at most all but one latent.
        taken = LATENTS_PER_CHUNK - 1 if values["video"] is not None else 0
        chunks = chunks_for_seconds(values["seconds"], fps, taken)
    else:
        chunks = values["num_chunks"] if values["num_chunks"] is not None else context.defaults.num_chunks
    if max(starts) >= chunks:
        rule = f"lies beyond the last chunk of the video, {chunks - 1}"
        remedy = f"begin at {chunks - 1} or before, or make the video longer"
        yield "schedule", f"start_chunk {max(starts)}", rule, remedy


def _media_complaints(values: Values, number: int, context: _Context) -> Iterator[Complaint]:
    image, video = values["image"], values["video"]
    if image is not None and video is not None:
        rule = f"stands beside video {_text(video)}, but a row begins from one or the other"
        yield "image", _text(image), rule, "leave one of the two empty"
    for column in ("image", "video"):
        written = values[column]
        if written is None:
            continue
        scheme = _scheme(written)
        url = urlsplit(written) if scheme else None
        if not written.strip():
            yield column, _text(written), "is blank", "write where the file lies, or leave the cell null"
        elif scheme not in ("", "file", "s3"):
            yield column, _text(written), f"has the scheme {scheme}, which is not read", "use a path, file:// or s3://"
        elif url is not None and scheme == "s3" and (not url.netloc or not url.path.strip("/")):
            yield column, _text(written), "does not name a bucket and a key", "write s3://bucket/key"
        elif url is not None and scheme == "file" and url.netloc not in ("", "localhost"):
            rule = f"names the machine {url.netloc}, but only files of this one are read"
            yield column, _text(written), rule, "write file:///absolute/path"
        elif scheme != "s3" and context.media_must_exist:
            place = Path(_location(written, context.base))
            try:
                if not S_ISREG(place.stat().st_mode):
                    yield column, _text(written), "is not a file", "write the path of a file"
            except (FileNotFoundError, NotADirectoryError):
                yield column, _text(written), "does not exist", f"put the file at {place}, or correct the path"
            except (OSError, ValueError) as exc:
                reason = exc.strerror if isinstance(exc, OSError) else exc
                yield column, _text(written), f"cannot be read ({reason})", "correct the path"


def _length_complaints(values: Values, number: int, context: _Context) -> Iterator[Complaint]:
    seconds, num_chunks = values["seconds"], values["num_chunks"]
    if seconds is not None and num_chunks is not None:
        rule = f"stands beside num_chunks {num_chunks}, but a row has one or the other"
        yield "seconds", _text(seconds), rule, "leave one of the two empty"
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        yield "seconds", _text(seconds), "is not a length", "write a number above 0, for example 2.5"
    if num_chunks is not None and num_chunks < 1:
        yield "num_chunks", _text(num_chunks), "is below 1", "write how many chunks of 24 frames to make"


def _size_complaints(values: Values, number: int, context: _Context) -> Iterator[Complaint]:
    for column in ("width", "height"):
        size = values[column]
        if size is not None and (size < SIZE_MULTIPLE or size % SIZE_MULTIPLE):
            remedy = nearest(max(size, 1))
            yield column, _text(size), f"is not a multiple of {SIZE_MULTIPLE}", remedy


def _range_complaints(values: Values, number: int, context: _Context) -> Iterator[Complaint]:
    for column, low, high, words in (("fps", 1, MAX_FPS, str(MAX_FPS)), ("seed", 0, MAX_SEED, "2^63 - 1")):
        value = values[column]
        if value is not None and not low <= value <= high:
            yield column, _text(value), f"is not between {low} and {words}", "use a number between them"


def _step_complaints(values: Values, number: int, context: _Context) -> Iterator[Complaint]:
    steps = values["num_steps"]
    if steps is None:
        return
    if steps < 1:
        yield "num_steps", _text(steps), "is below 1", f"use the run's {context.defaults.num_steps}"
        return
    for sentence in step_problems(steps, context.defaults.runtime):
        rule, _, remedy = sentence.removeprefix(f"num_steps is {steps}, but ").partition("; ")
        yield "num_steps", _text(steps), rule, remedy


def _tag_complaints(values: Values, number: int, context: _Context) -> Iterator[Complaint]:
    pairs = values["tags"] or ()
    for key in _twice(key for key, _ in pairs):
        yield "tags", _text(key), "is there twice", "keep one of them"
    for key, item in pairs:
        if item is None:
            yield "tags", _text(key), "has no value", "give it one, or leave the tag out"


# Columns that say of one row what the run's table [prefix] says of all.
_PREFIX_COLUMNS = {"prefix_from": "clip_end", "prefix_frames": "max_frames", "fit": "fit", "include_prefix": "include"}

# Each rule with the cells it needs.
_CHECKS: Sequence[tuple[Sequence[str], Callable[[Values, int, _Context], Iterator[Complaint]]]] = (
    (("job_id",), _job_id_complaints),
    (("prompt", "schedule"), _caption_complaints),
    (("schedule", "num_steps"), _control_complaints),
    (("schedule", "video", "seconds", "num_chunks", "fps"), _reach_complaints),
    (("image", "video"), _media_complaints),
    (("prefix_from", "prefix_frames", "fit"), _prefix_complaints),
    (("seconds", "num_chunks"), _length_complaints),
    (("width", "height"), _size_complaints),
    (("fps", "seed"), _range_complaints),
    (("num_steps",), _step_complaints),
    (("tags",), _tag_complaints),
)


def _scheme(written: str) -> str:
    found = _URI.match(written)
    return found[1].lower() if found else ""


def _location(written: str, base: Path) -> str:
    """Where a medium that breaks no rule lies: an absolute path, or an s3:// URI as it is."""
    scheme = _scheme(written)
    if scheme == "s3":
        return written
    return str(base / (unquote(urlsplit(written).path) if scheme == "file" else written))


def _row(number: int, values: Values, extra: dict[str, Any], context: _Context) -> Row:
    """The row of ``values`` that break no rule."""
    defaults = context.defaults
    seconds, num_chunks = values["seconds"], values["num_chunks"]
    if seconds is None and num_chunks is None:
        num_chunks = defaults.num_chunks
    schedule = values["schedule"] or [{"start_chunk": 0, "prompt": values["prompt"]}]
    written = values["image"] if values["image"] is not None else values["video"]
    chosen = {
        name: values[name] if values[name] is not None else getattr(defaults, name)
        for name in ("width", "height", "fps", "seed", "num_steps")
    }
    prefix = {field: values[column] for column, field in _PREFIX_COLUMNS.items() if values[column] is not None}
    return Row(
        number=number,
        job_id=values["job_id"],
        captions=tuple(_caption(entry) for entry in schedule),
        image=values["image"],
        video=values["video"],
        prefix_location=None if written is None else _location(written, context.base),
        prefix=defaults.prefix.model_copy(update=prefix),
        seconds=None if seconds is None else float(seconds),
        num_chunks=num_chunks,
        priority=values["priority"] or 0,
        tags=dict(values["tags"] or ()),
        extra=extra,
        **chosen,
    )


def _caption(entry: Mapping[str, Any]) -> Caption:
    control = {name: tuple(entry[name]) for name in _CONTROLS if entry.get(name) is not None}
    caption = Caption(start_chunk=entry["start_chunk"], prompt=entry["prompt"])
    return replace(caption, control=ChunkControl(**control)) if control else caption


def _notes(rows: Sequence[Row], logical: Sequence[Values], unknown: Iterable[str]) -> Iterator[str]:
    for name in unknown:
        close = difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.7)
        if close:
            yield f"Column {name} is not one of ours and only travels into the results. Did you mean {close[0]}?"
    for column in _PREFIX_COLUMNS:
        modes = ("t2v",) if column == "fit" else ("t2v", "i2v")
        idle = [row for row, values in zip(rows, logical, strict=True) if values[column] and row.mode in modes]
        if idle:
            count = f" ({len(idle)} rows)" if len(idle) > 1 else ""
            what = "an image or a clip" if column == "fit" else "a clip"
            yield f"Row {idle[0].number}{count} says {column}, which counts only where a video begins from {what}."
    remote = [row for row in rows if (row.prefix_location or "").startswith("s3://")]
    if remote:
        count = f" ({len(remote)} rows)" if len(remote) > 1 else ""
        yield f"Row {remote[0].number}{count} begins from an s3:// URI, which is read only when it is submitted."


def _table_problems(table: pa.Table) -> Iterator[Problem]:
    """What is wrong with the file as a whole: version, columns, types."""
    if _version(table.schema.metadata or {}) is None:
        key = METADATA_KEY.decode()
        rule = f"does not say in its metadata (key {key}) which version of the schema it has"
        yield _of_file("the file", rule, f"make it with {_BUILD}, or see manifests/README.md")
    for name in _twice(table.column_names):
        yield _of_row(0, None, name, "", "the column is there twice", "keep one of them")
    for field in table.schema:
        wanted = COLUMNS.get(field.name)
        if wanted is not None and not _fits(field.type, wanted):
            rule = f"is not {wanted}, the type of this column"
            yield _of_row(0, None, field.name, f"type {field.type}", rule, "cast the column")


def _fits(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether the values of ``found`` are those of ``wanted``, however many bits or offsets they take."""
    types = pa.types
    if types.is_null(found):
        return True
    if types.is_dictionary(found):
        return _fits(found.value_type, wanted)
    if types.is_string(wanted):
        return bool(types.is_string(found) or types.is_large_string(found) or types.is_string_view(found))
    if types.is_integer(wanted):
        return bool(types.is_integer(found))
    if types.is_boolean(wanted):
        return bool(types.is_boolean(found))
    if types.is_floating(wanted):
        return bool(types.is_floating(found) or types.is_integer(found))
    if types.is_map(wanted):
        return bool(
            types.is_map(found) and _fits(found.key_type, wanted.key_type) and _fits(found.item_type, wanted.item_type)
        )
    if types.is_struct(wanted):
        return bool(
            types.is_struct(found)
            and {field.name for field in wanted} - {field.name for field in found} <= set(_CONTROLS)
            and {field.name for field in found} <= {field.name for field in wanted}
            and all(_fits(field.type, wanted.field(field.name).type) for field in found)
        )
    is_list = types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
    return bool(is_list and _fits(found.value_type, wanted.value_type))


def _validate(
    table: pa.Table,
    defaults: Defaults,
    *,
    base: Path,
    name: str,
    problems: Iterable[Problem],
    media_must_exist: bool = True,
    next_command: str = "",
) -> Manifest:
    """Goes over every row and gives the manifest, or raises with ``problems`` and all that is found here. Rules that
    need a cell, or with row 0 a column, which ``problems`` names already are left out."""
    problems = list(problems)
    if table.num_rows == 0:
        problems.append(_of_file("the manifest", "holds no rows", "write one row for each video"))
    elif "job_id" not in table.column_names:
        problems.append(_of_row(0, None, "job_id", "", "the column is missing", "give every row a name of its own"))
    broken = {(problem.row, problem.column) for problem in problems}
    context = _Context(defaults=defaults, base=base.absolute(), media_must_exist=media_must_exist, row_of={})
    present = {column for column in COLUMNS if column in table.column_names and (0, column) not in broken}
    cells = {
        column: _values(table.column(column)) if column in present else [None] * table.num_rows for column in COLUMNS
    }
    logical = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*cells.values(), strict=True)]
    for number, values in enumerate(logical, 1):
        for needed, check in _CHECKS:
            if broken and any((row, column) in broken for row in (0, number) for column in needed):
                continue
            for column, value, rule, remedy in check(values, number, context):
                problems.append(_of_row(number, values["job_id"], column, value, rule, remedy))
    if problems:
        raise _refuse(name, problems, rows=table.num_rows, next_command=next_command)
    extras = {column: _values(table.column(column)) for column in _unknown(table)}
    rows = [
        _row(number, values, {column: extra[number - 1] for column, extra in extras.items()}, context)
        for number, values in enumerate(logical, 1)
    ]
    return Manifest(
        rows=tuple(rows), digest=_digest(rows, logical), table=table, notes=tuple(_notes(rows, logical, extras))
    )


def _digest(rows: Sequence[Row], logical: Sequence[Values]) -> str:
    """See ``Manifest.digest``. ``logical``: the values as written, without the run's defaults."""
    content = []
    for row, values in zip(rows, logical, strict=True):
        captions = [
            [caption.start_chunk, caption.prompt, *filter(None, [caption.control.model_dump(exclude_none=True)])]
            for caption in row.captions
        ]
        whole = {
            **values, **row.extra, "prompt": captions, "schedule": None,
            "seconds": row.seconds, "priority": row.priority, "tags": row.tags,
        }  # fmt: skip
        content.append({key: value for key, value in whole.items() if value is not None})
    canonical = json.dumps(
        {"schema": SCHEMA, "version": VERSION, "rows": content},
        sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain,
    )  # fmt: skip
    return hashlib.sha256(canonical.encode()).hexdigest()


def _values(column: pa.ChunkedArray) -> list[Any]:
    """The cells as plain values. Nanoseconds that Python's times cannot hold come as text."""
    try:
        return list(column.to_pylist())
    except ValueError:
        return list(column.cast(pa.string()).to_pylist())


def _unknown(table: pa.Table) -> list[str]:
    return [name for name in table.column_names if name not in COLUMNS]


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _plain(value: Any) -> Any:
    """What JSON has no form for: bytes, dates, decimals of unknown columns."""
    return value.hex() if isinstance(value, bytes) else str(value)


# ---------------------------------------------------------------------------------------------------------------
# For people


def explain(problems: Sequence[Problem], *, limit: int = 40) -> str:
    """One line for each problem, rows in order; after ``limit`` lines, how many more there are in which columns.

    For example: row 3 (job "sunset"), column width: 100 is not a multiple of 16; use 96 or 112
    """
    ordered = sorted(problems, key=lambda problem: problem.row)
    shown = ordered if len(ordered) <= limit else ordered[: limit - 1]
    lines = [_line(problem) for problem in shown]
    if rest := ordered[len(shown) :]:
        columns = Counter(problem.column or "the file" for problem in rest).most_common()
        rows = len({problem.row for problem in rest})
        lines.append(f"and {len(rest)} more in {rows} rows: " + ", ".join(f"{name} {count}" for name, count in columns))
    return "\n".join(lines)


def _line(problem: Problem) -> str:
    job = f" (job {_text(problem.job_id)})" if problem.job_id else ""
    row = f"row {problem.row}{job}" if problem.row else ""
    where = ", ".join(part for part in (row, f"column {problem.column}" if problem.column else "") if part)
    what = f"{problem.value} {problem.rule}".strip()
    return (f"{where}: " if where else "") + f"{what}; {problem.remedy}"


def table_for_show(manifest: Manifest) -> list[dict[str, Any]]:
    """The rows as JSON values, defaults filled in, for people and for ``--json``. Unknown columns come last."""
    return [
        {
            "row": row.number,
            "job_id": row.job_id,
            "mode": row.mode,
            "captions": {str(caption.start_chunk): caption.prompt for caption in row.captions},
            "controls": {
                str(caption.start_chunk): caption.control.model_dump(mode="json", exclude_none=True)
                for caption in row.captions
                if caption.control != AS_THE_RUN
            },
            "from": row.image if row.image is not None else row.video,
            "length": f"{row.seconds:g} s" if row.seconds is not None else f"{row.num_chunks} chunks",
            "size": f"{row.width}×{row.height}",
            "fps": row.fps,
            "seed": row.seed,
            "num_steps": row.num_steps,
            "priority": row.priority,
            "tags": row.tags,
            "extra": json.loads(json.dumps(row.extra, default=_plain)),
        }
        for row in manifest.rows
    ]


def _text(value: object) -> str:
    """A value as a message shows it: text in quotes, at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:56]} …" + ('"' if text.endswith('"') else "")


def _of_file(value: str, rule: str, remedy: str) -> Problem:
    return _of_row(0, None, "", value, rule, remedy)


def _of_row(row: int, job_id: object, column: str, value: str, rule: str, remedy: str) -> Problem:
    name = job_id if isinstance(job_id, str) else ""
    return Problem(row=row, job_id=name, column=column, value=value, rule=rule, remedy=remedy)


def _refuse(name: str, problems: Sequence[Problem], *, rows: int = 0, next_command: str = "") -> ManifestError:
    problems = sorted(problems, key=lambda problem: problem.row)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    bad = len({problem.row for problem in problems if problem.row})
    of = f" in {bad} of {rows} rows" if bad else ""
    message = f"{name} cannot be used: {count}{of}.\n{explain(problems)}"
    return ManifestError(message, problems, next_command=next_command)
