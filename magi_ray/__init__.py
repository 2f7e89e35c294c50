"""Batch rendering of long AI videos with MAGI-1 on Ray."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magi_ray.api import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Only when asked for: it imports torch, and most commands of the command line do not.
    if name == "load":
        from magi_ray.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
