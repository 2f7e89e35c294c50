"""Captions are cleaned as in training."""

from __future__ import annotations

import json

import pytest

from magi_ray.models.text.prompt import clean_caption


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    path = metafunc.config.getoption("--parity-dir") / "caption_cleaning.json"
    metafunc.parametrize(("raw", "cleaned"), json.loads(path.read_text()) if path.is_file() else [])


def test_a_caption_is_cleaned_as_the_reference_does(raw: str, cleaned: str) -> None:
    assert clean_caption(raw) == cleaned
