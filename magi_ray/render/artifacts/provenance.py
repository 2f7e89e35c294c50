"""Where and when something was computed. Recorded beside results, never part of an identity."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from typing import Any

import magi_ray


def provenance(*, seconds: float) -> dict[str, Any]:
    """Version, machine and duration of a computation that ends now. ``seconds``: how long it took."""
    return {
        "magi_ray": magi_ray.__version__,
        "torch": version("torch"),
        "host": platform.node(),
        "finished_unix": round(time.time(), 3),
        "seconds": round(seconds, 3),
    }
