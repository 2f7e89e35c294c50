"""The type of the fixture ``make_run``: in a module of its own, since several conftest.py bear one name."""

from __future__ import annotations

from collections.abc import Callable

from magi_ray.render.run import Run

MakeRun = Callable[..., Run]
