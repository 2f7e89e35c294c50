"""What this machine says: the only module that reads environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where made weights and file digests are kept: $MAGI_RAY_CACHE, $XDG_CACHE_HOME/magi-ray or ~/.cache/magi-ray."""
    if environ.get("MAGI_RAY_CACHE"):
        return Path(environ["MAGI_RAY_CACHE"])
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "magi-ray"


def set_defaults(variables: Mapping[str, str]) -> None:
    """Set environment variables of this process and its children. What the user has set stays."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def device_here() -> Literal["cpu", "cuda"]:
    """Where this machine computes: "cuda" if it has NVIDIA's driver. Imports no library, so it costs nothing."""
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
