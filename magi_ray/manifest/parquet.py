"""Manifests as Arrow tables and Parquet files: the types of their columns, reading, writing.

A column may have any type whose values ``casting`` casts; columns that magi-ray does not know keep whatever type they
have.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from magi_ray.errors import InputError, Problem
from magi_ray.manifest import casting
from magi_ray.manifest.bounds import MAX_BYTES, check_table, too_large
from magi_ray.manifest.messages import file_error, shown
from magi_ray.settings import ChunkControl

SCHEMA = "magi-ray.manifest"
VERSION = 1
METADATA_KEY = b"magi_ray"
MAGIC = b"PAR1"
# Fields that an entry of a schedule may leave out.
CONTROLS = tuple(ChunkControl.model_fields)

_ENTRY = pa.struct({
    "start_chunk": pa.int64(), "prompt": pa.string(), "kv_range": pa.list_(pa.int64()),
    "text_scales": pa.list_(pa.float64()), "prev_chunk_scales": pa.list_(pa.float64()),
})  # fmt: skip

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


def decode(data: bytes, name: str) -> pa.Table:
    """The table in ``data``. Page checksums are verified: Arrow would read a flipped bit as another value.

    Raises ManifestError: not a Parquet file, damaged, or made by a newer magi-ray.
    """
    file = _opened(data, name)
    with _telling_damage(name):
        # Not with threads: they may outlive Python, which then aborts.
        table = file.read(use_threads=False)
    version = _version(table)
    if version is not None and version > VERSION:
        rule = f"has version {version}, but this magi-ray reads up to {VERSION}"
        raise file_error(name, rule, "install a newer magi-ray")
    if version is None:
        # The unnamed index that pandas brings along. (Manifests that name their version always counted it.)
        table = table.drop_columns([column for column in table.column_names if _PANDAS_INDEX.fullmatch(column)])
    return table


def require_bounded(data: bytes, name: str) -> None:
    """Raises ManifestError: the table in ``data`` has too many rows, columns or values, or takes too much memory; or as
    ``decode`` does.

    The file says so itself, but for texts in dictionaries, each of which may stand in any number of rows.
    """
    footer_bytes = int.from_bytes(data[-8:-4], "little")
    if data.endswith(MAGIC) and len(data) >= footer_bytes > MAX_FOOTER_BYTES:
        columns = f"is described in {footer_bytes} bytes, which are too many columns or row groups (at most "
        raise file_error(name, f"{columns}{MAX_FOOTER_BYTES})", "leave out columns that are not needed")
    meta = _opened(data, name).metadata
    groups, leaves = range(meta.num_row_groups), range(meta.num_columns)
    check_table(name, rows=meta.num_rows, columns=meta.num_columns)
    chunks = {leaf: [meta.row_group(group).column(leaf) for group in groups] for leaf in leaves}
    check_table(name, values=sum(chunk.num_values for of_leaf in chunks.values() for chunk in of_leaf))
    written = {leaf: sum(chunk.total_uncompressed_size for chunk in of_leaf) for leaf, of_leaf in chunks.items()}
    if sum(written.values()) > MAX_BYTES:
        largest = meta.schema.column(max(written, key=lambda leaf: written[leaf])).path.partition(".")[0]
        raise too_large(name, f"has {sum(written.values())} bytes; at most {MAX_BYTES} are read", column=largest)
    sizes = {
        leaf: sum(chunk.num_values * _longest(chunk, meta.schema.column(leaf)) for chunk in of_leaf)
        for leaf, of_leaf in chunks.items()
    }
    left = MAX_BYTES
    for leaf, size in sizes.items():
        if sum(sizes.values()) > MAX_BYTES and size > MAX_BYTES // len(sizes):
            with _telling_damage(name):
                left -= _decoded_bytes(data, chunks[leaf], left, name)


# 10^6 columns take 20 MB and more.
MAX_FOOTER_BYTES = 8 * 2**20
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")


def _longest(chunk: pq.ColumnChunkMetaData, leaf: pq.ColumnSchema) -> int:
    """No value of ``chunk`` takes more bytes than these."""
    if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY":
        return int(leaf.length)
    return int(chunk.total_uncompressed_size) if leaf.physical_type == "BYTE_ARRAY" else 12


def _decoded_bytes(data: bytes, chunks: Sequence[pq.ColumnChunkMetaData], most: int, name: str) -> int:
    """What the texts of one leaf take when each has its own copy. Raises ManifestError: more than ``most``."""
    path = chunks[0].path_in_schema
    # Texts that are written as differences from the one before, or as bytes of a fixed length, have no dictionary.
    indexed = all(
        chunk.physical_type == "BYTE_ARRAY" and not {"DELTA_BYTE_ARRAY"} & {*chunk.encodings} for chunk in chunks
    )
    file = _opened(data, name, read_dictionary=[path] if indexed else [])
    longest = max(chunk.total_uncompressed_size for chunk in chunks)
    rows = 16_384 if indexed else max(1, most // 4 // max(1, longest))
    total = 0
    for batch in file.iter_batches(rows, columns=[path], use_threads=False):
        total += sum(map(_bytes_in, batch.columns))
        if total > most:
            column = path.partition(".")[0]
            raise too_large(name, f"decodes to more than {MAX_BYTES // 2**20} MiB", column=column)
    return total


def _bytes_in(array: pa.Array) -> int:
    if pa.types.is_dictionary(array.type):
        lengths = pc.take(pc.binary_length(array.dictionary), array.indices)
        return int(pc.sum(lengths).as_py() or 0)
    if pa.types.is_struct(array.type):
        return sum(_bytes_in(array.field(place)) for place in range(array.type.num_fields))
    if pa.types.is_map(array.type):
        return _bytes_in(array.keys) + _bytes_in(array.items)
    return _bytes_in(array.flatten()) if pa.types.is_nested(array.type) else int(array.nbytes)


def _opened(data: bytes, name: str, **options: Any) -> pq.ParquetFile:
    if not data.startswith(MAGIC):
        raise file_error(name, "is not a Parquet file", "name its kind: --format csv, for example")
    if len(data) < 12 or not data.endswith(MAGIC):
        raise file_error(name, "is cut off: its end is missing", "copy or build it again")
    with _telling_damage(name):
        return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, **options)


@contextmanager
def _telling_damage(name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as exc:
        reason = "a page does not match its checksum" if "checksum" in str(exc).lower() else str(exc).split("\n")[0]
        raise file_error(name, f"is damaged: {reason}", "copy or build it again") from exc


def _version(table: pa.Table) -> int | None:
    """The version of the schema that the table's metadata names, if they do."""
    try:
        mark = json.loads((table.schema.metadata or {})[METADATA_KEY])
    except (KeyError, ValueError):
        return None
    if not isinstance(mark, dict) or mark.get("schema") != SCHEMA:
        return None
    version = mark.get("version")
    return version if isinstance(version, int) and version >= 1 else None


def encode(table: pa.Table) -> bytes:
    """``table`` as a Parquet file that names the version of the schema."""
    # Other programs' metadata stays as it is; Hugging Face keeps its features there.
    mark = json.dumps({"schema": SCHEMA, "version": VERSION}).encode()
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA_KEY: mark})
    sink = io.BytesIO()
    pq.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue()


def write(table: pa.Table, path: Path) -> None:
    """Write ``table`` to ``path``, whole or not at all. Raises InputError."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(encode(table))
        part.replace(path)
    except OSError as exc:
        raise InputError(f"{path} cannot be written: {exc.strerror}.", remedy="Choose another place.") from exc


def tabulate(rows: Sequence[Mapping[str, Any]]) -> tuple[pa.Table, list[Problem]]:
    """A table of plain rows, columns in order of first appearance, and what is wrong with those that magi-ray does
    not know. A column with a value of a wrong type is kept as text, which is cast again whenever it is read."""
    columns: dict[str, pa.Array] = {}
    problems: list[Problem] = []
    for name in dict.fromkeys(name for row in rows for name in row):
        wanted = COLUMNS.get(name)
        values = [row.get(name) for row in rows]
        if wanted is None and (bad := list(_not_unicode(name, rows))):
            problems += bad
            continue
        try:
            columns[name] = pa.array(values, wanted)
            pq.write_table(pa.table({name: columns[name][:0]}), io.BytesIO())  # not every Arrow type has a Parquet one
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as exc:
            if wanted is not None:
                columns[name] = pa.array([None if value is None else _as_text(value) for value in values])
                continue
            rule = "do not make a Parquet column: " + str(exc).split("\n")[0]
            remedy = "give the column one type, in every row the same"
            problems.append(Problem(column=name, value="the values", rule=rule, remedy=remedy))
    return pa.table(columns), problems


def _as_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.encode(errors="replace").decode()


def _not_unicode(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Problem]:
    for number, row in enumerate(rows, 1):
        value, job_id = row.get(name), row.get("job_id")
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            job_id, rule = job_id if isinstance(job_id, str) else "", "is not valid Unicode"
            yield Problem(
                row=number, job_id=job_id, column=name, value=shown(value), rule=rule, remedy="correct the value"
            )


def known_cells(table: pa.Table, columns: Sequence[str], *, stored: bool) -> Iterator[dict[str, Any]]:
    """A dict for each row of what its cells in ``columns``, which are ours, are cast to. stored: of a run, for which
    bounds that are newer do not apply."""
    cast = [_cast_column(table.column(name), COLUMNS[name], stored) for name in columns]
    return (dict(zip(columns, row, strict=True)) for row in zip(*cast, strict=True))


def _cast_column(column: pa.ChunkedArray, wanted: pa.DataType, stored: bool) -> list[Any]:
    values: list[Any]
    if pa.types.is_nested(column.type) and pa.types.is_list(wanted) and not stored:
        # A million entries are told without being read.
        values = [
            casting.too_many_entries(len(cell))
            if cell.is_valid and len(cell) > casting.MAX_ENTRIES
            else _plain_value(cell)
            for cell in column
        ]
    else:
        values = plain_values(column)
    if column.type == wanted and not pa.types.is_nested(wanted) and not pa.types.is_floating(wanted):
        return values
    if pa.types.is_struct(column.type):
        # A field that is null in a row is of another row.
        values = [value and {name: tag for name, tag in value.items() if tag is not None} for value in values]
    return [casting.cast(value, wanted) for value in values]


def plain_values(column: pa.ChunkedArray) -> list[Any]:
    """The cells as plain values. A column that Python's types cannot hold (nanoseconds, the year 300000) comes as text,
    with and without pandas."""
    try:
        if str(column.type).startswith(("timestamp[ns", "time64[ns")):
            # Of these pandas, where it is installed, would make types of its own.
            column = column.cast(
                pa.timestamp("us", column.type.tz) if pa.types.is_timestamp(column.type) else "time64[us]"
            )
        return list(column.to_pylist())
    except (ValueError, OverflowError, KeyError, pa.ArrowException):
        pass
    try:
        return list(column.cast(pa.string()).to_pylist())
    except (ValueError, pa.ArrowException):
        return [_plain_value(cell) for cell in column]


def _plain_value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return bytes(cell.as_buffer())
    except (ValueError, OverflowError, KeyError, pa.ArrowException):
        return str(cell)


def column_meant(name: str) -> str:
    """The column of ours that ``name`` spells, in whatever case and with whatever between the words, or ''."""
    letters = re.sub(r"[\W_]", "", name).lower()
    return next((column for column in COLUMNS if column.replace("_", "") == letters), "")


def unknown_columns(table: pa.Table) -> list[str]:
    return [name for name in table.column_names if name not in COLUMNS]


def table_problems(table: pa.Table) -> Iterator[Problem]:
    """What is wrong with the table as a whole: columns and their types."""
    for name, count in Counter(table.column_names).items():
        if count > 1:
            yield Problem(column=name, rule="the column is there twice", remedy="keep one of them")
    for field in table.schema:
        wanted = COLUMNS.get(field.name)
        if wanted is not None and not casting.is_castable(field.type, wanted):
            rule = f"cannot be cast to {wanted}, the type of this column"
            holds_files = field.name in ("image", "video") and pa.types.is_struct(field.type)  # as Hugging Face writes
            remedy = "write each as a file, and its path here" if holds_files else "cast the column"
            yield Problem(column=field.name, value=f"type {field.type}", rule=rule, remedy=remedy)
