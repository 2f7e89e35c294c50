"""Every error magi-ray raises, in one tree. A kind exists only where a caller would act differently.

MagiRayError
├── InputError                what the user gave cannot work; fix it and submit again   (class "input", exit code 2)
│   ├── ManifestError         some rows are invalid; carries every problem              (exit code 3)
│   ├── SettingsError         a config, preset or job file is wrong
│   ├── WeightsError          files of the network are missing, damaged or do not fit the config
│   ├── MediaError            an image or video cannot be read, or ffmpeg is missing
│   │   └── MediaMissing      there is no such file or object
│   └── RunNotFound           no such run in this store
├── StoreError                the store failed; trying again may help                   (class "store")
│   ├── ObjectMissing         there is no object under that key
│   ├── ObjectDamaged         the bytes do not match the digest recorded for them
│   │   └── RunDamaged        a run's record or manifest is not as it was submitted
│   ├── StoreUnavailable      busy, throttled, timed out or gone; the call may have landed all the same
│   ├── StoreUnwritable       full, over its quota or read-only: nobody can write; ends a run (class "unwritable")
│   └── StoreDenied           credentials or permissions                                (exit code 7)
├── Superseded                another driver or group has taken over                    (exit code 8)
│   └── AlreadyRendered       another driver renders the run; this one never began
├── NumericError              the model gave NaN or infinity                            (class "numeric")
├── OutputError               a finished video is not what was planned                  (class "code")
├── DeviceOutOfMemory         the accelerator has too little memory                     (class "out_of_memory")
├── TemporaryFull             this machine has no room for temporary files              (class "infrastructure")
└── WorkerLost                a worker died or stopped answering                        (class "infrastructure")

Every error says what is wrong (``message``), how to mend it (``remedy``) and what to type next (``next_command``).
All survive pickling: Ray sends them between processes. None holds the secrets of an address.
"""

from __future__ import annotations

import shlex
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from errno import EDQUOT, ENOSPC, EROFS
from typing import Any, Self

from magi_ray.redaction import redact


class FailureClass(StrEnum):
    """Why a task failed, in the words the scheduler and ``errors.parquet`` use."""

    PREEMPTED = "preempted"
    INFRASTRUCTURE = "infrastructure"
    STORE = "store"
    UNWRITABLE = "unwritable"
    OUT_OF_MEMORY = "out_of_memory"
    INPUT = "input"
    CODE = "code"
    NUMERIC = "numeric"


class MagiRayError(Exception):
    """The root. ``exit_code`` is what the command line ends with."""

    exit_code = 1
    failure_class = FailureClass.CODE

    def __init__(self, message: str, *, remedy: str = "", next_command: str = "") -> None:
        super().__init__(redact(message))
        self.message = redact(message)
        self.remedy = redact(remedy)
        self.next_command = redact(next_command)

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own __reduce__ drops keyword arguments.
        return _rebuild, (type(self), dict(self.__dict__))

    def __str__(self) -> str:
        command = f"next: {self.next_command}" if self.next_command else ""
        return "\n".join([self.message, *filter(None, (self.remedy, command))])


def magi_ray_command(*words: str) -> str:
    """`magi-ray` and these words as they can be pasted into a shell, for ``next_command``."""
    return shlex.join(["magi-ray", *words])


def _rebuild(kind: type[MagiRayError], fields: dict[str, Any]) -> MagiRayError:
    error = kind.__new__(kind)
    Exception.__init__(error, fields.get("message", ""))
    error.__dict__.update(fields)
    return error


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One broken rule in a manifest. ``row`` counts from 1; 0 means the file as a whole. ``value``: as it is shown."""

    row: int = 0
    job_id: str = ""
    column: str = ""
    value: str = ""
    rule: str
    remedy: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", redact(self.value))


class InputError(MagiRayError):
    """``problems``: each thing that is wrong, where they are told one by one."""

    exit_code = 2
    failure_class = FailureClass.INPUT
    problems: tuple[Problem, ...] = ()


class ManifestError(InputError):
    """Some rows are invalid. ``problems`` holds every one of them, in row order."""

    exit_code = 3

    def __init__(self, message: str, problems: Sequence[Problem], *, remedy: str = "", next_command: str = "") -> None:
        super().__init__(message, remedy=remedy, next_command=next_command)
        self.problems = tuple(problems)
        self.json_beside: dict[str, Any] = {}  # what --json prints beside the error


class SettingsError(InputError): ...


class WeightsError(InputError): ...


class MediaError(InputError):
    """``reason``: the predicate without its subject, the file ("has no frame 7"), for callers that name the file
    themselves; the message where no file is at fault."""

    def __init__(self, message: str, *, reason: str = "", remedy: str = "", next_command: str = "") -> None:
        super().__init__(message, remedy=remedy, next_command=next_command)
        self.reason = redact(reason or message)

    @classmethod
    def about(cls, file: object, reason: str, *, remedy: str = "") -> Self:
        """The error "``file`` ``reason``."; ``file``: a path, an address or another name for it."""
        return cls(f"{file} {reason}.", reason=reason, remedy=remedy)


class MediaMissing(MediaError): ...


class RunNotFound(InputError): ...


class StoreError(MagiRayError):
    failure_class = FailureClass.STORE


class ObjectMissing(StoreError): ...


class ObjectDamaged(StoreError): ...


class RunDamaged(ObjectDamaged):
    """``what``: is wrong, a clause that names neither run nor store.  resubmit: whether submitting its manifest again
    mends it."""

    def __init__(
        self, message: str, *, what: str = "", resubmit: bool = False, remedy: str = "", next_command: str = ""
    ) -> None:
        super().__init__(message, remedy=remedy, next_command=next_command)
        self.what = redact(what or message)
        self.resubmit = resubmit


class StoreUnavailable(StoreError): ...


class StoreDenied(StoreError):
    exit_code = 7


class StoreUnwritable(StoreError):
    failure_class = FailureClass.UNWRITABLE


class Superseded(MagiRayError):
    exit_code = 8
    failure_class = FailureClass.PREEMPTED


class AlreadyRendered(Superseded): ...


class NumericError(MagiRayError):
    failure_class = FailureClass.NUMERIC


class OutputError(MagiRayError): ...


class DeviceOutOfMemory(MagiRayError):
    failure_class = FailureClass.OUT_OF_MEMORY


class TemporaryFull(MagiRayError):
    failure_class = FailureClass.INFRASTRUCTURE


class WorkerLost(MagiRayError):
    failure_class = FailureClass.INFRASTRUCTURE


def failure_class(error: BaseException) -> FailureClass:
    """The class the scheduler budgets ``error`` under. Errors that are not ours are bugs: ``code``."""
    if isinstance(error, MagiRayError):
        return error.failure_class
    if isinstance(error, MemoryError):
        return FailureClass.INFRASTRUCTURE
    return FailureClass.CODE


def as_magi_ray_error(exc: Exception) -> tuple[MagiRayError, str]:
    """What to tell people about ``exc``; and its traceback if it is a bug, else ''."""
    if isinstance(exc, MagiRayError):
        return exc, ""
    if isinstance(exc, OSError) and (exc.filename is not None or exc.errno in (ENOSPC, EDQUOT, EROFS)):
        what = f"{exc.filename}: {exc.strerror}" if exc.filename is not None else f"{exc.strerror}"
        return MagiRayError(f"{what}.", remedy="Fix that, then run the command again."), ""
    bug = MagiRayError("This is a bug in magi-ray; please report it with the lines above.")
    return bug, redact("".join(traceback.format_exception(exc)))
