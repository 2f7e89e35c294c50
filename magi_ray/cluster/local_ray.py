"""Ray on this machine: started quietly for one run, shut down when the run ends."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import NoReturn

import ray

from magi_ray.settings.environment import set_defaults

# What Ray reads when it starts.
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # actors without a GPU still see what the machine has
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # suppress workers' logs: we report a lost worker ourselves, in one line
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # `uv run magi-ray` must not wrap every worker in `uv run`
}


def prepare_ray_environment() -> None:
    """Set what Ray reads from the environment when it starts. What the user has set stays."""
    set_defaults(_RAY_ENVIRONMENT)


@contextmanager
def local_ray(*, namespace: str, dashboard: bool) -> Iterator[str | None]:
    """A Ray instance of our own, even where another cluster runs on this machine; yields the dashboard's URL, if any.

    SIGTERM raises KeyboardInterrupt, as Ctrl-C does; Ray's processes die with this one in any case. What is printed
    to stdout meanwhile goes to stderr: Ray prints there about every worker that dies.
    Inside a process that is connected to Ray already (a test session, a notebook), that instance is used and left
    running.
    """
    if ray.is_initialized():
        yield None
        return
    prepare_ray_environment()
    # Signals are the main thread's business.
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        context = ray.init(
            address="local",
            namespace=namespace,
            include_dashboard=dashboard,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        if in_main:
            # Only now: ray.init puts a handler of its own there.
            signal.signal(signal.SIGTERM, _interrupt)
        with redirect_stdout(sys.stderr):
            yield f"http://{context.dashboard_url}" if dashboard and context.dashboard_url else None
    finally:
        ray.shutdown()
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt
