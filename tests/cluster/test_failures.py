"""What an error that came through Ray means."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from magi_ray.cluster.driver import Deadlines, _Driver
from ray import exceptions

from magi_ray import errors
from magi_ray.cluster.failures import classify, own_error, worker_is_gone
from magi_ray.errors import FailureClass, MagiRayError, ManifestError, Problem, StoreError, WorkerLost
from magi_ray.render.driving.scheduler import Abandon


def kinds(of: type[MagiRayError] = MagiRayError) -> Iterator[type[MagiRayError]]:
    yield of
    for kind in of.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield from kinds(kind)


def preempted() -> exceptions.ActorDiedError:
    error = exceptions.ActorDiedError()
    error._preempted = True
    assert error.preempted
    return error


def raised_in_a_task(cause: Exception) -> exceptions.RayTaskError:
    """As ``ray.get`` raises it."""
    error: exceptions.RayTaskError = exceptions.RayTaskError("decode", f"Traceback …\n{cause!r}", cause)
    return error.as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "gone", "failure"),
    [
        (exceptions.ActorDiedError(), True, FailureClass.INFRASTRUCTURE),
        (preempted(), True, FailureClass.PREEMPTED),
        (exceptions.ActorUnavailableError("gone for now", None), True, FailureClass.INFRASTRUCTURE),
        (exceptions.WorkerCrashedError(), True, FailureClass.INFRASTRUCTURE),
        (exceptions.NodeDiedError("node"), True, FailureClass.INFRASTRUCTURE),
        (exceptions.OutOfMemoryError("the node has no memory left"), True, FailureClass.INFRASTRUCTURE),
        (exceptions.ObjectLostError("00" * 28, None, ""), True, FailureClass.INFRASTRUCTURE),
        (exceptions.OwnerDiedError("00" * 28, None, ""), True, FailureClass.INFRASTRUCTURE),
        (exceptions.ActorPlacementGroupRemoved(), True, FailureClass.INFRASTRUCTURE),
        (exceptions.ActorUnschedulableError("no place"), True, FailureClass.INFRASTRUCTURE),
        (exceptions.RuntimeEnvSetupError("no env"), True, FailureClass.INFRASTRUCTURE),
        (exceptions.GetTimeoutError("too long"), True, FailureClass.INFRASTRUCTURE),
        (exceptions.LocalRayletDiedError(), True, FailureClass.INFRASTRUCTURE),
        (WorkerLost("silent"), True, FailureClass.INFRASTRUCTURE),
        (raised_in_a_task(errors.MediaError("no frames")), False, FailureClass.INPUT),
        (raised_in_a_task(errors.ObjectMissing("no chunk")), False, FailureClass.STORE),
        (raised_in_a_task(errors.NumericError("NaN")), False, FailureClass.NUMERIC),
        (raised_in_a_task(errors.DeviceOutOfMemory("80 GiB")), False, FailureClass.OUT_OF_MEMORY),
        (raised_in_a_task(errors.OutputError("23 frames")), False, FailureClass.CODE),
        (raised_in_a_task(exceptions.ObjectStoreFullError("no room")), True, FailureClass.INFRASTRUCTURE),
        (raised_in_a_task(WorkerLost("another rank")), True, FailureClass.INFRASTRUCTURE),
        (raised_in_a_task(MemoryError("host")), False, FailureClass.INFRASTRUCTURE),
        (raised_in_a_task(ZeroDivisionError("oops")), False, FailureClass.CODE),
        (raised_in_a_task(TimeoutError("a socket's")), False, FailureClass.CODE),
        (ValueError("of the driver"), False, FailureClass.CODE),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_every_error_has_its_class(error: Exception, gone: bool, failure: FailureClass) -> None:
    assert worker_is_gone(error) is gone
    found, message = classify(error)
    assert found is failure
    assert message.strip()
    assert "Traceback" not in message


def test_a_message_keeps_the_remedy_of_our_errors_and_the_last_line_of_others() -> None:
    ours = raised_in_a_task(errors.MediaError("no frames", remedy="Give a clip."))
    assert classify(ours)[1] == "no frames\nGive a clip."
    assert classify(raised_in_a_task(ZeroDivisionError("oops")))[1] == "ZeroDivisionError('oops')"
    assert classify(exceptions.ActorDiedError())[1].startswith("A worker was lost: ")


def one_of(kind: type[MagiRayError]) -> MagiRayError:
    words = {"remedy": "Do that.", "next_command": "magi-ray doctor"}
    if issubclass(kind, ManifestError):
        problem = Problem(row=2, job_id="b", column="width", value="100", rule="not a multiple of 16", remedy="use 96")
        return kind("2 problems", [problem], **words)
    return kind("it is wrong", **words)


def test_our_errors_come_through_ray_whole(ray_here: None) -> None:
    def fail(error: bytes) -> None:
        raise pickle.loads(error)

    sent = [one_of(kind) for kind in kinds()]
    assert {type(error) for error in sent} >= {MagiRayError, ManifestError, StoreError, WorkerLost}
    task = ray.remote(num_cpus=0, max_retries=0)(fail)
    for error, reference in [(error, task.remote(pickle.dumps(error))) for error in sent]:
        with pytest.raises(MagiRayError) as raised:
            ray.get(reference, timeout=60)
        found = own_error(raised.value)
        assert type(found) is type(error)
        assert vars(found) == vars(error)
        assert classify(raised.value) == (error.failure_class, str(error))


def test_an_error_that_cannot_be_sent_is_a_bug_with_a_message(ray_here: None) -> None:
    def fail() -> None:
        class Stubborn(Exception):
            def __reduce__(self) -> str:
                raise TypeError("cannot be pickled")

        raise Stubborn("it went wrong")

    with pytest.raises(exceptions.RayError) as raised:
        ray.get(ray.remote(num_cpus=0, max_retries=0)(fail).remote(), timeout=60)
    assert not worker_is_gone(raised.value)
    failure, message = classify(raised.value)
    assert failure is FailureClass.CODE
    assert "it went wrong" in message


def test_a_worker_whose_loss_the_scheduler_has_yet_to_hear_of_is_not_asked_to_stop() -> None:
    # Its row fails for another reason, and an event before its own says so.
    session: Any = SimpleNamespace(run=None, scheduler=None)
    driver = _Driver(session, Deadlines(), {})
    driver._obey(Abandon(worker="denoise-0", job_id="a"))
    assert driver._workers == {}
