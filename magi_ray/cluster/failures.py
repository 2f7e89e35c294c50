"""What an error that came through Ray means to the scheduler."""

from __future__ import annotations

from ray import exceptions

from magi_ray.errors import FailureClass, MagiRayError, WorkerLost, failure_class
from magi_ray.redaction import redact


def worker_is_gone(error: BaseException) -> bool:
    """Whether ``error`` says that the worker died or cannot be relied on any more, rather than that its task failed.

    Errors of Ray's own mean a lost worker (actor died, node lost, out of memory, unschedulable, no answer); what a
    task raised is a RayTaskError, and counts by its cause.
    """
    cause = error.cause if isinstance(error, exceptions.RayTaskError) else error
    if type(cause) is exceptions.RayError:
        return False  # what Ray puts in place of a cause that cannot be pickled
    return isinstance(cause, (exceptions.RayError, WorkerLost))


def own_error(error: BaseException) -> MagiRayError | None:
    """The error of ours that a task raised and Ray wrapped, if it is one."""
    cause = error.cause if isinstance(error, exceptions.RayTaskError) else error
    return cause if isinstance(cause, MagiRayError) else None


def classify(error: BaseException) -> tuple[FailureClass, str]:
    """The failure class of an error raised by ``ray.get``, and the message for the user."""
    if own := own_error(error):
        return own.failure_class, str(own)
    if isinstance(error, exceptions.RayActorError) and error.preempted:
        return FailureClass.PREEMPTED, "The node was taken away (preempted)."
    lines = redact(str(error)).strip().splitlines() or [repr(error)]
    # What a task raised comes as a traceback, whose last line says what; Ray's own errors begin with it.
    line = lines[-1] if isinstance(error, exceptions.RayTaskError) else lines[0]
    if worker_is_gone(error):
        return FailureClass.INFRASTRUCTURE, f"A worker was lost: {line}"
    cause = error.cause if isinstance(error, exceptions.RayTaskError) else error
    return failure_class(cause), line
