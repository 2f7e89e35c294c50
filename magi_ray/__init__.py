"""Batch rendering of long AI videos with MAGI-1 on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magi_ray.api import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The command line imports this package too, and needs none of it.
    if name == "load":
        from magi_ray.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
