"""How often a driver looks around, and after how long it takes a worker for hung."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from magi_ray.events import TaskKind


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds.

    tick_s: about the longest wait for events.  requests_s, nodes_s, reports_s: between two reads of users' requests,
    two looks at the nodes, two reports of progress.
    placement_s: in which a worker must be placed.  load_s: in which it must load.  silence_s: of a busy worker of each
    kind, between two of its events: one step of denoising, the whole of any other task.
    """

    tick_s: float = 1.0
    requests_s: float = 2.0
    nodes_s: float = 5.0
    reports_s: float = 1.0
    placement_s: float = 120.0
    load_s: float = 3600.0
    silence_s: Mapping[TaskKind, float] = field(default_factory=lambda: dict.fromkeys(TaskKind, 3600.0))
