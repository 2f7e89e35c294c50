"""What a driver leaves on this machine for whoever started it or looks for it: a log, and a status file that says
which process it is, where Ray's dashboard is, and how it ended. Losing them loses no work."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from magi_ray import errors
from magi_ray.errors import MagiRayError, as_magi_ray_error, magi_ray_command
from magi_ray.redaction import redact
from magi_ray.render.driving.reports import RunResult
from magi_ray.settings import Frozen, cache_folder
from magi_ray.storage.store import Store
from magi_ray.system import Owner, gone

# How long the status files of ended drivers are kept for those who still want to read them.
KEEP_STATUS_S = 3600.0


class SerializedError(Frozen):
    """An error on its way to another process. ``traceback``: not empty if it is a bug."""

    kind: str
    message: str
    remedy: str
    next_command: str
    exit_code: int
    traceback: str

    @classmethod
    def of(cls, exc: Exception) -> SerializedError:
        error, traceback = as_magi_ray_error(exc)
        return cls(
            kind=type(error).__name__, message=error.message, remedy=error.remedy, next_command=error.next_command,
            exit_code=error.exit_code, traceback=traceback,
        )  # fmt: skip

    def error(self) -> MagiRayError:
        """The error again, with the traceback as a note."""
        kind = getattr(errors, self.kind, MagiRayError)
        # A ManifestError needs more than this; nothing that renders raises it.
        kind = MagiRayError if kind is errors.ManifestError else kind
        error: MagiRayError = kind(self.message, remedy=self.remedy, next_command=self.next_command)
        error.exit_code = self.exit_code
        if self.traceback:
            error.add_note(self.traceback)
        return error


class DriverExit(Frozen):
    """How a driver ended: with the run's result, with an error, or with neither: interrupted."""

    run_result: RunResult | None = None
    error: SerializedError | None = None
    seconds: float = 0.0


class DriverStatus(Frozen):
    """``ended``: None while the driver lives, or when it died too suddenly to say."""

    driver: Owner
    dashboard: str | None = None
    ended: DriverExit | None = None


class StatusFile:
    """The status of this process, rewritten with every change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._status = DriverStatus(driver=Owner.here("driver"))

    def write(self, *, dashboard: str | None = None, ended: DriverExit | None = None) -> None:
        """What is not given stays as it is."""
        last = self._status
        self._status = DriverStatus(
            driver=last.driver, dashboard=dashboard or last.dashboard, ended=ended or last.ended
        )
        part = self._path.with_suffix(".part")
        # Rendering does not depend on it.
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(self._status.model_dump_json())
            part.replace(self._path)


@contextmanager
def status_file(store: Store, run_id: str) -> Iterator[StatusFile]:
    """This process's status file while the block runs; an error that ends the block is written to it."""
    for path in _status_paths(store, run_id):
        with suppress(OSError):
            status = read_status(path)
            if time.time() - path.stat().st_mtime > KEEP_STATUS_S and (status is None or gone(status.driver)):
                path.unlink()
    file = StatusFile(status_path(store, run_id, os.getpid()))
    file.write()
    try:
        yield file
    except Exception as exc:
        file.write(ended=DriverExit(error=SerializedError.of(exc)))
        raise


def log_path(store: Store, run_id: str) -> Path:
    """The log of the background processes that rendered the run on this machine, one after the other."""
    return machine_folder(store) / f"{run_id}.log"


def note_options(store: Store, run_id: str, options: Sequence[str]) -> None:
    """Remember what the run is rendered with here, for those who go on with it later."""
    _note(store, f"{run_id}.options", options)


def last_options(store: Store, run_id: str) -> list[str]:
    """The options that the run was last rendered with on this machine."""
    return _noted(store, f"{run_id}.options")


def note_submission(store: Store, run_id: str, words: Sequence[str]) -> None:
    """Remember what was typed after `magi-ray`, here in this folder, to submit the run."""
    _note(store, f"{run_id}.submitted", [str(Path.cwd()), *words])


def submission(store: Store, run_id: str) -> str:
    """The command that submits the run again, as it was submitted last on this machine; '' if it was not."""
    folder, *words = _noted(store, f"{run_id}.submitted") or [""]
    if not words:
        return ""
    change = "" if folder == str(Path.cwd()) else f"cd {shlex.quote(folder)} && "
    return change + magi_ray_command(*words)


def _note(store: Store, name: str, words: Sequence[str]) -> None:
    path = machine_folder(store) / name
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(redact(json.dumps(list(words))))


def _noted(store: Store, name: str) -> list[str]:
    with suppress(OSError, ValueError):
        return [str(word) for word in json.loads((machine_folder(store) / name).read_text())]
    return []


def status_path(store: Store, run_id: str, pid: int) -> Path:
    return machine_folder(store) / f"{run_id}.{pid}.json"


def read_status(path: Path) -> DriverStatus | None:
    """None if there is no file, or none that this version can read."""
    try:
        return DriverStatus.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def driver_on_this_machine(store: Store, run_id: str) -> Owner | None:
    """The process here that renders the run, or is about to: it takes the lease only after loading."""
    return next((driver for found, driver in drivers_on_this_machine(store, run_id) if found == run_id), None)


def drivers_on_this_machine(store: Store, beginning: str) -> Iterator[tuple[str, Owner]]:
    """(run id, process) for each run that a process here renders and whose id begins so. Does not ask the store."""
    for path in sorted(machine_folder(store).glob(f"{beginning}*.json")):
        status = read_status(path)
        if status is not None and status.ended is None and not gone(status.driver):
            yield path.stem.rpartition(".")[0], status.driver


def last_error(store: Store, run_id: str) -> SerializedError | None:
    """The error that ended the last process here that rendered the run, if one did and nobody has read it yet."""
    paths = sorted(_status_paths(store, run_id), key=lambda path: path.stat().st_mtime)
    status = read_status(paths[-1]) if paths else None
    return None if status is None or status.ended is None else status.ended.error


def _status_paths(store: Store, run_id: str) -> list[Path]:
    return list(machine_folder(store).glob(f"{run_id}.*.json"))


def machine_folder(store: Store) -> Path:
    """A folder per store: several may hold the same run id."""
    return cache_folder() / "runs" / hashlib.sha256(store.uri.encode()).hexdigest()[:8]
