"""Rendering a run in a process of its own, which this one follows and may leave."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress

import click

from magi_ray.commands.console import INTERRUPTED, print_json, say, say_next, stderr
from magi_ray.commands.driver_monitor import refuse_second_driver
from magi_ray.commands.foreground import render_in_foreground
from magi_ray.commands.options import RenderOptions
from magi_ray.commands.outcome import report_exit
from magi_ray.commands.signals import delayed_interrupts
from magi_ray.commands.status_file import DriverExit, DriverStatus, log_path, read_status, status_path
from magi_ray.commands.stores import StoredRun
from magi_ray.errors import MagiRayError, StoreError
from magi_ray.render.driving import requests
from magi_ray.render.driving.reports import ReportedProgress, read_progress
from magi_ray.report import follow

FOLLOW_REFRESH_S = 0.5
# How long a process may take to write its status file: Python has to start first.
STARTING_S = 60.0
LOG_LINES_SHOWN = 12


def render_in_background(stored: StoredRun, options: RenderOptions, *, as_json: bool, no_wait: bool = False) -> None:
    """Render what is left in a process that outlives this one and its terminal. Follow it until it ends and say how,
    or with ``no_wait`` leave it as soon as it has begun."""
    if not options.retry and stored.all_published():
        report_exit(stored, render_in_foreground(stored, options), as_json=as_json)
        return
    if not options.take_over:
        refuse_second_driver(stored)
    wanted = requests.requested(stored.store, stored.run_id)
    if wanted is not None:
        say(f"Run {stored.run_id} was {'paused' if wanted == 'pause' else 'cancelled'}; going on with it.")
        requests.clear(stored.store, stored.run_id)
    with delayed_interrupts() as interrupts_allowed:
        driver = _DriverProcess(stored, options)
        if no_wait:
            driver.wait_until_begun()
            driver.leave(f"Rendering in the background, process {driver.pid}; its log is {driver.log}.", as_json)
            return
        try:
            with interrupts_allowed():
                ended = driver.follow()
        except KeyboardInterrupt:
            with suppress(OSError):  # its terminal may be gone
                driver.leave(f"Detached; process {driver.pid} goes on rendering.", as_json)
            sys.exit(INTERRUPTED)
    report_exit(stored, ended, as_json=as_json)


class _DriverProcess:
    """``magi-ray drive`` in a session of its own: started, followed, left."""

    def __init__(self, stored: StoredRun, options: RenderOptions) -> None:
        self._stored = stored
        self._last_report = self._reported()
        self.log = log_path(stored.store, stored.run_id)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "magi_ray.cli", "drive", stored.run_id, "--store", stored.store_uri]
        with self.log.open("ab") as output:
            self._log_began = output.tell()
            self._process = subprocess.Popen(
                [*command, *options.argv()], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.pid = self._process.pid
        self._status_path = status_path(stored.store, stored.run_id, self.pid)

    def wait_until_begun(self) -> None:
        """Until others can see that it renders the run, or it has ended. Raises the error that ended it."""
        deadline = time.monotonic() + STARTING_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._status() is not None:
                return
            time.sleep(0.05)
        if self._process.poll() is not None:
            self._exit()

    def follow(self) -> DriverExit:
        """Show its progress until it ends. Raises the error that ended it, MagiRayError if it died without one."""
        say(f"Process {self.pid} renders; Ctrl-C leaves it running. Its log is {self.log}.")
        dashboard = None
        with follow(stderr()) as show:
            while True:
                ended = self._process.poll() is not None
                if dashboard is None and (status := self._status()) is not None and status.dashboard:
                    dashboard = status.dashboard
                    say(f"Ray dashboard: {dashboard}")
                report = self._reported()
                # What an earlier driver reported says nothing about this one.
                if report is not None and report != self._last_report:
                    self._last_report = report
                    show(report.progress)
                if ended:
                    return self._exit()
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(FOLLOW_REFRESH_S)

    def leave(self, message: str, as_json: bool) -> None:
        """Let it go on; say so, and how to follow it again."""
        # Otherwise Python warns about a process that nobody waited for.
        self._process.returncode = self._process.returncode or 0
        following = self._stored.command("watch")
        if as_json:
            content = {"run_id": self._stored.run_id, "pid": self.pid, "log": str(self.log)}
            print_json(content | {"next_command": following})
        say(message)
        say_next(following)

    def _reported(self) -> ReportedProgress | None:
        """The run's last report. A store that cannot be reached does not stop us."""
        try:
            return read_progress(self._stored.store, self._stored.run_id)
        except StoreError:
            return None

    def _status(self) -> DriverStatus | None:
        return read_status(self._status_path)

    def _exit(self) -> DriverExit:
        status = self._status()
        self._status_path.unlink(missing_ok=True)
        if status is None or status.ended is None:
            raise self._death()
        if status.ended.error is None:
            return status.ended
        if status.ended.error.traceback:
            click.echo(status.ended.error.traceback, err=True, nl=False)
        raise status.ended.error.error()

    def _death(self) -> MagiRayError:
        """The error for a process that ended without saying why."""
        code = self._process.returncode
        cause = f"exit code {code}"
        if code < 0:
            with suppress(ValueError):
                cause = f"signal {-code} ({signal.Signals(-code).name})"
        lines: list[str] = []
        with suppress(OSError), self.log.open("rb") as log:
            log.seek(self._log_began)
            lines = log.read().decode(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        message = f"Process {self.pid}, which rendered run {self._stored.run_id}, ended with {cause}."
        if lines:
            message = "\n  ".join([f"{message} The end of its log:", *lines])
        remedy = f"What was committed is kept. The whole log is {self.log}."
        return MagiRayError(message, remedy=remedy, next_command=self._stored.command("resume"))
