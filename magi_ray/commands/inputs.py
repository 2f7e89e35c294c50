"""The files that a command is given: can they be used, and if not, which were meant?"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from magi_ray.commands.console import command_line
from magi_ray.errors import InputError, ManifestError

SOURCES = (".jsonl", ".csv", ".yaml", ".yml")


def require_manifest(path: Path, typed: list[str]) -> None:
    if path.suffix.lower() in SOURCES and path.is_file():
        built = path.with_suffix(".parquet")
        if built.is_file():
            remedy, following = f"Did you mean {built}?", _instead(typed, path, built)
        else:
            remedy = "Build a manifest of it first."
            following = command_line(["manifest", "build", str(path), "-o", str(built)])
        raise InputError(f"{path} is not a Parquet file.", remedy=remedy, next_command=following)
    require_file(path, (".parquet",), typed)


def require_file(path: Path, suffixes: Sequence[str], typed: list[str]) -> None:
    """Raises InputError unless ``path`` is a file; suggests the likeliest neighbour that ends in ``suffixes``."""
    if path.is_file():
        return
    folder = path if path.is_dir() else path.parent
    try:
        neighbours = sorted(str(found) for found in folder.iterdir() if found.suffix.lower() in suffixes)
    except OSError:
        neighbours = []
    # However different its name, a neighbour is likelier to be meant than nothing.
    [close] = difflib.get_close_matches(str(path), neighbours, n=1, cutoff=0) or [""]
    if path.is_dir():
        fault = f"{path} is a folder, not a file."
    else:
        fault = f"{path} is not an ordinary file." if path.exists() else f"There is no file {path}."
    if not close:
        raise InputError(fault, remedy=f"Give the path of a file that ends in {', '.join(suffixes)}.")
    raise InputError(fault, remedy=f"Did you mean {close}?", next_command=_instead(typed, path, Path(close)))


def _instead(typed: list[str], old: Path, new: Path) -> str:
    """The typed command with another path in it."""
    arguments = [
        prefix + str(new) if Path(argument.removeprefix(prefix)) == old else argument
        for argument in typed
        for prefix in [next((p for p in ("--out=", "-o") if argument.startswith(p) and argument != p), "")]
    ]
    return command_line(arguments)


def require_place(out: Path, typed: list[str]) -> None:
    """Raises InputError unless ``out`` can be written as an mp4 file, before anything is rendered for it."""
    again = ""
    if out.is_dir():
        fault, remedy = f"{out} is a folder.", "Name a file in it."
        place = out / "video.mp4"
    elif out.suffix.lower() != ".mp4":
        fault, remedy = f"{out} does not end in .mp4.", "Only mp4 files are written."
        place = out.with_name(f"{out.name}.mp4")
    elif not out.absolute().parent.is_dir():
        fault, remedy, place = f"There is no folder {out.parent}.", "Make it, or write somewhere else.", out
        again = f"mkdir -p {shlex.quote(str(out.parent))}"
    elif not os.access(out.absolute().parent, os.W_OK):
        fault, remedy, place = f"The folder {out.absolute().parent} cannot be written.", "Write elsewhere.", out
    else:
        return
    raise InputError(fault, remedy=remedy, next_command=again if place == out else _instead(typed, out, place))


@contextmanager
def as_options() -> Iterator[None]:
    """Errors in the rows of ``render`` name the options that they were made of, each once."""
    try:
        yield
    except ManifestError as exc:
        lines = [
            f"--{problem.column.replace('_', '-')}: {f'{problem.value} {problem.rule}'.strip()}; {problem.remedy}"
            for problem in exc.problems
        ]
        error = InputError("\n".join(dict.fromkeys(lines)))
        error.problems = exc.problems
        raise error from exc
