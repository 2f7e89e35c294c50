"""What an error that came through Ray means to the scheduler."""

from __future__ import annotations

from ray import exceptions

from magi_ray.errors import FailureClass, MagiRayError, WorkerLost, failure_class

# The worker itself is gone or cannot be relied on any more.
_DEATHS = (
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.OutOfMemoryError,
    exceptions.ObjectLostError,
    exceptions.TaskPlacementGroupRemoved,
    exceptions.ActorPlacementGroupRemoved,
    exceptions.ActorUnschedulableError,
    exceptions.RuntimeEnvSetupError,
    exceptions.TaskCancelledError,
    exceptions.RaySystemError,
    exceptions.GetTimeoutError,
)


def worker_is_gone(error: BaseException) -> bool:
    """Whether ``error`` says that the worker died, rather than that its task failed."""
    return isinstance(error, (*_DEATHS, WorkerLost))


def classify(error: BaseException) -> tuple[FailureClass, str]:
    """The failure class of an error raised by ``ray.get``, and what to tell people of it."""
    if isinstance(error, exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, MagiRayError):
            return failure_class(cause), str(cause)
        # A bug: the last line says what, the worker's log where.
        return failure_class(cause) if cause else FailureClass.CODE, f"{type(cause).__name__}: {cause}"
    if isinstance(error, exceptions.RayActorError) and error.preempted:
        return FailureClass.PREEMPTED, "The node was taken away (preempted)."
    if worker_is_gone(error):
        return FailureClass.INFRASTRUCTURE, f"A worker was lost: {str(error).strip().splitlines()[0]}"
    return failure_class(error), str(error) or repr(error)
