from __future__ import annotations

from pathlib import Path

import pytest

from magi_ray.media.encoder import find_ffmpeg


@pytest.fixture(scope="session")
def ffmpeg() -> Path:
    return find_ffmpeg()
