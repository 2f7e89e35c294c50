"""The files that a command is given: can they be used, and if not, which were meant?"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from magi_ray.commands.console import command_line
from magi_ray.errors import InputError, ManifestError, ObjectMissing, StoreError
from magi_ray.manifest import Defaults, Manifest, manifest_of_bytes, read_manifest
from magi_ray.manifest.bounds import MAX_BYTES, check_size
from magi_ray.manifest.sources import SUFFIXES

STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class GivenManifest:
    """A manifest as it was typed. written: a file, a folder of parts, - or s3://bucket/key.  kind: of its table, None
    where its name or its content tells."""

    written: str
    kind: str | None

    @property
    def name(self) -> str:
        """What messages and runs call it."""
        return "stdin" if self.written == STDIN else self.written

    def read(self, typed: list[str], defaults: Defaults, *, strict: bool = True) -> Manifest:
        """The manifest; strict as ``read_manifest``. Relative media paths start from its folder, or from the current
        one. Raises ManifestError, InputError; StoreError."""
        if self.written == STDIN:
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
            return manifest_of_bytes(data, defaults, base=Path.cwd(), name=self.name, kind=self.kind, strict=strict)
        if self.written.lower().startswith("s3://"):
            base = self.written.rpartition("/")[0]
            data = _object(self.written)
            return manifest_of_bytes(data, defaults, base=base, name=self.name, kind=self.kind, strict=strict)
        if re.match(r"[a-z][a-z0-9+.-]*://", self.written, re.IGNORECASE):
            raise InputError(
                f"{self.written} is an address that is not read.", remedy="Give a path or s3://bucket/key."
            )
        path = Path(self.written)
        require_table(path, typed)
        return read_manifest(path, defaults, kind=self.kind, strict=strict)


def _object(uri: str) -> bytes:
    """The object at ``uri``, s3://bucket/key. Raises InputError; StoreError."""
    from magi_ray.storage.opening import open_object

    bucket, key = open_object(uri)
    if not key:
        raise InputError(f"{uri} names no object.", remedy="Write s3://bucket/key.")
    with suppress(StoreError, ValueError):  # nobody may list this bucket, or a key is unusual: its size is not known
        check_size(uri, next((entry.size for entry in bucket.entries(key) if entry.key == key), 0))
    try:
        return bucket.get(key)
    except ObjectMissing as exc:
        raise InputError(f"There is no object {uri}.", remedy="Upload it, or correct the address.") from exc


def require_table(path: Path, typed: list[str]) -> None:
    """Raises InputError unless ``path`` is a file or a folder."""
    if not path.is_dir():
        require_file(path, tuple(SUFFIXES), typed)


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
    elif any(map(os.path.isfile, out.absolute().parents)):
        fault, remedy, place = f"{out.parent} is not a folder.", "Write somewhere else.", Path(out.name)
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
