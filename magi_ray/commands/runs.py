"""magi-ray submit, resume, drive, status, list, watch, render."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from magi_ray.commands.common import (
    CANCELLED,
    FAILED_ROWS,
    FAILURE,
    PAUSED,
    check,
    command_line,
    counted,
    example,
    json_option,
    note_made_weights,
    open_named_run,
    out,
    print_json,
    retry_line,
    say,
    settings_options,
    stderr,
    store_option,
    store_to_read,
    store_to_write,
)
from magi_ray.commands.inputs import as_options, require_place
from magi_ray.commands.plan import prepared, show_plan
from magi_ray.commands.rendering import (
    How,
    all_published,
    driving_options,
    render_apart,
    render_now,
    report_end,
    weights_option,
)
from magi_ray.settings import Settings

if TYPE_CHECKING:
    from magi_ray.commands.standing import Driver
    from magi_ray.render.driving.progress import RunProgress
    from magi_ray.render.runs.record import Run
    from magi_ray.storage.store import Store


@click.command(epilog=example("magi-ray submit manifests/quickstart.parquet --store ./magi-ray-store"))
@click.argument("manifest", type=click.Path(path_type=Path))
@store_option
@settings_options
@driving_options
@click.option("--no-wait", is_flag=True, help="Return as soon as it is rendered in the background.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be rendered, write nothing.")
@json_option
@click.pass_obj
def submit(
    typed: list[str],
    manifest: Path,
    store_uri: str,
    settings: Settings,
    how: How,
    no_wait: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Render every row of MANIFEST into a video. What exists already is not rendered again.

    A process of its own renders; this one follows it. Ctrl-C leaves it alone, `magi-ray watch` comes back to it.
    """
    store, run, files = prepared(typed, manifest, store_uri, settings)
    if dry_run:
        show_plan(typed, store, run, as_json=as_json)
        return
    from magi_ray.render.runs.record import read_run, with_takes
    from magi_ray.render.runs.submission import create

    check(store)
    if create(store, run, files):
        say(f"Run {run.run_id}: {counted(len(run.plans), 'video')}, settings {settings.name}, store {store.uri}")
        note_made_weights(settings)
    else:
        run = with_takes(store, run)
        if not all_published(store, run):
            say(f"Run {run.run_id} was submitted before; going on with it.")
        if read_run(store, run.run_id)[0].settings.weights != settings.weights:
            # They have moved since.
            how = replace(how, weights=click.get_current_context().params["weights"])
    render_apart(store, run, store_uri, how, as_json=as_json, no_wait=no_wait)


@click.command(epilog=example("magi-ray resume quickstart"))
@click.argument("run_id", metavar="RUN")
@store_option
@weights_option
@driving_options
@click.option("--no-wait", is_flag=True, help="Return as soon as it is rendered in the background.")
@json_option
def resume(run_id: str, store_uri: str, weights: Path | None, how: How, no_wait: bool, as_json: bool) -> None:
    """Go on with RUN where it stopped, here or elsewhere. Also when it was paused or cancelled. Rows that failed are
    left alone, see `magi-ray retry`. RUN: its id, or the beginning of it."""
    store = store_to_read(store_uri)
    run = open_named_run(store, run_id, "resume", store_uri, weights=weights)
    render_apart(store, run, store_uri, replace(how, weights=weights), as_json=as_json, no_wait=no_wait)


@click.command(epilog=example("magi-ray drive quickstart --local"))
@click.argument("run_id", metavar="RUN")
@store_option
@weights_option
@driving_options
@click.option("--retry-failed", is_flag=True, help="Try the rows that failed again.")
@click.option("--retry", multiple=True, metavar="ID", help="Try this row again, or mend its video.")
@click.option("--resume", "resumed", is_flag=True, help="Go on also when it was paused or cancelled.")
@json_option
def drive(
    run_id: str,
    store_uri: str,
    weights: Path | None,
    how: How,
    retry_failed: bool,
    retry: tuple[str, ...],
    resumed: bool,
    as_json: bool,
) -> None:
    """Render RUN in this very process, until its end. For job systems and containers, and what `submit` and `resume`
    start. Ctrl-C and SIGTERM stop it. A run that was paused or cancelled stays so."""
    from magi_ray.commands.drivers import noting
    from magi_ray.render.driving import requests as control
    from magi_ray.storage.retrying import RUN_PATIENCE_S

    # Nobody waits here: an outage may last.
    store = store_to_read(store_uri, patience_s=RUN_PATIENCE_S)
    run = open_named_run(store, run_id, "drive", store_uri, weights=weights)
    again = command_line("resume", run, store_uri)
    if resumed:
        control.clear(store, run.run_id)
    with noting(store, run.run_id) as notebook:
        end = render_now(store, run, replace(how, weights=weights, retry_failed=retry_failed, retry=retry), notebook)
        notebook.write(end=end)
    report_end(store, run, end, as_json=as_json, again=again, retry=retry_line(run, store_uri))


@click.command(epilog=example("magi-ray status quickstart"))
@click.argument("run_id", metavar="RUN")
@store_option
@json_option
def status(run_id: str, store_uri: str, as_json: bool) -> None:
    """How far RUN is, video by video, and who renders it. RUN: its id, or the beginning of it."""
    from magi_ray.commands.standing import driver_of
    from magi_ray.report import status_table

    store = store_to_read(store_uri)
    run = open_named_run(store, run_id, "status", store_uri)
    driver = driver_of(store, run.run_id)
    progress, content = _standing(store, run, driver)
    if as_json:
        print_json(content)
        return
    out(status_table(progress))
    if driver is None:
        _say_ended(store, run, progress, content["state"], store_uri)
    else:
        heard = "it loads" if driver.beat is None else f"beat {driver.beat}"
        say(f"{content['state'].capitalize()}, by {driver} ({heard}).")
        say(f"next: {command_line('watch', run, store_uri)}", style="bold")


@click.command(name="list", epilog=example("magi-ray list --store ./magi-ray-store"))
@store_option
@json_option
def list_command(store_uri: str, as_json: bool) -> None:
    """The runs in the store, oldest first."""
    from magi_ray.render.runs.record import all_runs
    from magi_ray.report import runs_table

    store = store_to_read(store_uri)
    readable, damaged = all_runs(store)
    lines = [_summary(store, run_id) for run_id in readable]
    if as_json:
        print_json({"runs": lines, "damaged": damaged})
    elif lines:
        out(runs_table(lines))
    else:
        say(f"The store at {store.uri} holds no runs.")
    for run_id in damaged:
        say(f"Run {run_id} is damaged: its record cannot be read. Submit its manifest again to mend it.", style="red")
    if not lines and not as_json:
        say("next: magi-ray submit --help", style="bold")


@click.command(epilog=example("magi-ray watch quickstart"))
@click.argument("run_id", metavar="RUN")
@store_option
@json_option
def watch(run_id: str, store_uri: str, as_json: bool) -> None:
    """Follow RUN, which another process renders, until it ends. Ctrl-C stops watching, not rendering."""
    from magi_ray.commands.standing import Lookout
    from magi_ray.report import follow

    store = store_to_read(store_uri)
    run = open_named_run(store, run_id, "watch", store_uri)
    lookout = Lookout(store, run.run_id)
    with follow(stderr()) as show:
        while True:
            driver = lookout.look()
            progress, content = _standing(store, run, driver)
            show(progress)
            if driver is None:
                break
            time.sleep(1)
    if lookout.silent:
        say(f"Nothing was heard any more of {lookout.last}; it is taken for dead.")
    if as_json:
        print_json(content)
    sys.exit(_say_ended(store, run, progress, content["state"], store_uri))


@click.command(epilog=example('magi-ray render --prompt "a boat on calm water" --num-chunks 4 -o boat.mp4'))
@click.option("--prompt", required=True, metavar="TEXT", help="What is to be seen.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The mp4 to write.")
@click.option("--num-chunks", type=int, metavar="N", help="Length in chunks of 24 frames.")
@click.option("--seconds", type=float, metavar="S", help="Length in seconds, rounded up to whole chunks.")
@click.option("--image", type=click.Path(path_type=Path), metavar="FILE", help="Begin from this image.")
@click.option("--video", type=click.Path(path_type=Path), metavar="FILE", help="Go on from this video.")
@click.option("--width", type=int, metavar="N", help="Pixels, a multiple of 16.")
@click.option("--height", type=int, metavar="N", help="Pixels, a multiple of 16.")
@click.option("--fps", type=int, metavar="N", help="Frames per second.")
@click.option("--seed", type=int, metavar="N", help="The noise; the same seed gives the same video.")
@click.option("--num-steps", type=int, metavar="N", help="Denoising steps of each chunk.")
@store_option
@settings_options
@json_option
@click.pass_obj
def render(
    typed: list[str],
    /,
    prompt: str,
    out: Path,
    image: Path | None,
    video: Path | None,
    store_uri: str,
    settings: Settings,
    as_json: bool,
    **values: int | float | None,
) -> None:
    """Render one video without a manifest, in this process. Interrupted and typed again, it goes on."""
    from magi_ray.manifest import Defaults, manifest_of
    from magi_ray.storage import keys

    require_place(out, typed)
    begin = {"image": None if image is None else str(image), "video": None if video is None else str(video)}
    row = {"job_id": "video", "prompt": prompt} | begin | values
    with as_options():
        manifest = manifest_of([row], Defaults.of(settings), base=Path.cwd(), name="the options of render")
    store = store_to_write(store_uri)
    from magi_ray.render.driving import requests as control
    from magi_ray.render.runs.submission import create, prepare

    with as_options():
        run, files = prepare(manifest, name=out.name, settings=settings)
    check(store)
    if create(store, run, files):
        note_made_weights(settings)
    # Whoever types this wants it rendered.
    control.clear(store, run.run_id)

    def deliver() -> dict[str, Any]:
        part = out.with_name(f".{out.name}.part")
        try:
            store.get_to_file(keys.video(run.run_id, "video"), part)
            part.replace(out)
        finally:
            part.unlink(missing_ok=True)
        return {"out": str(out)}

    # Typed again, it tries again what failed.
    end = render_now(store, run, How(local=True, retry_failed=True))
    done = end.outcome is not None and end.outcome.state == "done" and not end.outcome.failed
    again = shlex.join(["magi-ray", *typed])
    report_end(store, run, end, as_json=as_json, again=again, delivered=deliver() if done else None)


def _summary(store: Store, run_id: str) -> dict[str, Any]:
    """A run in one line, without planning it: a video counts as done when its record, written last, is there."""
    from pyarrow import BufferReader, parquet

    from magi_ray.commands.standing import driver_of, state_of
    from magi_ray.render.driving.reports import read_failures, read_progress
    from magi_ray.storage import keys
    from magi_ray.storage.records import read_record

    record = read_record(store.get(keys.run_record(run_id)))
    videos = parquet.read_metadata(BufferReader(store.get(keys.run_manifest(run_id)))).num_rows
    done = {
        key.removeprefix(keys.videos(run_id)).removesuffix(".json")
        for key in store.list(keys.videos(run_id))
        if key.endswith(".json")
    }
    state = state_of(
        store, run_id, driver_of(store, run_id), read_progress(store, run_id), all_done=len(done) == videos
    )  # fmt: skip
    return {
        "run_id": run_id,
        "submitted": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["created_unix"])),
        "videos": videos,
        "done": len(done),
        "failed": len(set(read_failures(store, run_id)) - done),
        "state": state,
        "settings": record["settings"]["name"],
    }


def _standing(store: Store, run: Run, driver: Driver | None) -> tuple[RunProgress, dict[str, Any]]:
    """How far ``run`` is, and the same with its state as --json gives it.

    While it is rendered the driver's notes are the newest; otherwise the store is asked for what it holds.
    """
    from magi_ray.commands.standing import state_of
    from magi_ray.render.driving.progress import Phase
    from magi_ray.render.driving.reports import read_progress

    noted = read_progress(store, run.run_id)
    progress = noted.progress if driver is not None and noted is not None else _found(store, run)
    done = all(video.phase is Phase.DONE for video in progress.videos.values())
    state = state_of(store, run.run_id, driver, noted, all_done=done)
    return progress, progress.as_json() | {"state": state, "driver": None if driver is None else driver.as_json()}


def _found(store: Store, run: Run) -> RunProgress:
    """How far ``run`` is by what the store holds, with the failures that were noted."""
    from magi_ray.media.encoder import encoder_identity, find_ffmpeg
    from magi_ray.render.driving.inventory import take_inventory_of_run
    from magi_ray.render.driving.progress import Phase, RunProgress
    from magi_ray.render.driving.reports import read_failures

    rows = take_inventory_of_run(store, run, encoder_identity(find_ffmpeg()))
    progress = RunProgress.of(run.run_id, rows, {job: plan.forwards_per_stage for job, plan in run.plans.items()})
    for job_id, failure in read_failures(store, run.run_id).items():
        if progress.videos[job_id].phase is not Phase.DONE:
            progress.note(failure)
    return progress


def _say_ended(store: Store, run: Run, progress: RunProgress, state: str, store_uri: str) -> int:
    """What to know of a run that is not being rendered; the exit code that fits it."""
    from magi_ray.commands.drivers import last_error, log_path
    from magi_ray.render.driving.progress import Phase
    from magi_ray.storage import keys

    left = [video for video in progress.videos.values() if video.phase is not Phase.DONE]
    if not left:
        say(f"All videos are done: {store.uri.rstrip('/')}/{keys.videos(run.run_id)}")
        return 0
    failed = sum(video.phase is Phase.FAILED for video in left)
    total = counted(len(progress.videos), "video")
    if failed == len(left) or state == "broken":
        say(f"{'Stopped' if failed < len(left) else 'Finished'}; {failed} of {total} failed, {len(left)} not done.")
        say(f"next: {retry_line(run, store_uri)}", style="bold")
        return FAILED_ROWS
    words = {"paused": "Paused", "cancelled": "Cancelled"}.get(state, "Not being rendered")
    say(f"{words}; {len(left)} of {total} not done.")
    if words.startswith("Not"):
        error, log = last_error(store, run.run_id), log_path(store, run.run_id)
        if error is not None:
            say(f"The last process stopped: {error.message}", style="red")
        if error is not None and error.remedy:
            say(error.remedy)
        if log.exists():
            say(f"The last process in the background wrote to {log}.")
    say(f"next: {command_line('resume', run, store_uri)}", style="bold")
    return {"paused": PAUSED, "cancelled": CANCELLED}.get(state, FAILURE)
