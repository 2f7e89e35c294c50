"""Batch rendering of long AI videos with MAGI-1 on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magi_ray.api import load as load
    from magi_ray.api import submit as submit

    __version__: str


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line imports this package too, and needs none of it.
    if name in ("api", "load", "submit"):
        from importlib import import_module

        api = import_module("magi_ray.api")
        return api if name == "api" else getattr(api, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("magi-ray")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
