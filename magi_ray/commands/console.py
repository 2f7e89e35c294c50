"""How commands speak: data to stdout, everything else to stderr, an exit code at the end."""

from __future__ import annotations

import json
import shlex
import traceback
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import click
from rich.console import Console, RenderableType

from magi_ray.errors import MagiRayError

# 3, 7 and 8 are the codes of errors: see ``magi_ray.errors``.
FAILURE, USAGE, FAILED_ROWS, CANCELLED, PAUSED, INTERRUPTED = 1, 2, 4, 5, 6, 130


def stderr() -> Console:
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(text: str, *, style: str = "") -> None:
    """A line for people, on stderr."""
    stderr().print(text, style=style or None, soft_wrap=True)


def say_next(command: str) -> None:
    """What to type next."""
    say(f"next: {command}", style="bold")


def print_table(table: RenderableType) -> None:
    """A table on stdout."""
    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        console.print(table)
        return
    # A pipe or a file gets whole lines, however narrow Rich takes it to be, and no padding at their ends.
    console.width = 4096
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def print_json(content: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(content))


def counted(number: int, noun: str) -> str:
    """``1 video``, ``2 videos``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def command_line(arguments: Sequence[str], *, without: Collection[str] = ()) -> str:
    """``magi-ray`` and these arguments, quoted for a shell; those in ``without`` are left out."""
    return shlex.join(["magi-ray", *(argument for argument in arguments if argument not in without)])


def as_magi_ray_error(exc: Exception) -> tuple[MagiRayError, str]:
    """What to tell people about ``exc``; and its traceback if it is a bug, else ''."""
    if isinstance(exc, MagiRayError):
        return exc, ""
    if isinstance(exc, OSError) and exc.filename is not None:
        return MagiRayError(f"{exc.filename}: {exc.strerror}.", remedy="Fix that, then run the command again."), ""
    bug = MagiRayError("This is a bug in magi-ray; please report it with the lines above.")
    return bug, "".join(traceback.format_exception(exc))
