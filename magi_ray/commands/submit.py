"""magi-ray submit, resume, drive."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import click

from magi_ray.commands.console import counted, say
from magi_ray.commands.inputs import STDIN, GivenManifest
from magi_ray.commands.options import (
    RenderOptions,
    example,
    json_option,
    manifest_argument,
    no_wait_option,
    render_options,
    run_options,
    settings_options,
    skip_invalid_option,
    store_option,
)
from magi_ray.commands.plan import prepared, require_space, show_plan
from magi_ray.commands.stores import StoredRun, open_named_run
from magi_ray.errors import AlreadyRendered
from magi_ray.render.driving import requests
from magi_ray.settings import Settings


@click.command(epilog=example("magi-ray submit manifests/quickstart.parquet --store ./magi-ray-store"))
@manifest_argument
@store_option
@settings_options
@render_options
@skip_invalid_option
@no_wait_option
@click.option(
    "--space-check/--no-space-check", default=True, help="Compare the run with the space of a local store; the default."
)
@click.option("--dry-run", is_flag=True, help="Check everything and show what would be rendered; write nothing.")
@json_option
@click.pass_obj
def submit(
    typed: list[str],
    given: GivenManifest,
    store_uri: str,
    settings: Settings,
    options: RenderOptions,
    skip_invalid: bool,
    no_wait: bool,
    dry_run: bool,
    space_check: bool,
    as_json: bool,
) -> None:
    """Render every row of MANIFEST, a table of any kind, into a video. What exists already is not rendered again.

    A background process renders and this one follows it. Ctrl-C leaves it running; `magi-ray watch` follows it again,
    and so does the same submit.
    """
    store, run, files = prepared(typed, given, store_uri, settings, skip_invalid=skip_invalid)
    if dry_run:
        show_plan(typed, store, run, as_json=as_json)
        return
    if space_check:
        require_space(typed, store, run)
    from magi_ray.commands.background import follow_driver, render_in_background
    from magi_ray.drivers.driver_monitor import DriverMonitor
    from magi_ray.render.runs.record import read_run, with_takes

    stored = StoredRun(store=store, store_uri=store_uri, run=run)
    created = create_run(stored, files)
    remember_submission(stored, typed, without=("--no-wait", "--take-over"))
    if created:
        say(f"Run {run.run_id}: {counted(len(run.plans), 'video')}, settings {settings.name}, store {store.uri}")
        warn_of_made_weights(settings)
    else:
        stored = replace(stored, run=with_takes(store, run))
        if not options.take_over:
            monitor = DriverMonitor(store, run.run_id)
            if follow_driver(stored, monitor, as_json=as_json, no_wait=no_wait):
                return
            options = replace(options, take_over=monitor.silent)
        options = replace(options, retry=rows_to_mend(stored))
        if not stored.all_published():
            say(f"Run {run.run_id} was submitted before; going on with it.")
        if read_run(store, run.run_id)[0].settings.weights != settings.weights:
            # The weights have moved since.
            options = replace(options, weights=click.get_current_context().params["weights"])
    try:
        render_in_background(stored, options, as_json=as_json, no_wait=no_wait)
    except AlreadyRendered:  # somebody submitted it at the same moment
        if not follow_driver(stored, DriverMonitor(store, run.run_id), as_json=as_json, no_wait=no_wait):
            raise


def create_run(stored: StoredRun, files: Mapping[str, Path]) -> bool:
    """Check the store and write the run into it; False if it was there already. files: its media, by sha256."""
    from magi_ray.render.runs.submission import create
    from magi_ray.storage.probe import check_store

    # Not before the run is sure to be written: this leaves a folder behind.
    check_store(stored.store)
    return create(stored.store, stored.run, files)


def remember_submission(stored: StoredRun, typed: Sequence[str], *, without: Collection[str] = ()) -> None:
    """Keep what was ``typed`` for `magi-ray verify`, which may say to type it again. A manifest from stdin is gone."""
    from magi_ray.drivers.status_file import note_submission

    if STDIN not in typed:
        words = [word for word in typed if word not in ("--json", *without)]
        named = any(word.startswith("--store") for word in words)
        note_submission(stored.store, stored.run_id, words if named else [*words, "--store", stored.store_uri])


def rows_to_mend(stored: StoredRun) -> tuple[str, ...]:
    """The rows that failed for the image or clip that they begin from: it was given again just now."""
    from magi_ray.render.driving.reports import failed_for_its_medium, read_failures

    plans = stored.run.plans
    failures = read_failures(stored.store, stored.run_id, plans)
    return tuple(job for job, failed in failures.items() if failed_for_its_medium(failed, plans[job]))


def warn_of_made_weights(settings: Settings) -> None:
    if settings.weights.made_in is not None:
        say("note: these weights are made, not trained: videos will not show their prompts.", style="yellow")


@click.command(epilog=example("magi-ray resume quickstart"))
@run_options
@no_wait_option
@json_option
def resume(name: str | None, store_uri: str, options: RenderOptions, no_wait: bool, as_json: bool) -> None:
    """Go on with RUN where it stopped, here or on another machine. A paused or cancelled run goes on too; failed rows
    are left alone, see `magi-ray retry`. Without RUN: the newest run."""
    from magi_ray.commands.background import render_in_background

    stored = open_named_run(name, store_uri, verb="resume", weights=options.weights)
    render_in_background(stored, options, as_json=as_json, no_wait=no_wait)


@click.command(epilog=example("magi-ray drive quickstart --local"))
@run_options
@click.option("--retry-failed", is_flag=True, help="Try the rows that failed again.")
@click.option("--retry", multiple=True, metavar="ID", help="Try this row again, or repair its video; may be repeated.")
@click.option("--resume", "resumed", is_flag=True, help="Go on even if the run was paused or cancelled.")
@json_option
def drive(name: str | None, store_uri: str, options: RenderOptions, resumed: bool, as_json: bool) -> None:
    """Render RUN in this process until it ends. For job systems and containers; `submit` and `resume` run it in the
    background. Ctrl-C and SIGTERM stop it. A paused or cancelled run stays so."""
    from magi_ray.commands.foreground import render_in_foreground
    from magi_ray.commands.outcome import report_exit
    from magi_ray.drivers.status_file import status_file

    # Nobody is waiting here: an outage may last.
    stored = open_named_run(name, store_uri, verb="drive", weights=options.weights, patience_s=None)
    if resumed:
        requests.clear(stored.store, stored.run_id)
    with status_file(stored.store, stored.run_id) as status:
        ended = render_in_foreground(stored, options, on_dashboard=lambda url: status.write(dashboard=url))
        status.write(ended=ended)
    report_exit(stored, ended, as_json=as_json)
