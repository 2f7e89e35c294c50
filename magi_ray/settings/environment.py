"""The environment of this machine: the only module that reads environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """For generated weights and file digests: $MAGI_RAY_CACHE, $XDG_CACHE_HOME/magi-ray or ~/.cache/magi-ray."""
    if own := environ.get("MAGI_RAY_CACHE"):
        return Path(own)
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "magi-ray"


def chosen_store(environ: Mapping[str, str] = os.environ) -> str | None:
    """The store to use where none is named: $MAGI_RAY_STORE, if that is set."""
    return environ.get("MAGI_RAY_STORE") or None


def set_defaults(variables: Mapping[str, str]) -> None:
    """Sets environment variables for this process and its children, except those the user has set."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def device_here() -> Literal["cpu", "cuda"]:
    """ "cuda" if this machine has NVIDIA's driver, else "cpu". Costs nothing: no library is imported."""
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
