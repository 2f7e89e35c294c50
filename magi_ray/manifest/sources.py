"""Reads the tables that people bring: Parquet, CSV, TSV, JSON, JSON lines, YAML, Excel; one file or a folder of parts.

Text comes as plain values, which are cast to the types of their columns and checked by ``rules`` later.
"""

from __future__ import annotations

import csv
import io
import json
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import yaml

from magi_ray.errors import Problem
from magi_ray.manifest import casting, parquet
from magi_ray.manifest.bounds import MAX_BYTES, MAX_COLUMNS, MAX_DEPTH, MAX_VALUES, check_size, check_table
from magi_ray.manifest.messages import file_error, shown
from magi_ray.manifest.parquet import COLUMNS, column_meant

SUFFIXES: Mapping[str, str] = {
    ".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
    ".yaml": "yaml", ".yml": "yaml", ".xlsx": "xlsx",
}  # fmt: skip
KINDS = tuple(dict.fromkeys(SUFFIXES.values()))

# Each value takes some 30 times its characters here, or 500 bytes as a node of YAML.
_MAX_DOCUMENT_BYTES = 24 * 2**20
_MAX_YAML_NODES = 500_000
_MAX_PARTS = 10_000
_MAX_SHEET_ROWS = 2**20  # Excel's own

_MAGIC = {b"PAR1": "parquet", b"PK\x03\x04": "xlsx"}
_FOREIGN = {
    b"\x1f\x8b": ("is compressed with gzip", "unpack it first: gunzip"),
    b"\x28\xb5\x2f\xfd": ("is compressed with zstd", "unpack it first: unzstd"),
    b"\xd0\xcf\x11\xe0": ("is a workbook of an older Excel", "save it as .xlsx"),
    b"ARROW1": ("is an Arrow or Feather file", "write it as Parquet"),
    b"SQLite format 3": ("is a database", "write its table as Parquet or CSV"),
}
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A table as it was brought, before its rules are asked.

    rows: for each row its cells in the columns that are ours, as cast.  table: all of it, a line for each row.
    problems: of the table as a whole, of its unknown columns, and of files that say less than they should.
    places: where each row begins ("rows.csv:7"), where the number alone does not say it.  notes: what was understood.
    """

    rows: Sequence[Mapping[str, Any]]
    table: pa.Table
    problems: Sequence[Problem] = ()
    places: Sequence[str] = ()
    notes: Sequence[str] = ()


def of_rows(rows: Sequence[Mapping[str, Any]], *, places: Sequence[str] = (), notes: Sequence[str] = ()) -> Source:
    """``rows``: dicts of plain values."""
    cast = [
        {**row, **{name: casting.cast(row[name], COLUMNS[name]) for name in row.keys() & COLUMNS.keys()}}
        for row in rows
    ]
    table, problems = parquet.tabulate(cast)
    return Source(rows=cast, table=table, problems=problems, places=places, notes=notes)


def of_table(table: pa.Table, *, places: Sequence[str] = (), stored: bool = False) -> Source:
    """stored: of a run, for which bounds that are newer do not apply."""
    problems = list(parquet.table_problems(table))
    unusable = {problem.column for problem in problems}
    names = [name for name in COLUMNS if name in table.column_names and name not in unusable]
    rows = list(parquet.known_cells(table, names, stored=stored)) if names else [{}] * table.num_rows
    return Source(rows=rows, table=table, problems=problems, places=places)


def read(path: Path, kind: str | None = None) -> Source:
    """The table at ``path``: a file, or a folder of parts. kind: one of KINDS, where its name does not tell.

    Raises ManifestError: no such file, of another kind, not readable as what it is, too large.
    """
    try:
        parts = _parts(path) if path.is_dir() else [_Part(path=path, name=path.name)]
        kinds = sorted({SUFFIXES[part.path.suffix.lower()] for part in parts}) if path.is_dir() else []
        if len(kinds) > 1 and kind is None:
            raise file_error(str(path), f"holds tables of several kinds: {', '.join(kinds)}", "name one file")
        check_size(str(path), sum(part.path.stat().st_size for part in parts))
        read_parts = [part.read(path, kind) for part in parts]
    except OSError as exc:
        reason = "does not exist" if isinstance(exc, FileNotFoundError) else f"cannot be read ({exc.strerror})"
        raise file_error(str(path), reason, "give the path of a table") from exc
    return _joined(read_parts, str(path))


def parse(data: bytes, name: str, kind: str | None = None) -> Source:
    """The table in ``data``, which messages call ``name``. Raises ManifestError as ``read``."""
    return _joined([_raw(data, name, name.rpartition("/")[2], kind)], name)


@dataclass(frozen=True, kw_only=True)
class _Raw:
    """One file's table or rows, as they are."""

    name: str
    kind: str
    table: pa.Table | None = None
    lines: Sequence[int] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A file. name: from the folder that was given.  columns: those that folders' names hold, ``day=3``."""

    path: Path
    name: str
    columns: Mapping[str, str | None] | None = None

    def read(self, given: Path, kind: str | None) -> _Raw:
        with self.path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        raw = _raw(data, str(self.path), self.name, kind)
        own = self.columns or {}
        if raw.table is None:
            return replace(raw, rows=[{**own, **row} for row in raw.rows])
        table = raw.table
        for column, value in own.items():
            if column not in table.column_names:
                table = table.append_column(column, pa.array([value] * table.num_rows, pa.string()))
        return replace(raw, table=table)


def _parts(folder: Path, name: str = "", columns: Mapping[str, str | None] | None = None) -> list[_Part]:
    """The tables in ``folder`` in the order of their names, as Spark, polars and duckdb write them."""
    columns = columns or {}
    found: list[_Part] = []
    for path in sorted(folder.iterdir()):
        key, equals, value = path.name.partition("=")
        if path.name == "_delta_log":
            raise file_error(
                str(folder), "is a Delta table, some of whose files no longer count", "export it to Parquet"
            )
        if path.name.startswith((".", "_")):
            continue
        if path.is_dir() and equals and len(columns) < 16:
            null = value == "__HIVE_DEFAULT_PARTITION__"
            below = {**columns, unquote(key): None if null else unquote(value)}
            found += _parts(path, f"{name}{path.name}/", below)
        elif path.suffix.lower() in SUFFIXES and path.is_file():
            found.append(_Part(path=path, name=name + path.name, columns=columns))
    if not name and not found:
        raise file_error(str(folder), f"holds no table ({', '.join(SUFFIXES)})", "give the path of a table")
    if len(found) > _MAX_PARTS:
        raise file_error(str(folder), f"holds {len(found)} files; at most {_MAX_PARTS} are read", "join some of them")
    return found


def _joined(parts: Sequence[_Raw], name: str) -> Source:
    """The rows of all ``parts``, which are of one kind. Raises ManifestError."""
    tables = [part.table for part in parts if part.table is not None]
    notes = [note for part in parts for note in part.notes]
    if not tables:
        rows = [row for part in parts for row in part.rows]
        columns = len({column for row in rows for column in row})
        check_table(name, rows=len(rows), columns=columns, values=len(rows) * columns)
        return of_rows(rows, places=[f"{part.name}:{line}" for part in parts for line in part.lines], notes=notes)
    if len(tables) == 1:
        return of_table(tables[0])
    rows_in_all = sum(table.num_rows for table in tables)
    check_table(name, rows=rows_in_all, size=sum(table.nbytes for table in tables))
    places = [
        f"{part.name}, row {n + 1}" for part in parts if part.table is not None for n in range(part.table.num_rows)
    ]
    table = _concatenated(tables, parts)
    check_table(name, columns=table.num_columns, values=table.num_rows * table.num_columns)
    return of_table(table, places=places)


def _concatenated(tables: Sequence[pa.Table], parts: Sequence[_Raw]) -> pa.Table:
    """One table of all columns. Raises ManifestError: a column's types do not go together."""
    if any(table.schema != tables[0].schema for table in tables):
        tables = [_without_dictionaries(table) for table in tables]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowException, ValueError) as exc:
        rule = f"have columns of different types: {str(exc).splitlines()[0]}"
        names = f"{parts[0].name} and the other parts"
        raise file_error(names, rule, "cast the column in all of them to one type") from exc


def _without_dictionaries(table: pa.Table) -> pa.Table:
    fields = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in table.schema
    ]
    return table.cast(pa.schema(fields, table.schema.metadata))


def _raw(data: bytes, name: str, short: str, kind: str | None) -> _Raw:
    """The table in ``data``. name: for errors about the file.  short: for the places of rows."""
    check_size(name, len(data))
    kind = kind or _kind_of(data, name)
    if kind == "parquet":
        parquet.require_bounded(data, name)
        return _Raw(name=short, kind=kind, table=parquet.decode(data, name))
    notes: list[str] = []
    lines: list[int] = []
    rows: list[Mapping[str, Any]] = []
    columns: set[str] = set()
    values = 0
    if kind != "xlsx":
        _no_foreign(data, name)
    try:
        for line, row in _READERS[kind](data, notes):
            if not isinstance(row, dict) or not all(isinstance(key, str) for key in row):
                raise _UnreadableError(f"line {line}: a row must be a map from column to value, but is {shown(row)}")
            values += _values_in(row, line)
            columns.update(row)
            lines.append(line)
            rows.append(row)
            in_table = len(rows) * len(columns)
            check_table(name, rows=len(rows), columns=len(columns), values=max(values, in_table))
    except (_UnreadableError, UnicodeDecodeError, csv.Error, yaml.YAMLError, RecursionError, ValueError) as exc:
        reason = "it is nested too deeply" if isinstance(exc, RecursionError) else " ".join(str(exc).split())
        raise file_error(name, f"is not readable as {kind}: {reason}", "correct it there") from exc
    return _Raw(name=short, kind=kind, lines=lines, rows=rows, notes=[f"{short} {note}" for note in notes])


def _kind_of(data: bytes, name: str) -> str:
    """One of KINDS, by the first bytes, the name, or the first lines. Raises ManifestError."""
    for magic, kind in _MAGIC.items():
        if data.startswith(magic):
            return kind
    _no_foreign(data, name)
    if kind := SUFFIXES.get(Path(name).suffix.lower(), ""):
        return kind
    lines = (line.strip() for line in _decoded(data[:65536], [], errors="replace").split("\n"))
    first = next((line for line in lines if line and not line.startswith("#")), "")
    if first.startswith(("[", "{")) or not first:
        return "json"
    if first.startswith(("- ", "---")) or first == "-":
        return "yaml"
    if _SEPARATOR.match(first) or any(map(column_meant, next(csv.reader([first], delimiter=_delimiter(first))))):
        return "csv"
    raise file_error(name, "is of a kind that is not recognised", f"name it: --format {'|'.join(KINDS)}")


def _no_foreign(data: bytes, name: str) -> None:
    for magic, (rule, remedy) in _FOREIGN.items():
        if data.startswith(magic):
            raise file_error(name, rule, remedy)


class _UnreadableError(Exception):
    pass


def _require_small(size: int) -> None:
    if size > _MAX_DOCUMENT_BYTES:
        raise _UnreadableError(f"it has {size} bytes, at most {_MAX_DOCUMENT_BYTES} are read; write JSON lines or CSV")


def _values_in(row: Mapping[str, Any], line: int) -> int:
    """How many values ``row`` holds, those in lists and maps counted too."""
    count, inside = len(row), [(value, 2) for value in row.values() if isinstance(value, dict | list)]
    while inside:
        value, depth = inside.pop()
        if depth > MAX_DEPTH:
            raise _UnreadableError(f"line {line}: lists and maps are nested more than {MAX_DEPTH} deep")
        count += len(value)
        if count > MAX_VALUES:
            break  # which is told
        below = value.values() if isinstance(value, dict) else value
        inside += [(each, depth + 1) for each in below if isinstance(each, dict | list)]
    return count


def _decoded(data: bytes, notes: list[str], *, errors: str = "strict") -> str:
    """The text in ``data``: UTF-8, UTF-16, or else Windows-1252 (of which Latin-1 is a part), which is noted."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors)
    if b"\0" in data[:64]:
        return data.decode("utf-16-be" if data[:1] == b"\0" else "utf-16-le", errors)
    try:
        return data.decode("utf-8-sig")  # spreadsheets begin their CSV with a byte order mark
    except UnicodeDecodeError:
        notes.append("is not UTF-8 and was read as Windows-1252 (Latin-1): look whether its letters are right.")
    return data.decode("cp1252", "replace")


# JSON


def _read_jsonl(data: bytes, notes: list[str]) -> Iterator[tuple[int, Any]]:
    """A row in each line; or one list of rows, which is JSON by another name."""
    text = _decoded(data, notes)
    if text[_past_blanks(text, 0) :].startswith("["):
        yield from _read_json(data, [])
    else:
        yield from _json_lines(text)


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    # Split at line feeds alone: a prompt may hold U+2028, where splitlines would cut.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        if len(content) > casting.MAX_JSON_CHARS:
            raise _UnreadableError(
                f"line {line}: has {len(content)} characters; at most {casting.MAX_JSON_CHARS} are read"
            )
        try:
            yield line, _DECODER.decode(content)
        except RecursionError as exc:
            raise _UnreadableError(f"line {line}: is nested too deeply") from exc
        except ValueError as exc:
            raise _UnreadableError(f"line {line}: {exc}, in {shown(content.strip())}; a line is a whole row") from exc


def _read_json(data: bytes, notes: list[str]) -> Iterator[tuple[int, Any]]:
    """A list of rows; one row; rows in lines, as duckdb writes them; or columns of values by row, as pandas does."""
    _require_small(len(data))
    text = _decoded(data, notes)
    at = _past_blanks(text, 0)
    if not text[at:]:
        return
    if text[at] == "[":
        yield from _json_array(text, at)
        return
    try:
        content, end = _DECODER.raw_decode(text, at)
    except ValueError as exc:
        raise _UnreadableError(str(exc)) from exc
    if _past_blanks(text, end) < len(text):
        yield from _json_lines(text)
    elif isinstance(content, dict) and content and all(isinstance(column, dict) for column in content.values()):
        indices = list(dict.fromkeys(index for column in content.values() for index in column))
        for index in indices:
            yield 1, {name: column.get(index) for name, column in content.items()}
    elif isinstance(content, dict) and not content.keys() & COLUMNS.keys() and (inside := _lists_of_rows(content)):
        raise _UnreadableError(f"the rows are inside {inside}; that list must stand alone")
    else:
        yield 1 + text.count("\n", 0, at), content


def _lists_of_rows(content: Mapping[str, Any]) -> str:
    names = [
        name for name, value in content.items() if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    return ", ".join(map(shown, names))


def _json_array(text: str, at: int) -> Iterator[tuple[int, Any]]:
    """The elements of the array that begins at ``text[at]``, each with its line."""
    line, counted = 1, 0
    at = _past_blanks(text, at + 1)
    if closed := text[at : at + 1] == "]":
        at = _past_blanks(text, at + 1)
    while not closed:
        line, counted = line + text.count("\n", counted, at), at
        try:
            element, end = _DECODER.raw_decode(text, at)
        except RecursionError as exc:
            raise _UnreadableError(f"line {line}: is nested too deeply") from exc
        except ValueError as exc:
            raise _UnreadableError(f"line {line}: {exc}") from exc
        yield line, element
        at = _past_blanks(text, end)
        closed = text[at : at + 1] == "]"
        if not closed and text[at : at + 1] != ",":
            raise _UnreadableError(f"line {line + text.count(chr(10), counted, at)}: ',' or ']' is missing after a row")
        at = _past_blanks(text, at + 1)
    if text[at:]:
        raise _UnreadableError(f"line {1 + text.count(chr(10), 0, at)}: something follows the list of rows")


def _past_blanks(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    return found.end() if found else at


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{_repeated(key for key, _ in pairs)} is there twice")
    return found


def _json_int(digits: str) -> int | str:
    """Numbers of thousands of digits stay text, which the rules refuse."""
    return int(digits) if len(digits) < 100 else digits


_BLANKS = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeated_keys, parse_int=_json_int)


# CSV and Excel

_SEPARATOR = re.compile(r"sep=(.)\r?(\n|$)")  # Excel's way to name it
# As programs write them that do not compute, openpyxl among them.
_FORMULA_WITHOUT_VALUE = re.compile(rb"<f\b[^>]*>[^<]*</f>\s*(<v\s*/>|<v>\s*</v>)?\s*</c>")


def _read_csv(data: bytes, notes: list[str]) -> Iterator[tuple[int, Any]]:
    """Cells stay text; an empty one is null."""
    text = _decoded(data, notes)
    marked = _SEPARATOR.match(text)
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = marked[1] if marked else _delimiter(first)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)

    def lines() -> Iterator[tuple[int, list[str | None]]]:
        begin = 1
        try:
            for cells in reader:
                if not (marked and begin == 1):
                    yield begin, [cell or None for cell in cells]
                begin = reader.line_num + 1
        except csv.Error as exc:
            open_quote = "unexpected end" in str(exc)
            raise _UnreadableError(f"line {begin}: {'a quote is never closed' if open_quote else exc}") from exc

    for line, row in _records(lines(), notes):
        yield line, {name: _with_a_point(name, cell) for name, cell in row.items()} if delimiter == ";" else row


def _delimiter(header: str) -> str:
    """The character that separates the most names of columns in ``header``."""

    header = header[:10_000]

    def names(delimiter: str) -> int:
        try:
            cells = next(csv.reader([header], delimiter=delimiter))
        except csv.Error:
            return 0
        return sum(bool(column_meant(cell)) for cell in cells)

    return max((",", ";", "\t", "|"), key=lambda delimiter: (names(delimiter), header.count(delimiter)))


def _with_a_point(name: str, cell: str | None) -> str | None:
    """Where ; separates cells, a comma separates decimals."""
    is_number = name in COLUMNS and (pa.types.is_floating(COLUMNS[name]) or pa.types.is_integer(COLUMNS[name]))
    return cell.replace(",", ".") if cell and is_number and re.fullmatch(r"\s*-?\d+,\d+\s*", cell) else cell


def _read_xlsx(data: bytes, notes: list[str]) -> Iterator[tuple[int, Any]]:
    """The first sheet that is not hidden; formulas have the values they were saved with."""
    import openpyxl

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _require_small(sum(entry.file_size for entry in archive.infolist()))
            sheets = [archive.read(name) for name in archive.namelist() if name.startswith("xl/worksheets/")]
            if any(map(_FORMULA_WITHOUT_VALUE.search, sheets)):
                notes.append(
                    "has formulas without a value, which are empty here: open it in a spreadsheet program and save it."
                )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of styles and extensions, which do not matter here
            book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
            # Hidden ones come last; the others stay in order.
            first, *others = sorted(book.worksheets, key=lambda sheet: sheet.sheet_state != "visible") or [None]
            if others:
                names = ", ".join(shown(sheet.title) for sheet in others)
                notes.append(f"holds several sheets: {shown(first.title)} was read, not {names}.")
            found = [] if first is None else list(_records(_sheet(first), notes, pad=True))
    except _UnreadableError:
        raise
    except Exception as exc:  # whatever openpyxl stumbles over
        raise _UnreadableError(f"{type(exc).__name__}: {exc}") from exc
    # One column of numbers and words is usual in a sheet, but not in Parquet.
    for name in {name for _, row in found for name in row if name not in COLUMNS}:
        if len({type(row[name]) for _, row in found if row.get(name) is not None}) > 1:
            for _, row in found:
                row[name] = None if row[name] is None else str(row[name])
    yield from found


def _sheet(sheet: Any) -> Iterator[tuple[int, list[Any]]]:
    sheet.reset_dimensions()  # which files claim at their pleasure
    cells_read = 0
    for line, cells in enumerate(sheet.iter_rows(values_only=True), 1):
        cells_read += len(cells)
        if cells_read > 4 * MAX_VALUES or line > _MAX_SHEET_ROWS:  # most of them empty
            raise _UnreadableError(f"line {line}: there are too many cells; delete the empty rows and columns")
        yield line, [None if isinstance(cell, str) and not cell.strip() else cell for cell in cells]


def _records(
    lines: Iterable[tuple[int, list[Any]]], notes: list[str], *, pad: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows below the header, which is the first that is not empty. Rows of empty cells are left out.
    pad: a row may lack its last cells."""
    header: list[str] = []
    nameless: set[int] = set()
    for line, cells in lines:
        if all(cell is None or (isinstance(cell, str) and not cell.strip()) for cell in cells):
            continue
        if not header:
            header = ["" if cell is None else str(cell).strip() for cell in cells]
            if len(header) > MAX_COLUMNS:
                raise _UnreadableError(f"line {line}: there are {len(header)} columns; at most {MAX_COLUMNS} are read")
            if repeated := _repeated(filter(None, header)):
                raise _UnreadableError(f"line {line}: column {repeated} is there twice")
            continue
        while len(cells) > len(header) and cells[-1] is None:
            cells = cells[:-1]
        cells = cells + [None] * (len(header) - len(cells)) if pad else cells
        if len(cells) != len(header):
            found = f"line {line}: {len(cells)} cells, but the header has {len(header)}"
            more = "; a cell that holds the separator needs quotes" if len(cells) > len(header) and not pad else ""
            raise _UnreadableError(f"{found}, {shown(', '.join(header))}{more}")
        yield line, {name: cell for name, cell in zip(header, cells, strict=True) if name}
        nameless |= {place for place, name in enumerate(header, 1) if not name and cells[place - 1] is not None}
    if nameless:
        places = ", ".join(map(str, sorted(nameless)))
        notes.append(f"has no name for column {places}, which was left out (an index, as pandas writes it?).")


# YAML


def _read_yaml(data: bytes, notes: list[str]) -> Iterator[tuple[int, Any]]:
    _require_small(len(data))
    text = _decoded(data, notes)
    _require_bounded_yaml(text)
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.SequenceNode):
            keys = [
                str(key.value)
                for key, value in (root.value if isinstance(root, yaml.MappingNode) else ())
                if isinstance(value, yaml.SequenceNode)
            ]
            inside = f"; the list inside {', '.join(map(shown, keys))} must stand alone" if keys else ""
            raise _UnreadableError(f"the file must be a list of rows, each beginning with '- '{inside}")
        for row in root.value:
            if isinstance(row, yaml.MappingNode):
                _keep_as_written(row)
        lines = [node.start_mark.line + 1 for node in root.value]
        yield from zip(lines, loader.construct_document(root), strict=True)
    finally:
        loader.dispose()


def _require_bounded_yaml(text: str) -> None:
    """Raises _UnreadableError: nested too deeply, or with too many values, where those behind an alias count again."""
    anchors: dict[str, int] = {}
    totals, anchor_of = [0], [""]
    for event in yaml.parse(text, _Loader):
        assert event.start_mark is not None
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                raise _UnreadableError(f"line {line}: *{event.anchor} stands for itself, or for nothing")
            totals[-1] += anchors[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            totals.append(1)
            anchor_of.append(event.anchor or "")
        elif isinstance(event, yaml.CollectionEndEvent):
            total, anchor = totals.pop(), anchor_of.pop()
            anchors[anchor] = total
            totals[-1] += total
        elif isinstance(event, yaml.ScalarEvent):
            anchors[event.anchor or ""] = 1
            totals[-1] += 1
        if len(totals) > MAX_DEPTH:
            raise _UnreadableError(f"line {line}: lists and maps are nested more than {MAX_DEPTH} deep")
        if sum(totals[-2:]) > _MAX_YAML_NODES:
            rule = f"line {line}: here are more than {_MAX_YAML_NODES} values, those of aliases counted again"
            raise _UnreadableError(f"{rule}; write JSON lines")


def _keep_as_written(row: yaml.MappingNode) -> None:
    """In columns of text ``no``, ``007`` and ``2026-11-20`` are words; so are numbers of a hundred digits anywhere."""
    if repeated := _repeated(
        key.value for key, _ in row.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"
    ):
        raise _UnreadableError(f"line {row.start_mark.line + 1}: {repeated} is there twice")
    for key, value in row.value:
        wanted = COLUMNS.get(str(key.value)) if isinstance(key, yaml.ScalarNode) else None
        if isinstance(value, yaml.ScalarNode):
            is_number = value.tag.endswith((":int", ":float"))
            if (wanted == pa.string() and not value.tag.endswith(":null")) or (is_number and len(value.value) > 100):
                value.tag = "tag:yaml.org,2002:str"
        elif wanted is not None and pa.types.is_map(wanted) and isinstance(value, yaml.MappingNode):
            for part in (node for pair in value.value for node in pair):
                if isinstance(part, yaml.ScalarNode) and not part.tag.endswith((":null", ":merge")):
                    part.tag = "tag:yaml.org,2002:str"
        elif isinstance(value, yaml.MappingNode) and key.value == "<<":
            _keep_as_written(value)
        elif wanted is not None and isinstance(value, yaml.SequenceNode):
            for entry in value.value:
                if isinstance(entry, yaml.MappingNode):
                    _keep_as_written(entry)


def _repeated(names: Iterable[str]) -> str | None:
    """The first of ``names`` that is there more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


_READERS: Mapping[str, Callable[[bytes, list[str]], Iterator[tuple[int, Any]]]] = {
    "csv": _read_csv, "tsv": _read_csv, "jsonl": _read_jsonl, "json": _read_json, "yaml": _read_yaml,
    "xlsx": _read_xlsx,
}  # fmt: skip
