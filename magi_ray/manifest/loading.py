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
from magi_ray.manifest.messages import file_error, manifest_error
from magi_ray.manifest.parquet import COLUMNS, CONTROLS, SCHEMA, VERSION
from magi_ray.manifest.rows import Caption, Defaults, Manifest, Row, plain
from magi_ray.manifest.rules import PREFIX_COLUMNS, Cells, Checked, Context, Entry, check, location, notes
from magi_ray.settings import AS_THE_RUN, ChunkControl, PrefixSettings


def read_manifest(path: Path, defaults: Defaults, *, strict: bool = True) -> Manifest:
    """The manifest at ``path``; relative media paths start from its folder.

    strict: raises ManifestError, which carries every problem of every row. Otherwise only for what is no table:
    other problems are in the manifest, and whether media exist is left to ``render.runs.submission``.
    """
    name = str(path)
    try:
        data = path.read_bytes()
    except OSError as exc:
        reason = "does not exist" if isinstance(exc, FileNotFoundError) else f"cannot be read ({exc.strerror})"
        raise file_error(name, reason, "give the path of a Parquet manifest") from exc
    manifest = _of_table(parquet.decode(data, name), _context(defaults, path.parent, media_must_exist=strict))
    if strict:
        require_valid(manifest, name, next_command=magi_ray_command("manifest", "validate", str(path)))
    return manifest


def parse_manifest(
    data: bytes, defaults: Defaults, *, base: Path, name: str, stored: bool = False, left_out: Sequence[Problem] = ()
) -> Manifest:
    """The manifest in ``data``, the bytes of a Parquet file. ``base``: where relative media paths start.
    ``name``: what errors call it. ``stored`` is for a run that is resumed: its rows were checked when it was submitted,
    and a file that is gone by now fails one row only. left_out: the problems that rows were left out for then.

    Raises ManifestError, which carries every problem of every other row.
    """
    context = _context(defaults, base, media_must_exist=not stored, stored=stored)
    manifest = _of_table(parquet.decode(data, name), context)
    known = {problem.row for problem in left_out}
    require_valid(replace(manifest, problems=tuple(p for p in manifest.problems if p.row not in known)), name)
    return replace(manifest, problems=()).without(left_out)


def manifest_of(
    rows: Sequence[Mapping[str, Any]], defaults: Defaults, *, base: Path, name: str = "the rows", strict: bool = True
) -> Manifest:
    """The manifest made of ``rows``, dicts of plain values with keys as in ``COLUMNS``. strict: as ``read_manifest``.

    Raises ManifestError.
    """
    context = _context(defaults, base, media_must_exist=strict)
    checked, table = _checked(rows, context)
    manifest = _manifest(checked, table, context)
    if strict:
        require_valid(manifest, name)
    return manifest


def require_valid(manifest: Manifest, name: str, *, next_command: str = "") -> None:
    """Raises ManifestError with every problem of ``manifest``, which messages call ``name``, if it has any."""
    if not manifest.problems:
        return
    error = manifest_error(name, manifest.problems, rows=manifest.table.num_rows, next_command=next_command)
    if manifest.rows:
        good = len(manifest.rows)
        error.remedy = (
            f"Correct the rows, then run the command again; or render the other {good} now: submit --skip-invalid."
        )
    raise error


def write_manifest(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes ``rows`` (as for ``manifest_of``) to a Parquet file. Their types are checked, the rules are not.

    Raises ManifestError: a value has the wrong type. InputError: the file cannot be written.
    """
    checked, table = _checked(rows, None)
    if checked.problems:
        raise manifest_error("the rows", checked.problems, rows=len(rows))
    parquet.write(table, path)


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
    lines, rows = sources.load(source)
    checked, table = _checked(rows, None if defaults is None else _context(defaults, out.parent))
    if checked.problems:
        located = [
            replace(found, rule=f"{found.rule} ({source.name}:{lines[found.row - 1]})") if found.row else found
            for found in checked.problems
        ]
        again = magi_ray_command("manifest", "build", str(source), "-o", str(out))
        raise manifest_error(str(source), located, rows=len(rows), next_command=again)
    parquet.write(table, out)
    return len(rows)


def _context(defaults: Defaults, base: Path, *, media_must_exist: bool = True, stored: bool = False) -> Context:
    return Context(defaults=defaults, base=base.absolute(), media_must_exist=media_must_exist, stored=stored)


def _checked(rows: Sequence[Mapping[str, Any]], context: Context | None) -> tuple[Checked, pa.Table]:
    """The checked cells and the table of plain rows. Without a context only types are checked."""
    problems = [] if context is None else list(_missing(len(rows), {name for row in rows for name in row}))
    checked = check(rows, context, unusable={problem.column for problem in problems})
    table, unfit = parquet.tabulate(rows, skip={problem.column for problem in checked.problems})
    return replace(checked, problems=[*problems, *unfit, *checked.problems]), table


def _of_table(table: pa.Table, context: Context) -> Manifest:
    """The manifest in ``table``, with its problems."""
    problems = [*parquet.table_problems(table), *_missing(table.num_rows, set(table.column_names))]
    unusable = {problem.column for problem in problems if problem.column in COLUMNS}
    names = [column for column in COLUMNS if column in table.column_names and column not in unusable]
    columns = [parquet.plain_values(table.column(column)) for column in names]
    rows = (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
    checked = check(rows, context, unusable=unusable)
    return _manifest(replace(checked, problems=[*problems, *checked.problems]), table, context)


def _missing(rows: int, columns: set[str]) -> Iterator[Problem]:
    if rows == 0:
        yield Problem(value="the manifest", rule="holds no rows", remedy="write one row for each video")
    elif "job_id" not in columns:
        yield Problem(column="job_id", rule="the column is missing", remedy="give every row a name of its own")


def _manifest(checked: Checked, table: pa.Table, context: Context) -> Manifest:
    """The manifest of ``checked`` rows; ``table`` holds the unknown columns."""
    usable = all(problem.row for problem in checked.problems)
    names = parquet.unknown_columns(table) if usable else []
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
        notes=tuple(notes(checked.cells, unknown)),
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
        whole[row.number] = {**vars(checked.cells[row.number]), **row.extra, **own}
    for row in manifest.unfit:
        whole[row.number] = {**checked.written[row.number], **row.extra}
    content = [{key: value for key, value in whole[n].items() if value is not None} for n in sorted(whole)]
    canonical = json.dumps(
        {"schema": SCHEMA, "version": VERSION, "rows": content},
        sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=plain,
    )  # fmt: skip
    return hashlib.sha256(canonical.encode()).hexdigest()
