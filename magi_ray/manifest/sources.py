"""Rows from text files: JSON lines, CSV, YAML. They come as plain values, which ``rules`` checks later."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from magi_ray.manifest.messages import BUILD, file_error, shown
from magi_ray.manifest.parquet import COLUMNS


def load(source: Path) -> tuple[list[int], list[dict[str, Any]]]:
    """The line on which each row of ``source`` (.jsonl, .csv, .yaml, .yml) begins, and the rows.

    In CSV an empty cell is null, a schedule or tags are JSON in their cell, and unknown columns stay text.
    Raises ManifestError: another kind of file, or not readable as what it is.
    """
    readers: Mapping[str, Callable[[str], Iterator[tuple[int, Any]]]] = {
        ".jsonl": _read_jsonl, ".csv": _read_csv, ".yaml": _read_yaml, ".yml": _read_yaml,
    }  # fmt: skip
    name, kind = str(source), source.suffix.lower()
    reader = readers.get(kind)
    if reader is None:
        raise file_error(name, f"ends in none of {', '.join(readers)}", f"use {BUILD}")
    lines: list[int] = []
    rows: list[dict[str, Any]] = []
    try:
        # utf-8-sig: spreadsheets begin their CSV with a byte order mark.
        for line, row in reader(source.read_text(encoding="utf-8-sig")):
            if not isinstance(row, dict) or not all(isinstance(key, str) for key in row):
                raise _UnreadableError(f"line {line}: a row must be a map from column to value, but is {shown(row)}")
            lines.append(line)
            rows.append(row)
    except OSError as exc:
        raise file_error(name, f"cannot be read ({exc.strerror})", "check the path") from exc
    except (_UnreadableError, UnicodeDecodeError, csv.Error, yaml.YAMLError) as exc:
        rule = f"is not readable as UTF-8 {kind[1:]}: {' '.join(str(exc).split())}"
        raise file_error(name, rule, "correct it there") from exc
    return lines, rows


class _UnreadableError(Exception):
    pass


def _read_jsonl(text: str) -> Iterator[tuple[int, Any]]:
    # Split at line feeds alone: a prompt may hold U+2028, where splitlines would cut.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            yield line, json.loads(content, object_pairs_hook=_without_repeated_keys)
        except ValueError as exc:
            raise _UnreadableError(f"line {line}: {exc}") from exc


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if repeated := _repeated(key for key, _ in pairs):
        raise ValueError(f"{repeated} is there twice")
    return dict(pairs)


def _read_csv(text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = next(reader, [])
    if repeated := _repeated(header):
        raise _UnreadableError(f"line 1: column {repeated} is there twice")
    begin = reader.line_num + 1
    for cells in reader:
        if cells:
            if len(cells) != len(header):
                raise _UnreadableError(f"line {begin}: {len(cells)} cells, but the header has {len(header)}")
            yield begin, {name: _typed(name, cell) for name, cell in zip(header, cells, strict=True)}
        begin = reader.line_num + 1


def _typed(name: str, cell: str) -> Any:
    """The value of a CSV cell. One that does not parse stays text, and the rules refuse it."""
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


def _repeated(names: Iterable[str]) -> str | None:
    """The first of ``names`` that is there more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)
