"""Manifests as Arrow tables and Parquet files: the types of their columns, reading, writing.

A column may have any type that holds the same values (``int8`` for ``int64``, a dictionary for text); columns that
magi-ray does not know keep whatever type they have.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from magi_ray.errors import InputError, Problem
from magi_ray.manifest.messages import BUILD, file_error, shown
from magi_ray.settings import ChunkControl

SCHEMA = "magi-ray.manifest"
VERSION = 1
METADATA_KEY = b"magi_ray"
# Fields that an entry of a schedule may leave out, and its Parquet type may lack.
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
    magic = b"PAR1"
    if not data.startswith(magic):
        raise file_error(name, "is not a Parquet file", f"make one: {BUILD}")
    if len(data) < 12 or not data.endswith(magic):
        raise file_error(name, "is cut off: its end is missing", "copy or build it again")
    try:
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
    except (pa.ArrowException, OSError, ValueError) as exc:
        reason = "a page does not match its checksum" if "checksum" in str(exc).lower() else str(exc).split("\n")[0]
        raise file_error(name, f"is damaged: {reason}", "copy or build it again") from exc
    found = _version(table)
    if found is not None and found > VERSION:
        rule = f"has version {found}, but this magi-ray reads up to {VERSION}"
        raise file_error(name, rule, "install a newer magi-ray")
    return table


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


def tabulate(rows: Sequence[Mapping[str, Any]], *, skip: Collection[str]) -> tuple[pa.Table, list[Problem]]:
    """A table of plain rows, columns in order of first appearance, and what is wrong with those that magi-ray does
    not know. ``skip``: columns to leave out, because their values have wrong types."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in skip]
    columns: dict[str, pa.Array] = {}
    problems: list[Problem] = []
    for name in names:
        wanted = COLUMNS.get(name)
        values = [row.get(name) for row in rows]
        if wanted is not None and pa.types.is_map(wanted):
            values = [
                None if value is None else list(value.items() if isinstance(value, dict) else value) for value in values
            ]
        if wanted is None and (bad := list(_not_unicode(name, rows))):
            problems += bad
            continue
        try:
            columns[name] = pa.array(values, wanted)
            pq.write_table(pa.table({name: columns[name][:0]}), io.BytesIO())  # not every Arrow type has a Parquet one
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as exc:
            rule = "do not make a Parquet column: " + str(exc).split("\n")[0]
            remedy = "give the column one type, in every row the same"
            problems.append(Problem(column=name, value="the values", rule=rule, remedy=remedy))
    return pa.table(columns), problems


def _not_unicode(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Problem]:
    for number, row in enumerate(rows, 1):
        value, job_id = row.get(name), row.get("job_id")
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            job_id, rule = job_id if isinstance(job_id, str) else "", "is not valid Unicode"
            yield Problem(
                row=number, job_id=job_id, column=name, value=shown(value), rule=rule, remedy="correct the value"
            )


def plain_values(column: pa.ChunkedArray) -> list[Any]:
    """The cells as plain values. Nanoseconds that Python's times cannot hold come as text."""
    try:
        return list(column.to_pylist())
    except ValueError:
        return list(column.cast(pa.string()).to_pylist())


def unknown_columns(table: pa.Table) -> list[str]:
    return [name for name in table.column_names if name not in COLUMNS]


def table_problems(table: pa.Table) -> Iterator[Problem]:
    """What is wrong with the table as a whole: version, columns, types."""
    if _version(table) is None:
        rule = f"does not say in its metadata (key {METADATA_KEY.decode()}) which version of the schema it has"
        yield Problem(value="the file", rule=rule, remedy=f"make it with {BUILD}, or see manifests/README.md")
    for name, count in Counter(table.column_names).items():
        if count > 1:
            yield Problem(column=name, rule="the column is there twice", remedy="keep one of them")
    for field in table.schema:
        wanted = COLUMNS.get(field.name)
        if wanted is not None and not _fits(field.type, wanted):
            rule = f"is not {wanted}, the type of this column"
            yield Problem(column=field.name, value=f"type {field.type}", rule=rule, remedy="cast the column")


def _fits(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether ``found`` holds the values of ``wanted``, in however many bits and with whatever offsets."""
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
            and {field.name for field in wanted} - {field.name for field in found} <= set(CONTROLS)
            and {field.name for field in found} <= {field.name for field in wanted}
            and all(_fits(field.type, wanted.field(field.name).type) for field in found)
        )
    is_list = types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
    return bool(is_list and _fits(found.value_type, wanted.value_type))
