"""Parity cases: a folder of JSON beside safetensors, computed by the published reference (README.md there).

``pytest tests/parity --parity-dir DIR`` runs any folder of the same form.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """One case: ``facts`` from its JSON, ``tensors`` from the safetensors file beside it."""

    name: str
    folder: Path
    facts: dict[str, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / f"{self.name}.safetensors")

    @property
    def tolerance(self) -> float:
        return float(self.facts["tolerance"])

    @staticmethod
    def relative_error(found: Tensor, expected: Tensor) -> float:
        """max |a − b| / max |b|."""
        assert found.shape == expected.shape
        return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())

    def __str__(self) -> str:
        return self.name


def _cases(folder: Path, key: str) -> list[Case]:
    """The cases of ``folder`` whose JSON is an object with ``key``."""
    found = []
    for path in sorted(folder.glob("*.json")):
        facts = json.loads(path.read_text())
        if isinstance(facts, dict) and key in facts:
            found.append(Case(path.stem, folder, facts))
    return found


def _folder(config: pytest.Config) -> Path:
    # When a wider folder is run, pytest reads this file too late for the option to exist.
    folder: Path = config.getoption("--parity-dir", HERE)
    if not folder.is_dir():
        raise pytest.UsageError(f"--parity-dir {folder} is not a folder")
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-dir", type=Path, default=HERE, help="a folder of parity cases; default: tests/parity")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = _folder(metafunc.config)
    for fixture, key in (("sampling_case", "config"), ("vae_case", "tiles")):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, _cases(folder, key), ids=str)


@pytest.fixture
def parity_dir(request: pytest.FixtureRequest) -> Path:
    return _folder(request.config)
