"""What many tests share: weights of magi-tiny made once, small settings, and runs made of a few rows."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rgw import Rgw, why_not
from runs import MakeRun

from magi_ray.manifest import Defaults, manifest_of
from magi_ray.render.runs.record import Run
from magi_ray.render.runs.submission import create, prepare
from magi_ray.settings import Settings, override, preset
from magi_ray.storage.store import Store


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-crash-points",
        action="store_true",
        help="tests/test_crash_points.py: die at every call to the store, not at some of them",
    )


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of magi-tiny's networks."""
    from magi_ray.models.tiny import ensure_tiny

    folder = tmp_path_factory.mktemp("weights") / "magi-tiny"
    ensure_tiny(folder, preset("magi-tiny", weights=folder))
    return folder


@pytest.fixture(scope="session")
def settings(tiny_weights: Path) -> Settings:
    """magi-tiny at 32×32 with two steps a stage: a chunk takes some hundredths of a second."""
    small = {"runtime": {"video_size_h": 32, "video_size_w": 32, "num_steps": 8, "num_frames": 48}}
    return override(preset("magi-tiny", weights=tiny_weights), small | {"encoder": {"preset": "ultrafast"}})


@pytest.fixture
def make_run(settings: Settings) -> MakeRun:
    """``make_run(store, rows)``: those rows, submitted to ``store``."""

    def make(
        store: Store, rows: Sequence[Mapping[str, Any]], *, base: Path = Path("/"), settings: Settings = settings
    ) -> Run:
        manifest = manifest_of(rows, Defaults.of(settings), base=base)
        run, files = prepare(manifest, name="test.parquet", settings=settings)
        create(store, run, files)
        return run

    return make


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """One Ray instance for the whole test session, without dashboard."""
    import ray

    from magi_ray.cluster.local_ray import local_ray

    with local_ray(namespace="magi-ray-tests", dashboard=False):
        assert ray.is_initialized()
        yield


@pytest.fixture(scope="session")
def rgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rgw]:
    """A real S3 server. Skips where it is not installed, and fails there when MAGI_RAY_REQUIRE_RGW=1."""
    if reason := why_not():
        (pytest.fail if os.environ.get("MAGI_RAY_REQUIRE_RGW") == "1" else pytest.skip)(reason)
    server = Rgw(tmp_path_factory.mktemp("rgw") / "ceph")
    yield server
    server.close()


@pytest.fixture
def s3_address(rgw: Rgw, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty store on ``rgw``; the environment of this test and its children leads there."""
    rgw.start()  # in case the test before has killed it
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    for name, value in rgw.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{rgw.bucket}/films/{uuid.uuid4().hex}"
