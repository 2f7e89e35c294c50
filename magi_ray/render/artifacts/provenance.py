"""Where, when and with which versions a result was computed. Stored beside it, never part of its identity."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version
from typing import Any

from magi_ray.system import System


def provenance(*, seconds: float, system: System) -> dict[str, Any]:
    """Of a computation that ends now and took ``seconds``."""
    return {
        "magi_ray": _version("magi-ray"),
        "torch": _version("torch"),
        "host": platform.node(),
        "finished_unix": round(system.unix_time(), 3),
        "seconds": round(seconds, 3),
    }


@cache  # reading a package's metadata takes a millisecond, and every commit asks
def _version(package: str) -> str:
    return version(package)
