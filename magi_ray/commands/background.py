"""Rendering a run in a process of its own, which this one follows and may leave."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from contextlib import suppress

import click

from magi_ray.commands.console import INTERRUPTED, print_json, say, say_next, stderr
from magi_ray.commands.foreground import STARTING_RAY, render_in_foreground, result_at_rest
from magi_ray.commands.look import say_at_rest
from magi_ray.commands.options import RenderOptions
from magi_ray.commands.outcome import report_exit
from magi_ray.commands.signals import delayed_interrupts
from magi_ray.commands.stores import StoredRun
from magi_ray.drivers.driver_monitor import DriverMonitor, find_driver
from magi_ray.drivers.process import DriverProcess
from magi_ray.drivers.run_status import run_status
from magi_ray.drivers.status_file import DriverExit, log_path, note_options, read_status, status_path
from magi_ray.errors import AlreadyRendered, MagiRayError, StoreError
from magi_ray.render.driving import requests
from magi_ray.render.driving.reports import ReportedProgress, read_failures, read_progress
from magi_ray.report import follow
from magi_ray.storage.leases import BEAT_S, TTL_S

FOLLOW_REFRESH_S = 0.5


def render_in_background(stored: StoredRun, options: RenderOptions, *, as_json: bool, no_wait: bool = False) -> None:
    """Render what is left in a process that outlives this one and its terminal. Follow it until it ends and say how,
    or with ``no_wait`` leave it as soon as it has begun."""
    if not options.retry and stored.all_published():
        report_exit(stored, render_in_foreground(stored, options), as_json=as_json)
        return
    if not options.take_over:
        _refuse_second_driver(stored)
    note_options(stored.store, stored.run_id, options.again())
    wanted = requests.requested(stored.store, stored.run_id)
    if wanted is not None:
        say(f"Run {stored.run_id} was {'paused' if wanted == 'pause' else 'cancelled'}; going on with it.")
        requests.clear(stored.store, stored.run_id)
    failed = read_failures(stored.store, stored.run_id, stored.run.plans)
    if failed and (result := result_at_rest(stored, options)) is not None:
        report_exit(stored, DriverExit(run_result=result), as_json=as_json)
        return
    last_report = _reported(stored)
    if last_report is not None:
        tell_of_other_ffmpeg(stored, options.retry)
    with delayed_interrupts() as interrupts_allowed:
        resume = stored.command("resume")
        driver = DriverProcess(stored.store, stored.store_uri, stored.run_id, options.argv(), resume=resume)
        try:
            if no_wait:
                driver.wait_until_begun()
                message = f"Rendering in the background, process {driver.pid}; its log is {driver.log}."
                driver.leave()
                _leave(stored, driver.pid, message, as_json=as_json)
                return
            try:
                with interrupts_allowed():
                    ended = _follow(stored, driver, last_report, on_ray=not options.local)
            except KeyboardInterrupt:
                driver.leave()
                with suppress(OSError):  # its terminal may be gone
                    _leave(stored, driver.pid, f"Detached; process {driver.pid} goes on rendering.", as_json=as_json)
                sys.exit(INTERRUPTED)
        except MagiRayError as exc:
            for traceback in getattr(exc, "__notes__", ()):
                click.echo(traceback, err=True, nl=False)
            raise
    report_exit(stored, ended, as_json=as_json)


def _follow(
    stored: StoredRun, driver: DriverProcess, last_report: ReportedProgress | None, *, on_ray: bool
) -> DriverExit:
    """Show its progress until it ends. Raises as ``DriverProcess.result``.

    last_report: what an earlier driver reported says nothing about this one.
    """
    say(f"Process {driver.pid} renders; Ctrl-C leaves it running. Its log is {driver.log}.")
    if on_ray:
        say(STARTING_RAY)
    dashboard, ended = None, False
    with follow(stderr()) as show:
        while not ended:
            ended = driver.ended(within_s=FOLLOW_REFRESH_S)
            if dashboard is None and (status := driver.status()) is not None and status.dashboard:
                dashboard = status.dashboard
                say(f"Ray dashboard: {dashboard}")
            report = _reported(stored)
            if report is not None and report != last_report:
                last_report = report
                show(report.progress)
    return driver.result()


def follow_driver(stored: StoredRun, monitor: DriverMonitor, *, as_json: bool, no_wait: bool) -> bool:
    """Follow the process that renders the run already until it ends, and say how, as whoever started it does; with
    ``no_wait`` only say that it renders. False if nobody does, or only one on another machine that may be dead.

    monitor: of the run.  Raises the error that ended that process.
    """
    driver = monitor.look()
    if driver is None or (no_wait and not driver.here):
        return False
    already = f"Run {stored.run_id} is being rendered already, by {driver}"
    if no_wait:
        _leave(stored, driver.owner.pid, f"{already}.", as_json=as_json)
        return True
    say(f"{already}; following it. Ctrl-C leaves it running.")
    ended: DriverExit | None = None
    with delayed_interrupts() as interrupts_allowed:
        try:
            with interrupts_allowed(), follow(stderr()) as show:
                while driver is not None:
                    with suppress(StoreError):
                        if (reported := read_progress(stored.store, stored.run_id)) is not None:
                            show(reported.progress)
                    time.sleep(FOLLOW_REFRESH_S)
                    if driver.here:
                        status = read_status(status_path(stored.store, stored.run_id, driver.owner.pid))
                        ended = None if status is None else status.ended
                    driver = monitor.look()
        except KeyboardInterrupt:
            assert driver is not None
            with suppress(OSError):
                _leave(stored, driver.owner.pid, f"Detached; {driver} goes on rendering.", as_json=as_json)
            sys.exit(INTERRUPTED)
    if monitor.silent:
        say(f"Nothing has been heard from {monitor.last} for too long; it is presumed dead.")
        return False
    if ended is None and (result := result_at_rest(stored, RenderOptions())) is not None:
        ended = DriverExit(run_result=result)  # whoever started it has read its status file and removed it
    if ended is None:
        found = run_status(stored.store, stored.run, None)
        if as_json:
            print_json(found.as_json())
        sys.exit(say_at_rest(stored, found))
    if ended.error is not None:
        error = ended.error.error()
        for traceback in getattr(error, "__notes__", ()):
            click.echo(traceback, err=True, nl=False)
        raise error
    report_exit(stored, ended, as_json=as_json)
    return True


def _leave(stored: StoredRun, pid: int, message: str, *, as_json: bool) -> None:
    """Let a driver go on; say so, and how to follow it."""
    following = stored.command("watch")
    if as_json:
        log = str(log_path(stored.store, stored.run_id))
        print_json({"run_id": stored.run_id, "pid": pid, "log": log, "next_command": following})
    say(message)
    say_next(following)


def tell_of_other_ffmpeg(stored: StoredRun, retry: Collection[str]) -> None:
    """Say what is encoded again because this machine's ffmpeg is not the one of before. Raises MediaError without
    ffmpeg."""
    from magi_ray.media.encoder import encoder_identity, find_ffmpeg
    from magi_ray.render.upkeep.reencoding import reencoding

    if found := reencoding(stored.store, stored.run, encoder_identity(find_ffmpeg()), retry=retry):
        say(f"note: {found}", style="yellow")


def _reported(stored: StoredRun) -> ReportedProgress | None:
    """The run's last report. A store that cannot be reached does not stop us."""
    try:
        return read_progress(stored.store, stored.run_id)
    except StoreError:
        return None


def _refuse_second_driver(stored: StoredRun) -> None:
    """Raises AlreadyRendered while a process of this machine renders the run. Only time can tell whether one on another
    machine still lives: the new driver waits for that."""
    driver = find_driver(stored.store, stored.run_id)
    if driver is None:
        return
    if driver.here:
        raise AlreadyRendered(
            f"Run {stored.run_id} is already being rendered by {driver}.",
            remedy="Watch it, pause it first, or take it over with --take-over.",
            next_command=stored.command("watch"),
        )
    say(f"It was last rendered by {driver}; {TTL_S + BEAT_S:.0f} s will show whether it still is.")
