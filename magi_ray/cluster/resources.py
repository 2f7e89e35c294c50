"""Ray on this machine: started quietly for one run, gone when the run ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from magi_ray.settings import prepare_ray_environment


@contextmanager
def local_ray(*, namespace: str, dashboard: bool) -> Iterator[str | None]:
    """A Ray instance of our own, even where another cluster runs on this machine; yields the dashboard's URL, if any.

    Inside a process that is connected to Ray already (a test session, a notebook), that instance is used and left
    running.
    """
    if ray.is_initialized():
        yield None
        return
    prepare_ray_environment()
    context = ray.init(
        address="local",
        namespace=namespace,
        include_dashboard=dashboard,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield f"http://{context.dashboard_url}" if dashboard and context.dashboard_url else None
    finally:
        ray.shutdown()
