"""magi-ray status, list, watch."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from magi_ray.commands import console
from magi_ray.commands.console import counted, print_json, print_table, say, say_next, stderr
from magi_ray.commands.options import example, json_option, run_argument, store_option
from magi_ray.commands.outcome import say_left_out
from magi_ray.commands.stores import StoredRun, open_named_run, store_flag, store_to_read
from magi_ray.errors import ObjectDamaged
from magi_ray.render.driving.progress import Phase
from magi_ray.storage import keys

if TYPE_CHECKING:
    from magi_ray.drivers.run_status import RunStatus

WATCH_REFRESH_S = 1.0


@click.command(epilog=example("magi-ray status quickstart"))
@run_argument
@store_option
@json_option
def status(name: str | None, store_uri: str, as_json: bool) -> None:
    """Show how far RUN is and which process renders it. RUN is an id or its beginning, a manifest that was submitted,
    @latest, or @-1 for the run before the newest (NAME@-1: of that manifest); not given: the newest."""
    from magi_ray.drivers.driver_monitor import find_driver
    from magi_ray.drivers.run_status import run_status
    from magi_ray.report import describe_times, status_table

    stored = open_named_run(name, store_uri, verb="status")
    found = run_status(stored.store, stored.run, find_driver(stored.store, stored.run_id))
    if as_json:
        print_json(found.as_json())
        return
    print_table(status_table(found.progress))
    if times := describe_times(found.progress.times):
        say(f"{times}.")
    if found.driver is None:
        say_at_rest(stored, found)
    else:
        heard = "still loading" if found.driver.beat is None else f"beat {found.driver.beat}"
        say(f"{found.state.capitalize()}, by {found.driver} ({heard}).")
        say_next(stored.command("watch"))


@click.command(name="list", epilog=example("magi-ray list --store ./magi-ray-store"))
@store_option
@json_option
def list_command(store_uri: str, as_json: bool) -> None:
    """List the runs in the store, oldest first."""
    from magi_ray.drivers.run_status import run_summary
    from magi_ray.render.runs.record import all_runs
    from magi_ray.report import runs_table

    store = store_to_read(store_uri)
    readable, damaged = all_runs(store)
    runs = []
    for run_id in readable:
        try:
            runs.append(run_summary(store, run_id))
        except ObjectDamaged as exc:
            damaged[run_id] = exc.message
    if as_json:
        print_json({"runs": runs, "damaged": [{"run_id": run_id, "what": what} for run_id, what in damaged.items()]})
    elif runs:
        print_table(runs_table(runs))
    else:
        say(f"The store at {store.uri} holds no runs.")
    for run_id, what in damaged.items():
        say(f"Run {run_id} is damaged: {what}.", style="red")
    if damaged:
        say_next(f"magi-ray verify{store_flag(store_uri)}")  # it says what mends them
    elif not runs and not as_json:
        say_next("magi-ray submit --help")


@click.command(epilog=example("magi-ray watch quickstart"))
@run_argument
@store_option
@json_option
def watch(name: str | None, store_uri: str, as_json: bool) -> None:
    """Follow RUN, which another process renders, until it ends. Ctrl-C stops watching, not rendering."""
    from magi_ray.drivers.driver_monitor import DriverMonitor
    from magi_ray.drivers.run_status import run_status
    from magi_ray.report import follow

    stored = open_named_run(name, store_uri, verb="watch")
    monitor = DriverMonitor(stored.store, stored.run_id)
    with follow(stderr()) as show:
        while True:
            found = run_status(stored.store, stored.run, monitor.look())
            show(found.progress)
            if found.driver is None:
                break
            time.sleep(WATCH_REFRESH_S)
    if monitor.silent:
        say(f"Nothing has been heard from {monitor.last} for too long; it is presumed dead.")
    if as_json:
        print_json(found.as_json())
    sys.exit(say_at_rest(stored, found))


def say_at_rest(stored: StoredRun, found: RunStatus) -> int:
    """Say what there is to know about a run that nobody renders; returns the exit code that fits."""
    videos = len(found.progress.videos)
    left = videos - found.progress.count(Phase.DONE)
    failed = found.progress.count(Phase.FAILED)
    if found.problems:
        say_left_out(stored.run)
    match found.state:
        case "done" | "failed" if not left:
            say(f"All videos are done: {stored.store.uri.rstrip('/')}/{keys.videos(stored.run_id)}")
            return console.FAILED_ROWS if found.problems else 0
        case "failed" | "broken":
            others = f"{left - failed} not done: too many failed" if found.state == "broken" else "the others are done"
            say(f"Failed: {failed} of {counted(videos, 'video')}; {others}.")
            say_next(stored.command("retry --failed"))
            return console.FAILED_ROWS
        case "paused":
            code, state = console.PAUSED, "Paused"
        case "cancelled":
            code, state = console.CANCELLED, "Cancelled"
        case _:
            code, state = console.FAILURE, "Not being rendered"
    of_these = f", {failed} of them failed" if failed else ""
    say(f"{state}; {left} of {counted(videos, 'video')} not done{of_these}.")
    if code == console.FAILURE:
        _say_last_error(stored)
    say_next(stored.command("resume"))
    return code


def _say_last_error(stored: StoredRun) -> None:
    """Why the last driver stopped, as far as this machine knows."""
    from magi_ray.drivers.status_file import last_error, log_path

    error, log = last_error(stored.store, stored.run_id), log_path(stored.store, stored.run_id)
    if error is not None:
        say(f"The last process stopped: {error.message}", style="red")
        if error.remedy:
            say(error.remedy)
    if log.exists():
        say(f"The last background process wrote to {log}.")
