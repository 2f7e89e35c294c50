"""Rendering a run in a process of its own, which this one follows and may leave."""

from __future__ import annotations

import sys
from collections.abc import Collection
from contextlib import suppress

import click

from magi_ray.commands.console import INTERRUPTED, print_json, say, say_next, stderr
from magi_ray.commands.foreground import render_in_foreground
from magi_ray.commands.options import RenderOptions
from magi_ray.commands.outcome import report_exit
from magi_ray.commands.signals import delayed_interrupts
from magi_ray.commands.stores import StoredRun
from magi_ray.drivers.driver_monitor import find_driver
from magi_ray.drivers.process import DriverProcess
from magi_ray.drivers.status_file import DriverExit
from magi_ray.errors import MagiRayError, StoreError, Superseded
from magi_ray.render.driving import requests
from magi_ray.render.driving.reports import ReportedProgress, read_progress
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
    wanted = requests.requested(stored.store, stored.run_id)
    if wanted is not None:
        say(f"Run {stored.run_id} was {'paused' if wanted == 'pause' else 'cancelled'}; going on with it.")
        requests.clear(stored.store, stored.run_id)
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
                _leave(stored, driver, message, as_json)
                return
            try:
                with interrupts_allowed():
                    ended = _follow(stored, driver, last_report)
            except KeyboardInterrupt:
                with suppress(OSError):  # its terminal may be gone
                    _leave(stored, driver, f"Detached; process {driver.pid} goes on rendering.", as_json)
                sys.exit(INTERRUPTED)
        except MagiRayError as exc:
            for traceback in getattr(exc, "__notes__", ()):
                click.echo(traceback, err=True, nl=False)
            raise
    report_exit(stored, ended, as_json=as_json)


def _follow(stored: StoredRun, driver: DriverProcess, last_report: ReportedProgress | None) -> DriverExit:
    """Show its progress until it ends. Raises as ``DriverProcess.result``.

    last_report: what an earlier driver reported says nothing about this one.
    """
    say(f"Process {driver.pid} renders; Ctrl-C leaves it running. Its log is {driver.log}.")
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


def _leave(stored: StoredRun, driver: DriverProcess, message: str, as_json: bool) -> None:
    """Let it go on; say so, and how to follow it again."""
    driver.leave()
    following = stored.command("watch")
    if as_json:
        content = {"run_id": stored.run_id, "pid": driver.pid, "log": str(driver.log)}
        print_json(content | {"next_command": following})
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
    """Raises Superseded while a process of this machine renders the run. Only time can tell whether one on another
    machine still lives: the new driver waits for that."""
    driver = find_driver(stored.store, stored.run_id)
    if driver is None:
        return
    if driver.here:
        raise Superseded(
            f"Run {stored.run_id} is already being rendered by {driver}.",
            remedy="Watch it, pause it first, or take it over with --take-over.",
            next_command=stored.command("watch"),
        )
    say(f"It was last rendered by {driver}; {TTL_S + BEAT_S:.0f} s will show whether it still is.")
