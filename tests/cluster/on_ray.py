"""What the tests of the cluster floor share: a few rows, what they must become, and looking after processes."""

from __future__ import annotations

import psutil
from typed import processes_with, title_of, wait_until

__all__ = ["SMALL", "processes_with", "wait_until", "working_actors"]

SMALL = {"width": 32, "height": 32, "num_steps": 8}


def working_actors() -> list[str]:
    """The actors that live below this process, by the title Ray gives their processes."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = title_of(process)
        except psutil.Error:
            continue
        if title.startswith("ray::") and "Agent" not in title and title != "ray::IDLE":
            found.append(title)
    return found
