"""Rendering a run in a process of its own, which this one follows and may leave."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from magi_ray.commands.console import print_json, say, say_next, stderr
from magi_ray.commands.exit_codes import INTERRUPTED
from magi_ray.commands.foreground import render_in_foreground
from magi_ray.commands.options import RenderOptions
from magi_ray.commands.outcome import report_exit
from magi_ray.commands.signals import DelayedInterrupts
from magi_ray.commands.stored_run import StoredRun
from magi_ray.errors import MagiRayError, StoreError

if TYPE_CHECKING:
    from magi_ray.commands.status_file import DriverExit, DriverStatus
    from magi_ray.render.driving.reports import ReportedProgress

FOLLOW_REFRESH_S = 0.5
# How long a process may take until its status file is there: Python starts, and reads its own files.
STARTING_S = 60.0
LOG_LINES_SHOWN = 12


def render_in_background(stored: StoredRun, options: RenderOptions, *, as_json: bool, no_wait: bool = False) -> None:
    """Render what is left in a process that outlives this one and its terminal. Follow it to its end and say how it
    ended, or with ``no_wait`` leave it as soon as it has begun."""
    from magi_ray.commands.driver_monitor import refuse_second_driver
    from magi_ray.render.driving import requests

    if not options.retry and stored.all_published():
        report_exit(stored, render_in_foreground(stored, options), as_json=as_json)
        return
    if not options.take_over:
        refuse_second_driver(stored)
    wanted = requests.requested(stored.store, stored.run_id)
    if wanted is not None:
        say(f"Run {stored.run_id} was {'paused' if wanted == 'pause' else 'cancelled'}; going on with it.")
        requests.clear(stored.store, stored.run_id)
    with DelayedInterrupts() as interrupts:
        driver = _DriverProcess(stored, options)
        if no_wait:
            driver.wait_until_begun()
            driver.leave(f"Rendering in the background, process {driver.pid}; its log is {driver.log}.", as_json)
            return
        try:
            with interrupts.allowed():
                ended = driver.follow()
        except KeyboardInterrupt:
            with suppress(OSError):  # its terminal may be gone
                driver.leave(f"Detached; process {driver.pid} goes on rendering.", as_json)
            sys.exit(INTERRUPTED)
    report_exit(stored, ended, as_json=as_json)


class _DriverProcess:
    """``magi-ray drive`` in a session of its own: started, followed, left."""

    def __init__(self, stored: StoredRun, options: RenderOptions) -> None:
        from magi_ray.commands.status_file import log_path, status_path

        self._stored = stored
        self._last_report = self._reported()
        self.log = log_path(stored.store, stored.run_id)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "magi_ray.cli", "drive", stored.run_id, "--store", stored.store_uri]
        with self.log.open("ab") as output:
            self._log_began = output.tell()
            self._process = subprocess.Popen(
                [*command, *options.argv()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._status_path = status_path(stored.store, stored.run_id, self.pid)

    def wait_until_begun(self) -> None:
        """Until others can see that the run is being rendered, or it has ended already. Raises MagiRayError if it did
        not even begin."""
        deadline = time.monotonic() + STARTING_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._status() is not None:
                return
            time.sleep(0.05)
        if self._process.poll() is not None:
            self._exit()

    def follow(self) -> DriverExit:
        """Show its progress until it ends. Raises the error that ended it, MagiRayError if it died without a word."""
        from magi_ray.report import follow

        say(f"Process {self.pid} renders; Ctrl-C leaves it running. Its log is {self.log}.")
        dashboard = None
        with follow(stderr()) as show:
            while True:
                ended = self._process.poll() is not None
                if dashboard is None and (status := self._status()) is not None and status.dashboard:
                    dashboard = status.dashboard
                    say(f"Ray dashboard: {dashboard}")
                report = self._reported()
                # What an earlier driver reported says nothing of this one.
                if report is not None and report != self._last_report:
                    self._last_report = report
                    show(report.progress)
                if ended:
                    return self._exit()
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(FOLLOW_REFRESH_S)

    def leave(self, message: str, as_json: bool) -> None:
        """It goes on; say so, and how to see it again."""
        # Without this, Python warns of a process that is left alone.
        self._process.returncode = self._process.returncode or 0
        following = self._stored.command("watch")
        if as_json:
            print_json(
                {"run_id": self._stored.run_id, "pid": self.pid, "log": str(self.log), "next_command": following}
            )
        say(message)
        say_next(following)

    def _reported(self) -> ReportedProgress | None:
        """What its run's driver last reported. A store that is out of reach does not end us."""
        from magi_ray.render.driving.reports import read_progress

        try:
            return read_progress(self._stored.store, self._stored.run_id)
        except StoreError:
            return None

    def _status(self) -> DriverStatus | None:
        from magi_ray.commands.status_file import read_status

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
        """It ended without a word."""
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
            message = "\n  ".join([f"{message} Its last words:", *lines])
        return MagiRayError(
            message,
            remedy=f"What was committed is kept. Its whole log is {self.log}.",
            next_command=self._stored.command("resume"),
        )
