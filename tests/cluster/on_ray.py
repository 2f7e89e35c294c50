"""What the tests of the cluster floor share: a few rows, what they must become, and looking after processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil

SMALL = {"width": 32, "height": 32, "num_steps": 8}


def wait_until(condition: Callable[[], Any], what: str, *, within_s: float = 60.0) -> None:
    """Look again and again; generous, since the machine may be slow."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < within_s, f"not within {within_s:.0f} s: {what}"
        time.sleep(0.05)


def title_of(process: psutil.Process) -> str:
    """How the process calls itself; Ray's workers write over their command line."""
    return (process.cmdline() or [""])[0].strip()


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


def processes_with(variable: str, value: str, *, title: str = "") -> list[psutil.Process]:
    """The processes that were started with this environment variable, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        try:
            alive = process.environ().get(variable) == value and process.status() != psutil.STATUS_ZOMBIE
            if alive and title_of(process).startswith(title):
                found.append(process)
        except psutil.Error:
            continue
    return found
