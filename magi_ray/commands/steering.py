"""magi-ray pause, cancel, retry."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from magi_ray.commands.common import (
    FAILURE,
    at_store,
    command_line,
    counted,
    example,
    json_option,
    open_named_run,
    print_json,
    say,
    stderr,
    store_option,
    store_to_read,
)
from magi_ray.commands.rendering import How, all_published, driving_options, render_apart, weights_option
from magi_ray.errors import InputError, MagiRayError, StoreUnavailable, Superseded

if TYPE_CHECKING:
    from magi_ray.commands.processes import Process
    from magi_ray.commands.standing import Driver, Lookout
    from magi_ray.render.runs.record import Run
    from magi_ray.storage.store import Store

# Cancelling takes 15 s at most: so long the driver may take to end by itself, then to end politely, then at all.
ASKED_S, TOLD_S, KILLED_S = 8.0, 2.5, 1.5
OUT_OF_REACH_S = 3.0


@click.command(epilog=example("magi-ray pause quickstart"))
@click.argument("run_id", metavar="RUN")
@store_option
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0), default=3600.0, show_default=True, metavar="S",
    help="How many seconds to wait for the stages in work.",
)  # fmt: skip
@json_option
def pause(run_id: str, store_uri: str, timeout_s: float, as_json: bool) -> None:
    """Stop RUN when its stages in work are committed: at most one forward is lost. `magi-ray resume` goes on."""
    from magi_ray.commands.standing import Lookout
    from magi_ray.render.driving import requests as control
    from magi_ray.render.driving.reports import read_progress
    from magi_ray.report import follow

    store = store_to_read(store_uri)
    run = open_named_run(store, run_id, "pause", store_uri)
    following = command_line("resume", run, store_uri)
    lookout = Lookout(store, run.run_id)
    driver = lookout.look()
    if driver is None:
        if as_json:
            print_json({"run_id": run.run_id, "paused": False, "next_command": following})
        if all_published(store, run):
            say(f"All videos of run {run.run_id} are done: there is nothing to pause.")
            return
        say(f"Run {run.run_id} is not being rendered: there is nothing to pause. What was committed is kept.")
        say(f"next: {following}", style="bold")
        return
    control.request(store, run.run_id, "pause")
    say(f"Asked {driver} to pause; it stops when the stages in work are committed. Ctrl-C leaves it to that.")
    deadline = time.monotonic() + timeout_s
    with follow(stderr()) as show:
        while lookout.look() is not None and time.monotonic() < deadline:
            if (noted := read_progress(store, run.run_id)) is not None:
                show(noted.progress)
            time.sleep(1)
    still = lookout.look()
    if as_json:
        print_json({"run_id": run.run_id, "paused": still is None, "next_command": following})
    if still is not None:
        say(f"After {timeout_s:.0f} s {still} has not come to the end of a stage yet. It will pause there.")
        say(f"next: {command_line('watch', run, store_uri)}", style="bold")
        sys.exit(FAILURE)
    words = "All videos were done before it paused" if all_published(store, run) else "Paused"
    say(f"{words}. What was committed is kept.")
    say(f"next: {following}", style="bold")


@click.command(epilog=example("magi-ray cancel quickstart"))
@click.argument("run_id", metavar="RUN")
@store_option
@json_option
def cancel(run_id: str, store_uri: str, as_json: bool) -> None:
    """Stop RUN now: within 15 s nothing of it is left running. What was committed is kept."""
    store = store_to_read(store_uri, patience_s=OUT_OF_REACH_S)
    try:
        _cancel(store, run_id, store_uri, as_json=as_json)
    except StoreUnavailable as exc:
        _cancel_unasked(store, run_id, store_uri, exc, as_json=as_json)


def _cancel(store: Store, run_id: str, store_uri: str, *, as_json: bool) -> None:
    from magi_ray.commands.standing import Lookout
    from magi_ray.render.driving import requests as control

    run = open_named_run(store, run_id, "cancel", store_uri)
    lookout = Lookout(store, run.run_id)
    driver = lookout.look()
    if driver is None and all_published(store, run):
        if as_json:
            print_json({"run_id": run.run_id, "cancelled": False})
        say(f"All videos of run {run.run_id} are done: there is nothing to cancel.")
        return
    control.request(store, run.run_id, "cancel")
    what, ended = ("nobody was rendering it", True) if driver is None else _stop(driver, lookout)
    if as_json:
        print_json({"run_id": run.run_id, "cancelled": ended, "how": what})
    if not ended:
        raise MagiRayError(
            f"Asked {driver} to cancel run {run.run_id}, but {what}.",
            remedy="It stops as soon as it reads the request; a process that died elsewhere is noticed by its silence.",
            next_command=command_line("watch", run, store_uri),
        )
    say(f"Cancelled: {what}. What was committed is kept.")
    say(f"next: {command_line('resume', run, store_uri)}", style="bold")


def _cancel_unasked(store: Store, name: str, store_uri: str, exc: StoreUnavailable, *, as_json: bool) -> None:
    """The store is out of reach, and with it the driver's ear; but if it is a process of this machine, it can be ended
    all the same. Raises ``exc`` otherwise."""
    from magi_ray.commands.drivers import all_at_work_here
    from magi_ray.commands.processes import below
    from magi_ray.commands.standing import Driver

    found = list(all_at_work_here(store, Path(name).name))
    if len(found) != 1:
        raise exc
    [(run_id, owner)] = found
    what, ended = _end_here(Driver(owner=owner, beat=None), below(owner.pid))
    if as_json:
        print_json({"run_id": run_id, "cancelled": ended, "how": what})
    if not ended:
        raise MagiRayError(f"The store is out of reach, and {what}.", remedy="End that process by hand.") from exc
    say(f"The store is out of reach; {what}. What was committed is kept, but the run is not marked as cancelled.")
    say(f"next: magi-ray resume {run_id}{at_store(store_uri)}", style="bold")


def _stop(driver: Driver, lookout: Lookout) -> tuple[str, bool]:
    """Wait for ``driver`` to end; if it does not and is a process of this machine, end it and all below it. What was
    done, and whether that was enough."""
    from magi_ray.commands.processes import alive, below, in_session, kill

    pid = driver.owner.pid
    tree = below(pid) if driver.here else set()
    if _within(ASKED_S, lambda: lookout.look() is None):
        if driver.here:
            tree |= in_session(pid)
        # Ray's processes end with their driver, a moment later.
        if _within(KILLED_S, lambda: not alive(tree)):
            return f"{driver} has ended", True
        left = alive(tree)
        kill(left)
        words = f"{driver} has ended; what was left of it was killed"
        return words, _within(KILLED_S, lambda: not alive(left))
    if not driver.here:
        return f"it has not ended within {ASKED_S:.0f} s", False
    return _end_here(driver, tree | below(pid))


def _end_here(driver: Driver, tree: set[Process]) -> tuple[str, bool]:
    """End a driver of this machine, politely and then at once, and the processes below it. As ``_stop``."""
    from magi_ray.commands.processes import alive, below, kill

    pid = driver.owner.pid
    try:
        os.kill(pid, signal.SIGTERM)
    except PermissionError:
        return f"{driver} does not end, and belongs to another user", False
    except ProcessLookupError:
        pass
    if _within(TOLD_S, lambda: not alive(tree)):
        return f"{driver} was terminated", True
    kill(tree | below(pid))
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)  # also where there is no /proc
    return f"{driver} was killed", _within(KILLED_S, lambda: not alive(tree))


def _within(seconds: float, true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@click.command(epilog=example("magi-ray retry quickstart --failed"))
@click.argument("run_id", metavar="RUN")
@click.option("--failed", is_flag=True, help="All rows that failed; the default.")
@click.option("--job", "job_ids", multiple=True, metavar="ID", help="This row; several may be given.")
@click.option("--from-chunk", type=int, metavar="N", help="Render the row of --job anew from chunk N on: another take.")
@store_option
@weights_option
@driving_options
@click.option("--no-wait", is_flag=True, help="Return as soon as it is rendered in the background.")
@json_option
def retry(
    run_id: str,
    failed: bool,
    job_ids: tuple[str, ...],
    from_chunk: int | None,
    store_uri: str,
    weights: Path | None,
    how: How,
    no_wait: bool,
    as_json: bool,
) -> None:
    """Try rows of RUN again: all that failed, or some. Of a row that is done, everything is read again, and what is
    damaged is made again."""
    from magi_ray.commands.standing import driver_of
    from magi_ray.render.driving.reports import read_failures
    from magi_ray.render.plans.takes import add_take
    from magi_ray.render.runs.record import open_run

    if failed and job_ids:
        raise InputError("--failed stands beside --job.", remedy="Give one of them.")
    if from_chunk is not None and len(job_ids) != 1:
        raise InputError(
            f"--from-chunk is about one row, but {len(job_ids)} are named.", remedy="Name the row with one --job ID."
        )
    store = store_to_read(store_uri)
    run = open_named_run(store, run_id, "retry", store_uri, weights=weights)
    for job_id in job_ids:
        _require_job(run, job_id, store_uri)
    driver = driver_of(store, run.run_id)
    if driver is not None and driver.here and not how.take_over:
        raise Superseded(
            f"Run {run.run_id} is being rendered, by {driver}.",
            remedy="Rows can be tried again when it has ended; or pause it first.",
            next_command=command_line("pause", run, store_uri),
        )
    how = replace(how, weights=weights, retry=job_ids)
    if from_chunk is not None:
        [job_id] = job_ids
        chunks = run.plans[job_id].timeline.num_chunks
        number = add_take(store, run.run_id, job_id, from_chunk, num_chunks=chunks)
        run = open_run(store, run.run_id, weights=weights)
        say(f"Take {number} of run {run.run_id}: {job_id} anew from chunk {from_chunk} on.")
    elif not job_ids:
        count = len(read_failures(store, run.run_id))
        if not count:
            if as_json:
                print_json({"run_id": run.run_id, "retried": 0})
            say(f"No row of run {run.run_id} has failed.")
            following = "status" if all_published(store, run) else "resume"
            say(f"next: {command_line(following, run, store_uri)}", style="bold")
            return
        how = replace(how, retry_failed=True)
        say(f"Trying {counted(count, 'row')} of run {run.run_id} again.")
    render_apart(store, run, store_uri, how, as_json=as_json, no_wait=no_wait)


def _require_job(run: Run, job_id: str, store_uri: str) -> None:
    import difflib

    if job_id in run.plans:
        return
    near = difflib.get_close_matches(job_id, run.plans, n=1, cutoff=0.4)
    raise InputError(
        f"Run {run.run_id} has no row {job_id!r}.",
        remedy=f"Did you mean {near[0]}?" if near else f"Its rows are {', '.join(list(run.plans)[:5])} …",
        next_command=f"magi-ray status {run.run_id}{at_store(store_uri)}",
    )
