"""Reads manifests, makes them of plain rows, writes them: a table whose rows are checked becomes a ``Manifest``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from magi_ray.errors import InputError, Problem, magi_ray_command
from magi_ray.manifest import parquet, sources
from magi_ray.manifest.messages import manifest_error, shown
from magi_ray.manifest.parquet import COLUMNS, CONTROLS, SCHEMA, VERSION, column_meant, unknown_columns
from magi_ray.manifest.rows import Caption, Defaults, Manifest, Row, plain
from magi_ray.manifest.rules import PREFIX_COLUMNS, Cells, Checked, Context, Entry, check, location, notes
from magi_ray.manifest.sources import Source
from magi_ray.settings import AS_THE_RUN, ChunkControl, PrefixSettings


def read_manifest(path: Path, defaults: Defaults, *, kind: str | None = None, strict: bool = True) -> Manifest:
    """The manifest in the table at ``path``, a file or a folder of parts; relative media paths start from its folder.

    kind: one of KINDS, where the file's name does not tell.

    strict: raises ManifestError, which carries every problem of every row. Otherwise only for what is no table:
    other problems are in the manifest, and whether media exist is left to ``render.runs.submission``.
    """
    manifest = _manifest(
        sources.read(path, kind),
        _context(defaults, path if path.is_dir() else path.parent, media_must_exist=strict),
    )
    if strict:
        require_valid(manifest, str(path), next_command=magi_ray_command("manifest", "validate", str(path)))
    return manifest


def manifest_of_bytes(
    data: bytes, defaults: Defaults, *, base: Path | str, name: str, kind: str | None = None, strict: bool = True
) -> Manifest:
    """The manifest in the table that ``data`` holds. ``base``: where relative media paths start, a path or
    s3://bucket/folder. ``name``: what errors call it; where neither its end nor ``kind`` tells the kind, the first
    lines do. strict: as ``read_manifest``.

    Raises ManifestError.
    """
    manifest = _manifest(sources.parse(data, name, kind), _context(defaults, base, media_must_exist=strict))
    if strict:
        require_valid(manifest, name)
    return manifest


def parse_manifest(
    data: bytes, defaults: Defaults, *, base: Path, name: str, stored: bool = False, left_out: Sequence[Problem] = ()
) -> Manifest:
    """The manifest in ``data``, the bytes of the Parquet file that a run keeps. ``base``: where relative media paths
    start. ``name``: what errors call it. ``stored`` is for a run that is resumed: its rows were checked when it was
    submitted, and a file that is gone by now fails one row only. left_out: the problems that rows were left out for
    then.

    Raises ManifestError, which carries every problem of every other row.
    """
    context = _context(defaults, base, media_must_exist=not stored, stored=stored)
    manifest = _manifest(sources.of_table(parquet.decode(data, name), stored=stored), context)
    known = {problem.row for problem in left_out}
    require_valid(replace(manifest, problems=tuple(p for p in manifest.problems if p.row not in known)), name)
    return replace(manifest, problems=()).without(left_out)


def manifest_of_table(
    table: pa.Table, defaults: Defaults, *, base: Path, name: str = "the table", strict: bool = True
) -> Manifest:
    """The manifest in an Arrow table, whose columns may have any types that ``casting`` casts. strict: as
    ``read_manifest``. Raises ManifestError."""
    manifest = _manifest(sources.of_table(table), _context(defaults, base, media_must_exist=strict))
    if strict:
        require_valid(manifest, name)
    return manifest


def manifest_of(
    rows: Sequence[Mapping[str, Any]], defaults: Defaults, *, base: Path, name: str = "the rows", strict: bool = True
) -> Manifest:
    """The manifest made of ``rows``, dicts of plain values with keys as in ``COLUMNS``. strict: as ``read_manifest``.

    Raises ManifestError.
    """
    manifest = _manifest(sources.of_rows(rows), _context(defaults, base, media_must_exist=strict))
    if strict:
        require_valid(manifest, name)
    return manifest


def require_valid(manifest: Manifest, name: str, *, next_command: str = "") -> None:
    """Raises ManifestError with every problem of ``manifest``, which messages call ``name``, if it has any."""
    if not manifest.problems:
        return
    problems = _located(manifest.problems, manifest.places)
    error = manifest_error(name, problems, rows=manifest.table.num_rows, next_command=next_command)
    if manifest.rows:
        good = len(manifest.rows)
        error.remedy = (
            f"Correct the rows, then run the command again; or render the other {good} now: submit --skip-invalid."
        )
    raise error


def _located(problems: Sequence[Problem], places: Sequence[str]) -> Sequence[Problem]:
    """``problems`` with the place of each row in its text file."""
    if not places:
        return problems
    return [
        replace(found, rule=f"{found.rule} ({places[found.row - 1]})") if found.row else found for found in problems
    ]


def write_manifest(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes ``rows`` (as for ``manifest_of``) to a Parquet file. Their types are checked, the rules are not.

    Raises ManifestError: a value has the wrong type. InputError: the file cannot be written.
    """
    source = sources.of_rows(rows)
    _require_types(_checked(source, None), source, "the rows")
    parquet.write(source.table, path)


def _require_types(checked: Checked, source: Source, name: str, *, next_command: str = "") -> None:
    if checked.problems:
        problems = _located(checked.problems, source.places)
        raise manifest_error(name, problems, rows=len(source.rows), next_command=next_command)


def build_manifest(
    path: Path, out: Path, *, defaults: Defaults | None, kind: str | None = None
) -> tuple[int, Sequence[str]]:
    """Builds the Parquet manifest ``out`` from the table at ``path``; gives the number of rows, and notes.

    The values get the types of their columns; relative media paths start from the folder of ``out``.
    ``defaults=None`` writes rows that break rules as well; types are always checked.

    Raises ManifestError, whose problems name the line of the table too; nothing is written then.
    InputError: ``out`` cannot be written.
    """
    if out.suffix != ".parquet":
        raise InputError(f"{out} does not end in .parquet.", remedy="Name the manifest to write, e.g. -o rows.parquet.")
    source = sources.read(path, kind)
    checked = _checked(source, None if defaults is None else _context(defaults, out.parent))
    again = magi_ray_command("manifest", "build", str(path), "-o", str(out))
    _require_types(checked, source, str(path), next_command=again)
    parquet.write(source.table, out)
    return len(source.rows), source.notes


def _context(defaults: Defaults, base: Path | str, *, media_must_exist: bool = True, stored: bool = False) -> Context:
    base = base.absolute() if isinstance(base, Path) else base
    return Context(defaults=defaults, base=base, media_must_exist=media_must_exist, stored=stored)


def _checked(source: Source, context: Context | None) -> Checked:
    """The checked cells, with the problems of the table too. Without a context only types are checked."""
    problems = [*source.problems, *([] if context is None else _missing(source.table))]
    checked = check(source.rows, context, unusable={problem.column for problem in problems} & COLUMNS.keys())
    return replace(checked, problems=[*problems, *checked.problems])


def _missing(table: pa.Table) -> Iterator[Problem]:
    columns = set(table.column_names)
    meant = {column_meant(name): name for name in table.column_names if name not in COLUMNS}
    if table.num_rows == 0:
        yield Problem(value="the manifest", rule="holds no rows", remedy="write one row for each video")
        return
    if "job_id" not in columns:
        remedy = f"rename column {shown(meant['job_id'])}" if "job_id" in meant else "give every row a name of its own"
        yield Problem(column="job_id", rule="the column is missing", remedy=remedy)
    spelled = next((column for column in ("prompt", "schedule") if column in meant), "")
    if spelled and not columns & {"prompt", "schedule"}:
        remedy = f"rename column {shown(meant[spelled])}"
        yield Problem(column=spelled, rule="the column is missing", remedy=remedy)


def _manifest(source: Source, context: Context) -> Manifest:
    """The manifest in ``source``, with its problems."""
    checked, table = _checked(source, context), source.table
    usable = all(problem.row for problem in checked.problems)
    names = unknown_columns(table) if usable else []
    unknown = {name: parquet.plain_values(table.column(name)) for name in names}

    def rows(cells: Mapping[int, Cells]) -> tuple[Row, ...]:
        return tuple(
            _row(number, written, {name: values[number - 1] for name, values in unknown.items()}, context)
            for number, written in cells.items()
        )

    manifest = Manifest(
        rows=rows(checked.cells),
        unfit=rows(checked.unfit),
        problems=(),
        digest="",
        table=table,
        places=tuple(source.places),
        notes=(*source.notes, *notes(checked.cells, unknown)),
    )
    return replace(manifest, digest=_digest(manifest, checked)).without(checked.problems)


def _row(number: int, cells: Cells, extra: dict[str, Any], context: Context) -> Row:
    """The row of ``cells`` that break no rule. Those of an unfit row may lack a name and captions."""
    defaults = context.defaults

    def chosen(own: int | None, default: int) -> int:
        return default if own is None else own

    written = cells.video if cells.image is None else cells.image
    prefix_cells = {field: getattr(cells, column) for column, field in PREFIX_COLUMNS.items()}
    own = {field: value for field, value in prefix_cells.items() if value is not None}
    return Row(
        number=number,
        job_id=cells.job_id or "",
        captions=_captions(cells),
        image=cells.image,
        video=cells.video,
        prefix_location=None if written is None else location(written, context.base),
        prefix=PrefixSettings.model_validate(defaults.prefix.model_dump() | own) if own else defaults.prefix,
        seconds=cells.seconds,
        num_chunks=chosen(cells.num_chunks, defaults.num_chunks) if cells.seconds is None else None,
        width=chosen(cells.width, defaults.width),
        height=chosen(cells.height, defaults.height),
        fps=chosen(cells.fps, defaults.fps),
        seed=chosen(cells.seed, defaults.seed),
        num_steps=chosen(cells.num_steps, defaults.num_steps),
        priority=chosen(cells.priority, 0),
        tags={key: value for key, value in cells.tags or () if value is not None},
        extra=extra,
    )


def _captions(cells: Cells) -> tuple[Caption, ...]:
    if cells.schedule is None:
        return (Caption(start_chunk=0, prompt=cells.prompt or ""),)
    return tuple(_caption(entry) for entry in cells.schedule)


def _caption(entry: Entry) -> Caption:
    assert entry.start_chunk is not None
    assert entry.prompt is not None
    own = {name: value for name in CONTROLS if (value := getattr(entry, name)) is not None}
    control = ChunkControl(**own) if own else AS_THE_RUN
    return Caption(start_chunk=entry.start_chunk, prompt=entry.prompt, control=control)


def _digest(manifest: Manifest, checked: Checked) -> str:
    """See ``Manifest.digest``. ``checked``: the values as written, without the run's defaults."""
    whole: dict[int, dict[str, Any]] = {}
    for row in manifest.rows:
        captions = [
            [caption.start_chunk, caption.prompt, *filter(None, [caption.control.model_dump(exclude_none=True)])]
            for caption in row.captions
        ]
        own = {"prompt": captions, "schedule": None, "priority": row.priority, "tags": row.tags}
        # Where media lie does not count: what they show is hashed when they are read.
        written = checked.cells[row.number]
        own |= {name: True for name in ("image", "video") if getattr(written, name) is not None}
        whole[row.number] = {**vars(written), **row.extra, **own}
    for row in manifest.unfit:
        whole[row.number] = {**checked.written[row.number], **row.extra}
    content = [{key: value for key, value in whole[n].items() if value is not None} for n in sorted(whole)]
    canonical = json.dumps(
        {"schema": SCHEMA, "version": VERSION, "rows": content},
        sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=plain,
    )  # fmt: skip
    return hashlib.sha256(canonical.encode()).hexdigest()
