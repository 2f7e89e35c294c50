"""Errors as people are told them, in this process and in the one that started it."""

from __future__ import annotations

import traceback

from magi_ray import errors
from magi_ray.errors import MagiRayError
from magi_ray.settings import Frozen


def as_magi_ray_error(exc: Exception) -> tuple[MagiRayError, str]:
    """What to tell people of ``exc``; and its traceback if it is a bug, else ''."""
    if isinstance(exc, MagiRayError):
        return exc, ""
    if isinstance(exc, OSError) and exc.filename is not None:
        return MagiRayError(f"{exc.filename}: {exc.strerror}.", remedy="Correct that, then run the command again."), ""
    bug = MagiRayError("This is a bug in magi-ray; please report it with the lines above.")
    return bug, "".join(traceback.format_exception(exc))


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
        """The error again."""
        kind = getattr(errors, self.kind, MagiRayError)
        # The one kind that needs more than this; nothing that renders raises it.
        kind = MagiRayError if kind is errors.ManifestError else kind
        error: MagiRayError = kind(self.message, remedy=self.remedy, next_command=self.next_command)
        error.exit_code = self.exit_code
        return error
