"""The processes of a driver on this machine, so that cancelling can make sure that none is left.

A ``psutil.Process`` is a pid and when it started: a later process with the same pid is another one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

import psutil


def tree_below(pid: int) -> set[psutil.Process]:
    """All processes below ``pid``, itself included."""
    try:
        process = psutil.Process(pid)
        return {process, *process.children(recursive=True)}
    except psutil.Error:  # it has ended
        return set()


def in_session(leader: int) -> set[psutil.Process]:
    """All processes of the session that ``leader`` began, even after it has ended itself."""
    found = set()
    for pid in psutil.pids():
        with suppress(psutil.Error, OSError):  # ended in between
            process = psutil.Process(pid)
            if os.getsid(pid) == leader:
                found.add(process)
    return found


def alive(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Those that have not ended; zombies have."""
    return {process for process in processes if _lives(process)}


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL to all of them that are alive."""
    for process in alive(processes):
        with suppress(psutil.Error):
            process.kill()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True  # it is there, but we may not look at it
