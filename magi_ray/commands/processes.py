"""Processes of this machine below another one, so that cancelling can make sure that none is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# A process: its pid, and when it started in clock ticks after boot, since pids come again.
Process = tuple[int, int]


def below(pid: int) -> set[Process]:
    """All processes below ``pid``, itself included. Empty where the system has no /proc."""
    children: dict[int, list[Process]] = {}
    tree: set[Process] = set()
    for process, parent, _ in _all():
        children.setdefault(parent, []).append(process)
        if process[0] == pid:
            tree.add(process)
    new = list(tree)
    while new:
        new = [child for parent, _ in new for child in children.get(parent, []) if child not in tree]
        tree.update(new)
    return tree


def in_session(leader: int) -> set[Process]:
    """All processes of the session that ``leader`` began, also when it is gone itself."""
    return {process for process, _, session in _all() if session == leader}


def alive(processes: Iterable[Process]) -> set[Process]:
    """Those that have not ended."""
    return {process for process, _, _ in _all()} & set(processes)


def kill(processes: Iterable[Process]) -> None:
    """End them at once, whatever they do."""
    for pid, _ in alive(processes):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _all() -> list[tuple[Process, int, int]]:
    """Every process that lives, its parent's pid and its session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError, ValueError):
            # "pid (name) state parent group session …", where the name may hold anything; the start is field 22.
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] not in "ZX":
                found.append(((int(stat.parent.name), int(fields[19])), int(fields[1]), int(fields[3])))
    return found
