"""How large a manifest may be, so that a hostile or mistaken one is told within seconds and below 1 GB of memory."""

from __future__ import annotations

from magi_ray.errors import ManifestError, Problem
from magi_ray.manifest.messages import manifest_error

MAX_BYTES = 256 * 2**20  # of a file, and of its table in memory
MAX_ROWS = 200_000
MAX_COLUMNS = 1000
MAX_VALUES = 5_000_000  # those in lists, structs and maps counted one by one
MAX_DEPTH = 32  # of lists and maps in each other


def check_size(name: str, size: int, most: int = MAX_BYTES) -> None:
    """Raises ManifestError: a file of ``size`` bytes is too large."""
    if size > most:
        raise too_large(name, f"has {size} bytes or more; at most {most} are read")


def check_table(name: str, *, rows: int = 0, columns: int = 0, values: int = 0, size: int = 0) -> None:
    """Raises ManifestError. size: bytes in memory."""
    for count, most, what in (
        (columns, MAX_COLUMNS, "columns"), (rows, MAX_ROWS, "rows"), (values, MAX_VALUES, "values"),
        (size, MAX_BYTES, "bytes in memory"),
    ):  # fmt: skip
        if count > most:
            raise too_large(name, f"has {count} {what}; at most {most} are read")


def too_large(name: str, rule: str, column: str = "") -> ManifestError:
    remedy = "leave out columns that are not needed, or submit the rows in several files"
    return manifest_error(name, [Problem(column=column, value=name, rule=rule, remedy=remedy)])
