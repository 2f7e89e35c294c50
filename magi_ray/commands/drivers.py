"""What a process that renders a run leaves on this machine, for those who started it or look after it: a log, and
notes that say who it is, where Ray's dashboard is, and how it ended. Losing them loses no work."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from magi_ray import errors
from magi_ray.commands.common import as_ours
from magi_ray.errors import MagiRayError
from magi_ray.render.driving.reports import RunResult
from magi_ray.settings import Frozen, cache_folder
from magi_ray.storage.leases import Owner, gone
from magi_ray.storage.store import Store

# Notes of ended processes are kept this long for those who may still want to read them.
KEEP_S = 3600.0


class ToldError(Frozen):
    """An error on its way to another process. ``traceback``: not empty when it is a bug."""

    kind: str
    message: str
    remedy: str
    next_command: str
    exit_code: int
    traceback: str

    @classmethod
    def of(cls, exc: Exception) -> ToldError:
        error, traceback = as_ours(exc)
        return cls(
            kind=type(error).__name__, message=error.message, remedy=error.remedy, next_command=error.next_command,
            exit_code=error.exit_code, traceback=traceback,
        )  # fmt: skip

    def error(self) -> MagiRayError:
        """The error again."""
        kind = getattr(errors, self.kind, MagiRayError)
        # The one kind that wants more than this; nothing that renders raises it.
        kind = MagiRayError if kind is errors.ManifestError else kind
        error: MagiRayError = kind(self.message, remedy=self.remedy, next_command=self.next_command)
        error.exit_code = self.exit_code
        return error


class End(Frozen):
    """How rendering ended: with an outcome, with an error, or interrupted, that is with neither."""

    outcome: RunResult | None = None
    error: ToldError | None = None
    seconds: float = 0.0


class Notes(Frozen):
    """``end``: None while the process goes on, or when it died without a word."""

    driver: Owner
    dashboard: str | None = None
    end: End | None = None


class Notebook:
    """The notes of this process, rewritten as there is more to say."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.notes = Notes(driver=Owner.here("driver"))

    def write(self, *, dashboard: str | None = None, end: End | None = None) -> None:
        self.notes = Notes(
            driver=self.notes.driver, dashboard=dashboard or self.notes.dashboard, end=end or self.notes.end
        )
        part = self._path.with_suffix(".part")
        # Rendering does not depend on them.
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(self.notes.model_dump_json())
            part.replace(self._path)


@contextmanager
def noting(store: Store, run_id: str) -> Iterator[Notebook]:
    """Notes of this process for as long as the block runs; an error that ends it is noted too."""
    for path in _all_notes(store, run_id):
        with suppress(OSError):
            notes = read_notes(path)
            if time.time() - path.stat().st_mtime > KEEP_S and (notes is None or gone(notes.driver)):
                path.unlink()
    notebook = Notebook(notes_path(store, run_id, os.getpid()))
    notebook.write()
    try:
        yield notebook
    except Exception as exc:
        notebook.write(end=End(error=ToldError.of(exc)))
        raise


def log_path(store: Store, run_id: str) -> Path:
    """The log of all processes in the background that rendered the run here, one after the other."""
    return _folder(store) / f"{run_id}.log"


def notes_path(store: Store, run_id: str, pid: int) -> Path:
    return _folder(store) / f"{run_id}.{pid}.json"


def read_notes(path: Path) -> Notes | None:
    """None when there are none, or none that this version can read."""
    try:
        return Notes.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def at_work_here(store: Store, run_id: str) -> Owner | None:
    """A process of this machine that renders the run, or is about to: it takes the lease only after it has loaded."""
    return next((driver for found, driver in all_at_work_here(store, run_id) if found == run_id), None)


def all_at_work_here(store: Store, beginning: str) -> Iterator[tuple[str, Owner]]:
    """The runs whose id begins so and that a process of this machine renders. The store is not asked."""
    for path in sorted(_folder(store).glob(f"{beginning}*.json")):
        notes = read_notes(path)
        if notes is not None and notes.end is None and not gone(notes.driver):
            yield path.stem.rpartition(".")[0], notes.driver


def last_error(store: Store, run_id: str) -> ToldError | None:
    """What ended the last process that rendered the run here, if that was an error nobody has been told yet."""
    paths = sorted(_all_notes(store, run_id), key=lambda path: path.stat().st_mtime)
    notes = read_notes(paths[-1]) if paths else None
    return None if notes is None or notes.end is None else notes.end.error


def _all_notes(store: Store, run_id: str) -> list[Path]:
    return list(_folder(store).glob(f"{run_id}.*.json"))


def _folder(store: Store) -> Path:
    """The same id may be in several stores."""
    return cache_folder() / "runs" / hashlib.sha256(store.uri.encode()).hexdigest()[:8]
