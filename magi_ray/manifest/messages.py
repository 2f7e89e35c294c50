"""Messages about a manifest that cannot be used: a line for each problem, and the error that carries them all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from magi_ray.errors import ManifestError, Problem


def explain(problems: Sequence[Problem], *, limit: int = 40) -> str:
    """One line for each problem, rows in order; after ``limit`` lines, how many more there are in which columns.

    For example: row 3 (job "sunset"), column width: 100 is not a multiple of 16; use 96 or 112
    """
    ordered = sorted(problems, key=lambda problem: problem.row)
    listed = ordered if len(ordered) <= limit else ordered[: limit - 1]
    lines = [_line(problem) for problem in listed]
    if rest := ordered[len(listed) :]:
        columns = Counter(problem.column or "the file" for problem in rest).most_common()
        rows = len({problem.row for problem in rest})
        lines.append(f"and {len(rest)} more in {rows} rows: " + ", ".join(f"{name} {count}" for name, count in columns))
    return "\n".join(lines)


def _line(problem: Problem) -> str:
    job = f" (job {shown(problem.job_id)})" if problem.job_id else ""
    row = f"row {problem.row}{job}" if problem.row else ""
    where = ", ".join(part for part in (row, f"column {problem.column}" if problem.column else "") if part)
    what = f"{problem.value} {problem.rule}".strip()
    return (f"{where}: " if where else "") + f"{what}; {problem.remedy}"


def shown(value: object) -> str:
    """A value as a message shows it: text in quotes, at most 60 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # thousands of digits, or lists in lists
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:56]} …" + ('"' if text.endswith('"') else "")


def file_error(name: str, rule: str, remedy: str) -> ManifestError:
    """The error for a file that cannot be read as a manifest at all."""
    return manifest_error(name, [Problem(value=name, rule=rule, remedy=remedy)])


def manifest_error(name: str, problems: Sequence[Problem], *, rows: int = 0, next_command: str = "") -> ManifestError:
    """The error for the manifest that messages call ``name``. rows: how many it has."""
    problems = sorted(problems, key=lambda problem: problem.row)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    bad = len({problem.row for problem in problems if problem.row})
    of = f" in {bad} of {rows} rows" if bad and rows else ""
    message = f"{name} cannot be used: {count}{of}.\n{explain(problems)}"
    return ManifestError(message, problems, next_command=next_command)
