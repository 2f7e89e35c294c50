"""Errors cross processes and reach people."""

from __future__ import annotations

import pickle

import pytest

from magi_ray import errors
from magi_ray.errors import (
    FailureClass,
    InputError,
    MagiRayError,
    ManifestError,
    MediaError,
    Problem,
    StoreError,
    failure_class,
)


def kinds(root: type[MagiRayError]) -> list[type[MagiRayError]]:
    # Ray derives classes of its own from ours when an error crosses it.
    children = [child for child in root.__subclasses__() if child.__module__ == errors.__name__]
    return [root, *(kind for child in children for kind in kinds(child))]


def example(kind: type[MagiRayError]) -> MagiRayError:
    if issubclass(kind, ManifestError):
        problem = Problem(row=3, job_id="cat", column="width", value="100", rule="is not even", remedy="use 96")
        return kind("wrong", [problem], remedy="mend it", next_command="magi-ray list")
    if issubclass(kind, MediaError):
        return kind("wrong", reason="is wrong", remedy="mend it", next_command="magi-ray list")
    return kind("wrong", remedy="mend it", next_command="magi-ray list")


@pytest.mark.parametrize("kind", kinds(MagiRayError))
def test_every_error_survives_pickling_with_all_it_carries(kind: type[MagiRayError]) -> None:
    error = example(kind)
    again = pickle.loads(pickle.dumps(error))

    assert type(again) is kind
    assert vars(again) == vars(error)
    assert str(again) == str(error)
    assert again.args == error.args


def test_an_error_says_what_is_wrong_how_to_mend_it_and_what_to_type_next() -> None:
    assert str(example(InputError)) == "wrong\nmend it\nnext: magi-ray list"
    assert str(StoreError("wrong")) == "wrong"


def test_a_media_error_has_its_reason_apart_from_the_name_of_the_file() -> None:
    error = pickle.loads(pickle.dumps(MediaError.about("/clips/a.mp4", "has no frame 7", remedy="Ask for another.")))
    assert (error.message, error.reason) == ("/clips/a.mp4 has no frame 7.", "has no frame 7")
    assert str(error) == "/clips/a.mp4 has no frame 7.\nAsk for another."
    assert MediaError("There is no ffmpeg.").reason == "There is no ffmpeg."


def test_every_kind_is_drawn_in_the_tree_at_the_top_of_the_file() -> None:
    assert errors.__doc__ is not None
    for kind in kinds(MagiRayError):
        assert f" {kind.__name__} " in errors.__doc__.replace("\n", " ")


@pytest.mark.parametrize(
    ("kind", "code"), [(MagiRayError, 1), (InputError, 2), (errors.MediaError, 2), (ManifestError, 3)]
)
def test_exit_codes_are_those_of_the_command_line(kind: type[MagiRayError], code: int) -> None:
    assert kind.exit_code == code


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.WeightsError("x"), FailureClass.INPUT),
        (errors.ObjectDamaged("x"), FailureClass.STORE),
        (errors.OutputError("x"), FailureClass.CODE),
        (MemoryError(), FailureClass.INFRASTRUCTURE),
        (KeyError("x"), FailureClass.CODE),
    ],
)
def test_a_failure_has_the_class_that_decides_over_retries(error: Exception, expected: FailureClass) -> None:
    assert failure_class(error) is expected
