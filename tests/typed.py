"""``magi-ray`` typed in a terminal of its own, and looking after the processes that come of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

MARK = "MAGI_RAY_TEST_MARK"


def _heed_signals() -> None:
    """As in a terminal, also where whoever started the tests ignores them: nohup, a shell's background."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Command:
    """``magi-ray`` in a session of its own; every process below it carries a mark, however it came to be."""

    def __init__(self, folder: Path, *words: str, **environ: str) -> None:
        self.mark = uuid.uuid4().hex
        self._stderr = folder / f"{self.mark}.stderr"
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "magi_ray.cli", *words],
                cwd=folder,
                env={**os.environ, **environ, MARK: self.mark},
                preexec_fn=_heed_signals,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def end(self, *, within_s: float = 240.0) -> tuple[int, str]:
        """Exit code and stdout."""
        stdout, _ = self.process.communicate(timeout=within_s)
        return self.process.returncode, stdout

    def press_ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)  # as a terminal does: to all of them

    def driver(self) -> psutil.Process | None:
        """The process that renders for it."""
        for process in self.processes():
            with suppress(psutil.Error):  # it has ended
                if "drive" in process.cmdline()[3:4]:
                    return process
        return None

    def processes(self, title: str = "") -> list[psutil.Process]:
        """All that live and carry the mark."""
        return processes_with(MARK, self.mark, title=title)

    def has_left_nothing(self) -> bool:
        return not self.processes()

    def clean_up(self) -> None:
        for process in self.processes():
            process.kill()
        self.process.communicate(timeout=60)


def wait_until(condition: Callable[[], Any], what: str, *, within_s: float = 60.0) -> None:
    """Look again and again; generous, since the machine may be slow."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < within_s, f"not within {within_s:.0f} s: {what}"
        time.sleep(0.05)


def title_of(process: psutil.Process) -> str:
    """How the process calls itself; Ray's workers write over their command line."""
    return (process.cmdline() or [""])[0].strip()


def processes_with(variable: str, value: str, *, title: str = "") -> list[psutil.Process]:
    """The processes that were started with this environment variable, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        try:
            alive = process.environ().get(variable) == value and process.status() != psutil.STATUS_ZOMBIE
            if alive and title_of(process).startswith(title):
                found.append(process)
        except psutil.Error:
            continue
    return found
