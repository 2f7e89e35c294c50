"""Casts what other tools write to the types of our columns, where nothing is lost by it: 24.0 to 24, "true" to true, a
struct to tags. Anything else comes back as it is, and the rules refuse it with its row and value.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa

EXACT = 2**53  # up to here a float holds every whole number
MAX_ENTRIES = 10_000
MAX_JSON_CHARS = 4 * 2**20

_WHOLE = re.compile(r"[+-]?\d{1,19}", re.ASCII)
_NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf(inity)?)", re.ASCII | re.IGNORECASE)
_BOOLEANS = {"true": True, "yes": True, "1": True, "1.0": True, "false": False, "no": False, "0": False, "0.0": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class Unfit:
    """A value that cannot be used, and why. value: as messages show it."""

    value: str
    rule: str
    remedy: str


def too_many_entries(count: int) -> Unfit:
    rule = f"has {count:,} entries, but a schedule has at most {MAX_ENTRIES:,}"
    return Unfit(value="", rule=rule, remedy="write an entry only where something changes")


def cast(value: Any, wanted: pa.DataType) -> Any:
    """``value`` as a column of type ``wanted`` holds it, or ``value`` itself, or Unfit. NaN is null."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or (isinstance(value, float | Decimal) and math.isnan(value)):
        return None
    if pa.types.is_string(wanted):
        return _text(value)
    written = value
    if isinstance(value, str | bytes):
        value = value.decode(errors="replace").strip() if isinstance(value, bytes) else value.strip()
        if value.lower() in ("", "nan"):
            return None
        if pa.types.is_nested(wanted):
            written = value = _from_text(value)
    if pa.types.is_map(wanted):
        return _tags(value, wanted)
    if pa.types.is_list(wanted):
        return _list(value, wanted.value_type)
    if pa.types.is_struct(wanted):
        return _struct(value, wanted)
    number = _NUMBERS[wanted](value)
    return written if number is None else number


def is_castable(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether ``cast`` may make ``wanted`` of some values of type ``found``."""
    types = pa.types
    if isinstance(found, pa.BaseExtensionType):
        found = found.storage_type
    if types.is_dictionary(found):
        return is_castable(found.value_type, wanted)
    is_text = types.is_string(found) or types.is_large_string(found) or types.is_string_view(found)
    is_bytes = types.is_binary(found) or types.is_large_binary(found) or types.is_binary_view(found)
    if types.is_null(found) or is_text or is_bytes or types.is_fixed_size_binary(found):
        return True
    is_list = types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
    is_list = is_list or types.is_list_view(found) or types.is_large_list_view(found)
    if types.is_nested(wanted):
        return bool(is_list or types.is_map(found) or (types.is_map(wanted) and types.is_struct(found)))
    is_number = types.is_integer(found) or types.is_floating(found) or types.is_decimal(found)
    return bool(is_number or types.is_boolean(found))


def _text(value: Any) -> Any:
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float) and value.is_integer() and abs(value) <= EXACT:
        value = int(value)
    if isinstance(value, int) and abs(value) < 2**64:
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    if isinstance(value, Decimal) and value.is_finite() and abs(value.adjusted()) < 100:
        return f"{value.normalize():f}"
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value


def _int(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value)
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, float) and not (value.is_integer() and abs(value) <= EXACT):
        return None
    # Its exponent first: a whole number may have a billion digits.
    if isinstance(value, Decimal) and not (value.is_finite() and value.adjusted() < 20 and value == int(value)):
        return None
    return int(value) if isinstance(value, int | float | Decimal) else None


def _float(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return float(value) if _NUMBER.fullmatch(value) else None
    if isinstance(value, int) and abs(value) > EXACT:
        return None
    if isinstance(value, Decimal) and Decimal(repr(float(value))) != value:
        return None
    return float(value) if isinstance(value, int | float | Decimal) else None


def _bool(value: Any) -> bool | None:
    if isinstance(value, str):
        return _BOOLEANS.get(value.lower())
    return bool(value) if isinstance(value, int | float | Decimal) and value in (0, 1) else None


def _from_text(text: str) -> Any:
    """What the JSON in ``text`` says, or the Python in which pandas writes lists into CSV; else ``text`` or Unfit."""
    if len(text) > MAX_JSON_CHARS:
        rule = f"are more than the {MAX_JSON_CHARS} that a cell may hold"
        return Unfit(value=f"{len(text)} characters", rule=rule, remedy="leave out what is not needed")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return text


def _list(value: Any, item: pa.DataType) -> Any:
    return [cast(found, item) for found in value] if isinstance(value, list | tuple) else value


def _struct(value: Any, wanted: pa.StructType) -> Any:
    if isinstance(value, list) and _are_pairs(value):  # a map, as Arrow has it
        value = dict(value)
    if not isinstance(value, dict):
        return value
    types = {field.name: field.type for field in wanted}
    # A field that is none of ours is left for the rules to refuse, unless it says nothing in this row.
    return {
        name: cast(found, types[name]) if name in types else found
        for name, found in value.items()
        if name in types or found is not None
    }


def _tags(value: Any, wanted: pa.MapType) -> Any:
    if isinstance(value, dict):
        value = list(value.items())
    elif isinstance(value, list) and all(isinstance(pair, dict) and set(pair) == {"key", "value"} for pair in value):
        value = [(pair["key"], pair["value"]) for pair in value]
    if not isinstance(value, list) or not _are_pairs(value):
        return value
    return [(cast(key, wanted.key_type), cast(tag, wanted.item_type)) for key, tag in value]


def _are_pairs(value: list[Any]) -> bool:
    return all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value)


_NUMBERS: dict[pa.DataType, Callable[[Any], Any]] = {pa.int64(): _int, pa.float64(): _float, pa.bool_(): _bool}
