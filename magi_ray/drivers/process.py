"""``magi-ray drive`` in a process of its own, which outlives whoever starts it: started, looked at, left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from magi_ray.drivers.status_file import DriverExit, DriverStatus, log_path, read_status, status_path
from magi_ray.errors import MagiRayError
from magi_ray.storage.store import Store

# How long a process may take to write its status file: Python has to start first.
STARTING_S = 60.0
LOG_LINES_SHOWN = 12


class DriverProcess:
    """A driver of run ``run_id`` in a session of its own.

    store_uri: the store's address for another process.  options: to be typed after ``magi-ray drive RUN``.
    resume: what to type if it dies.
    """

    def __init__(self, store: Store, store_uri: str, run_id: str, options: Sequence[str], *, resume: str) -> None:
        self._run_id, self._resume = run_id, resume
        self._last_status: DriverStatus | None = None
        self.log = log_path(store, run_id)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "magi_ray.cli", "drive", run_id, "--store", store_uri]
        with self.log.open("ab") as output:
            self._log_began = output.tell()
            self._process = subprocess.Popen(
                [*command, *options], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.pid = self._process.pid
        self._status_path = status_path(store, run_id, self.pid)

    def wait_until_begun(self) -> None:
        """Until others can see that it renders the run, or it has ended. Raises the error that ended it."""
        deadline = time.monotonic() + STARTING_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if self.status() is not None:
                return
            time.sleep(0.05)
        if self._process.poll() is not None:
            self.result()

    def ended(self, *, within_s: float = 0.0) -> bool:
        """Whether it has ended, after waiting for that at most ``within_s`` seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)
        return self._process.poll() is not None

    def leave(self) -> None:
        """Nobody here waits for it any more."""
        # Otherwise Python warns about it.
        self._process.returncode = self._process.returncode or 0

    def status(self) -> DriverStatus | None:
        """What it says of itself; None until it has begun."""
        self._last_status = read_status(self._status_path) or self._last_status
        return self._last_status

    def result(self) -> DriverExit:
        """How it ended, which it has. Raises the error that ended it, with the traceback as a note if it is a bug;
        MagiRayError if it died without one."""
        status = self.status()
        self._status_path.unlink(missing_ok=True)
        if status is None or status.ended is None:
            raise self._death()
        if status.ended.error is not None:
            raise status.ended.error.error()
        return status.ended

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
        message = f"Process {self.pid}, which rendered run {self._run_id}, ended with {cause}."
        if lines:
            message = "\n  ".join([f"{message} The end of its log:", *lines])
        remedy = f"What was committed is kept. The whole log is {self.log}."
        return MagiRayError(message, remedy=remedy, next_command=self._resume)
