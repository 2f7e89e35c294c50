"""Rendering a run in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from magi_ray.commands.console import say, stderr
from magi_ray.commands.options import RenderOptions
from magi_ray.commands.signals import terminated_as_by_ctrl_c
from magi_ray.commands.stores import StoredRun
from magi_ray.drivers.status_file import DriverExit, note_options
from magi_ray.errors import MagiRayError, Superseded
from magi_ray.render.driving.inventory import take_inventory_of_run
from magi_ray.render.driving.reports import RunReports, RunResult, read_failures
from magi_ray.render.driving.requests import requested
from magi_ray.render.driving.scheduler import RunState
from magi_ray.render.driving.session import DriveOptions
from magi_ray.report import follow

# Measured three times on two cores with 14 to 16 processes waiting for them: 24 to 31 s.
STARTING_RAY = "Starting Ray on this machine, which takes a while if it is busy …"


def render_in_foreground(
    stored: StoredRun, options: RenderOptions, *, on_dashboard: Callable[[str], None] = lambda url: None
) -> DriverExit:
    """Render what is left, here. Ctrl-C, SIGTERM and a closed terminal stop it, whatever it is doing.

    on_dashboard: called with the URL of Ray's dashboard, if there is one.
    Raises what ``render_locally`` and ``render_on_ray`` raise.
    """
    begun = time.monotonic()
    note_options(stored.store, stored.run_id, options.again())
    try:
        with terminated_as_by_ctrl_c():
            run_result = result_at_rest(stored, options) or _drive(stored, options, on_dashboard)
    except (KeyboardInterrupt, SystemExit):  # while Ray starts, it handles SIGTERM itself: it exits
        return DriverExit(seconds=time.monotonic() - begun)
    except MagiRayError as exc:
        exc.next_command = exc.next_command or stored.command("watch" if isinstance(exc, Superseded) else "resume")
        raise
    return DriverExit(run_result=run_result, seconds=time.monotonic() - begun)


def result_at_rest(stored: StoredRun, options: RenderOptions) -> RunResult | None:
    """The result of a run that is done but for rows that failed, paused or cancelled; None if there is something to
    render. Loads neither Ray nor torch."""
    if not options.retry:
        left = stored.unpublished()
        if not left:
            return _close(stored, RunState.DONE)
        if not options.retry_failed and read_failures(stored.store, stored.run_id, left).keys() >= set(left):
            return _close(stored, RunState.FAILED)
    match requested(stored.store, stored.run_id):
        case "pause":
            return _close(stored, RunState.PAUSED)
        case "cancel":
            return _close(stored, RunState.CANCELLED)
        case None:
            return None


def _close(stored: StoredRun, state: RunState) -> RunResult:
    from magi_ray.media.encoder import encoder_identity, find_ffmpeg

    # The segments of published videos are not looked up, so that a done run needs no ffmpeg.
    encoder = None if state is RunState.DONE else encoder_identity(find_ffmpeg())
    earlier = read_failures(stored.store, stored.run_id, stored.run.plans)
    rows = [
        replace(row, failed=row.job_id in earlier and not row.published)
        for row in take_inventory_of_run(stored.store, stored.run, encoder)
    ]
    return RunReports(stored.store, stored.run, rows, earlier=earlier).close(state)


def _drive(stored: StoredRun, options: RenderOptions, on_dashboard: Callable[[str], None]) -> RunResult:
    """With Ray or without it, as ``options`` say."""
    failed = read_failures(stored.store, stored.run_id, stored.run.plans) if options.retry_failed else {}
    drive_options = DriveOptions(
        take_over=options.take_over, retry=frozenset({*options.retry, *failed}), max_failed_rows=options.max_failed_rows
    )
    if options.local:
        from magi_ray.render.driving.local import render_locally

        with follow(stderr()) as show:
            observers = [lambda _happened, progress: show(progress)]
            return render_locally(stored.store, stored.run, drive_options, observers=observers)
    from magi_ray.cluster.local_ray import local_ray
    from magi_ray.cluster.workers import render_on_ray

    say(STARTING_RAY)
    with local_ray(namespace=f"magi-ray/{stored.run_id}", dashboard=options.dashboard) as url:
        if url:
            say(f"Ray dashboard: {url}")
            on_dashboard(url)
        with follow(stderr()) as show:
            observers = [lambda _happened, progress: show(progress)]
            return render_on_ray(stored.store, stored.run, drive_options, observers=observers)
