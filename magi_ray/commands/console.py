"""How commands speak: data to stdout, everything else to stderr, an exit code at the end."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import click
from rich.console import Console, RenderableType

from magi_ray.errors import magi_ray_command
from magi_ray.redaction import redact

# 3, 7 and 8 are the codes of errors: see ``magi_ray.errors``.
FAILURE, USAGE, FAILED_ROWS, CANCELLED, PAUSED, INTERRUPTED = 1, 2, 4, 5, 6, 130


def stderr() -> Console:
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(text: str, *, style: str = "") -> None:
    """A line for people, on stderr."""
    stderr().print(redact(text), style=style or None, soft_wrap=True)


def say_next(command: str) -> None:
    """What to type next."""
    if "-" in shlex.split(command):
        say("This reads the rows from stdin again:")
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
        click.echo(redact(line.rstrip()))


def print_json(content: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    click.echo(redact(json.dumps(content)))


def counted(number: int, noun: str) -> str:
    """``1 video``, ``2 videos``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def command_line(arguments: Sequence[str], *, without: Collection[str] = ()) -> str:
    """``magi-ray`` and these arguments, quoted for a shell; those in ``without`` are left out."""
    return magi_ray_command(*(argument for argument in arguments if argument not in without))
