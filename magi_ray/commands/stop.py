"""magi-ray pause, cancel."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
import psutil

from magi_ray.commands.console import FAILURE, print_json, say, say_next, stderr
from magi_ray.commands.options import example, json_option, run_argument, store_option
from magi_ray.commands.processes import alive, in_session, kill, tree_below
from magi_ray.commands.stores import StoredRun, open_named_run, run_command, store_to_read
from magi_ray.errors import MagiRayError, StoreUnavailable
from magi_ray.render.driving import requests

if TYPE_CHECKING:
    from magi_ray.drivers.driver_monitor import Driver, DriverMonitor

# Cancelling takes 15 s at most: how long the driver may take to end once it is asked, terminated, killed.
ASKED_S, TERMINATED_S, KILLED_S = 8.0, 2.5, 1.5
# How long `cancel` tries to reach a bucket before it ends the driver without it.
CANCEL_PATIENCE_S = 3.0
PAUSE_REFRESH_S = 1.0


@click.command(epilog=example("magi-ray pause quickstart"))
@run_argument
@store_option
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0), default=3600.0, show_default=True, metavar="S",
    help="How many seconds to wait for it to stop.",
)  # fmt: skip
@json_option
def pause(name: str | None, store_uri: str, timeout_s: float, as_json: bool) -> None:
    """Stop RUN as soon as its current stages are committed. At most one forward is lost; `magi-ray resume` goes on.
    Without RUN: the only run that is being rendered."""
    from magi_ray.drivers.driver_monitor import DriverMonitor
    from magi_ray.render.driving.reports import read_progress
    from magi_ray.report import follow

    stored = open_named_run(name, store_uri, verb="pause")
    monitor = DriverMonitor(stored.store, stored.run_id)
    driver = monitor.look()
    if driver is None:
        if as_json:
            print_json({"run_id": stored.run_id, "paused": False, "next_command": stored.command("resume")})
        if stored.all_published():
            say(f"All videos of run {stored.run_id} are done: there is nothing to pause.")
            return
        say(f"Run {stored.run_id} is not being rendered: there is nothing to pause. What was committed is kept.")
        say_next(stored.command("resume"))
        return
    requests.request(stored.store, stored.run_id, "pause")
    say(f"Asked {driver} to pause; it stops once its current stages are committed. Ctrl-C stops only the waiting.")
    deadline = time.monotonic() + timeout_s
    with follow(stderr()) as show:
        while (driver := monitor.look()) is not None and time.monotonic() < deadline:
            if (reported := read_progress(stored.store, stored.run_id)) is not None:
                show(reported.progress)
            time.sleep(PAUSE_REFRESH_S)
    following = stored.command("resume" if driver is None else "watch")
    if as_json:
        print_json({"run_id": stored.run_id, "paused": driver is None, "next_command": following})
    if driver is not None:
        say(f"After {timeout_s:.0f} s {driver} is still at work on its stages; it will pause once they are committed.")
        say_next(following)
        sys.exit(FAILURE)
    ended = "All videos were done before it paused" if stored.all_published() else "Paused"
    say(f"{ended}. What was committed is kept.")
    say_next(following)


@click.command(epilog=example("magi-ray cancel quickstart"))
@run_argument
@store_option
@json_option
def cancel(name: str | None, store_uri: str, as_json: bool) -> None:
    """Stop RUN now. Within 15 s nothing of it is left running; what was committed is kept. Without RUN: the only run
    that is being rendered."""
    try:
        _cancel(open_named_run(name, store_uri, verb="cancel", patience_s=CANCEL_PATIENCE_S), as_json=as_json)
    except StoreUnavailable as exc:
        _cancel_without_store(name, store_uri, exc, as_json=as_json)


def _cancel(stored: StoredRun, *, as_json: bool) -> None:
    from magi_ray.drivers.driver_monitor import DriverMonitor

    monitor = DriverMonitor(stored.store, stored.run_id)
    driver = monitor.look()
    if driver is None and stored.all_published():
        if as_json:
            print_json({"run_id": stored.run_id, "cancelled": False})
        say(f"All videos of run {stored.run_id} are done: there is nothing to cancel.")
        return
    requests.request(stored.store, stored.run_id, "cancel")
    how, ended = ("nobody was rendering it", True) if driver is None else _stop(driver, monitor)
    if as_json:
        print_json({"run_id": stored.run_id, "cancelled": ended, "how": how})
    if not ended:
        raise MagiRayError(
            f"Asked {driver} to cancel run {stored.run_id}, but {how}.",
            remedy="It stops once it reads the request; if it died on another machine, its silence will show that.",
            next_command=stored.command("watch"),
        )
    say(f"Cancelled: {how}. What was committed is kept.")
    say_next(stored.command("resume"))


def _cancel_without_store(name: str | None, store_uri: str, exc: StoreUnavailable, *, as_json: bool) -> None:
    """Without the store the driver cannot be asked, but it can be ended if it runs on this machine. Raises ``exc`` if
    it does not."""
    from magi_ray.drivers.driver_monitor import Driver
    from magi_ray.drivers.status_file import drivers_on_this_machine

    store = store_to_read(store_uri)
    found = list(drivers_on_this_machine(store, "" if name is None else Path(name).name))
    if len(found) != 1:
        raise exc
    [(run_id, owner)] = found
    how, ended = _end(Driver(owner=owner, beat=None), tree_below(owner.pid))
    if as_json:
        print_json({"run_id": run_id, "cancelled": ended, "how": how})
    if not ended:
        raise MagiRayError(f"The store cannot be reached, and {how}.", remedy="End that process by hand.") from exc
    say(f"The store cannot be reached; {how}. What was committed is kept, but the run is not marked as cancelled.")
    say_next(run_command("resume", run_id, store, store_uri))


def _stop(driver: Driver, monitor: DriverMonitor) -> tuple[str, bool]:
    """Wait for ``driver`` to end; if it does not and runs on this machine, end it and all below it. Returns what was
    done, and whether everything has ended."""
    pid = driver.owner.pid
    tree = tree_below(pid) if driver.here else set()
    if _within(ASKED_S, lambda: monitor.look() is None):
        if driver.here:
            tree |= in_session(pid)
        # Ray's processes end with their driver, a moment later.
        if _within(KILLED_S, lambda: not alive(tree)):
            return f"{driver} has ended", True
        left = alive(tree)
        kill(left)
        return f"{driver} has ended; what it left running was killed", _within(KILLED_S, lambda: not alive(left))
    if not driver.here:
        return f"it has not ended within {ASKED_S:.0f} s", False
    return _end(driver, tree | tree_below(pid))


def _end(driver: Driver, tree: set[psutil.Process]) -> tuple[str, bool]:
    """End a driver of this machine and the processes below it: SIGTERM, then SIGKILL. Returns what ``_stop`` does."""
    pid = driver.owner.pid
    try:
        psutil.Process(pid).terminate()
    except psutil.AccessDenied:
        return f"{driver} does not end, and belongs to another user", False
    except psutil.NoSuchProcess:
        pass
    if _within(TERMINATED_S, lambda: not alive(tree)):
        return f"{driver} was terminated", True
    tree |= tree_below(pid)
    kill(tree)
    return f"{driver} was killed", _within(KILLED_S, lambda: not alive(tree))


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether ``condition`` came true in that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
