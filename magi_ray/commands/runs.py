"""magi-ray submit, resume, status, list, watch, render."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from magi_ray.commands.common import (
    FAILED_ROWS,
    FAILURE,
    check,
    command_line,
    counted,
    example,
    json_option,
    note_made_weights,
    open_named_run,
    out,
    print_json,
    say,
    settings_options,
    stderr,
    store_option,
    store_to_read,
    store_to_write,
)
from magi_ray.commands.inputs import as_options, require_place
from magi_ray.commands.plan import prepared, show_plan
from magi_ray.commands.rendering import all_published, carry_out, detach, rendered_here, traces
from magi_ray.settings import Settings

if TYPE_CHECKING:
    from magi_ray.render.progress import RunProgress
    from magi_ray.render.run import Run
    from magi_ray.storage.store import Store


def _ray_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--dashboard/--no-dashboard", default=True, show_default=True, help="Serve the Ray dashboard."),
        click.option("--local", is_flag=True, help="Render in this process, without Ray."),
    ):
        command = option(command)
    return command


@click.command(epilog=example("magi-ray submit manifests/quickstart.parquet --store ./magi-ray-store"))
@click.argument("manifest", type=click.Path(path_type=Path))
@store_option
@settings_options
@_ray_options
@click.option("--no-wait", is_flag=True, help="Render in the background and return at once.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be rendered, write nothing.")
@json_option
@click.pass_obj
def submit(
    typed: list[str],
    manifest: Path,
    store_uri: str,
    settings: Settings,
    local: bool,
    dashboard: bool,
    no_wait: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Render every row of MANIFEST into a video. What exists already is not rendered again."""
    store, run, files = prepared(typed, manifest, store_uri, settings)
    if dry_run:
        show_plan(typed, store, run, as_json=as_json)
        return
    from magi_ray.render.run import create

    check(store)
    if create(store, run, files):
        say(f"Run {run.run_id}: {counted(len(run.plans), 'video')}, settings {settings.name}, store {store.uri}")
        note_made_weights(settings)
    elif not all_published(store, run):
        say(f"Run {run.run_id} was submitted before; going on with it.")
    if no_wait and not all_published(store, run):
        detach(store, run, store_uri, local=local, dashboard=dashboard, as_json=as_json)
        return
    again = command_line("resume", run, store_uri)
    carry_out(store, run, local=local, dashboard=dashboard, as_json=as_json, again=again)


@click.command(epilog=example("magi-ray resume quickstart"))
@click.argument("run_id", metavar="RUN")
@store_option
@_ray_options
@json_option
@click.option("--claimed", type=int, hidden=True, help="The open claim that `submit --no-wait` hands down.")
def resume(run_id: str, store_uri: str, local: bool, dashboard: bool, as_json: bool, claimed: int | None) -> None:
    """Go on with RUN where it stopped, on this machine or another. RUN: its id, or the beginning of it."""
    store = store_to_read(store_uri)
    run = open_named_run(store, run_id, "resume", store_uri)
    carry_out(
        store, run, local=local, dashboard=dashboard, as_json=as_json, claimed=claimed,
        again=command_line("resume", run, store_uri),
    )  # fmt: skip


@click.command(epilog=example("magi-ray status quickstart"))
@click.argument("run_id", metavar="RUN")
@store_option
@json_option
def status(run_id: str, store_uri: str, as_json: bool) -> None:
    """How far RUN is, video by video. RUN: its id, or the beginning of it."""
    from magi_ray.report import status_table

    store = store_to_read(store_uri)
    run = open_named_run(store, run_id, "status", store_uri)
    progress, running, age_s = _progress(store, run)
    if as_json:
        print_json(_state(progress, running, age_s))
        return
    out(status_table(progress))
    if running:
        say("Rendering." if age_s is None else f"Rendering; last heard of {age_s:.0f} s ago.")
        say(f"next: {command_line('watch', run, store_uri)}", style="bold")
    else:
        _say_ended(store, run, progress, store_uri)


@click.command(name="list", epilog=example("magi-ray list --store ./magi-ray-store"))
@store_option
@json_option
def list_command(store_uri: str, as_json: bool) -> None:
    """The runs in the store, oldest first."""
    from magi_ray.render.run import list_runs
    from magi_ray.report import runs_table

    store = store_to_read(store_uri)
    lines = [_summary(store, run_id) for run_id in list_runs(store)]
    if as_json:
        print_json({"runs": lines})
    elif lines:
        out(runs_table(lines))
    else:
        say(f"The store at {store.uri} holds no runs.")
        say("next: magi-ray submit --help", style="bold")


@click.command(epilog=example("magi-ray watch quickstart"))
@click.argument("run_id", metavar="RUN")
@store_option
@json_option
def watch(run_id: str, store_uri: str, as_json: bool) -> None:
    """Follow RUN, which another process renders, until it ends. Ctrl-C stops watching, not rendering."""
    from magi_ray.report import follow

    store = store_to_read(store_uri)
    run = open_named_run(store, run_id, "watch", store_uri)
    with follow(stderr()) as show:
        while True:
            progress, running, age_s = _progress(store, run)
            show(progress)
            if not running:
                break
            time.sleep(1)
    if as_json:
        print_json(_state(progress, running, age_s))
    sys.exit(_say_ended(store, run, progress, store_uri))


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
    from magi_ray.render.run import create, prepare

    with as_options():
        run, files = prepare(manifest.parquet(), name=out.name, base=Path.cwd(), settings=settings)
    check(store)
    if create(store, run, files):
        note_made_weights(settings)

    def deliver() -> dict[str, Any]:
        part = out.with_name(f".{out.name}.part")
        try:
            store.get_to_file(keys.video(run.run_id, "video"), part)
            part.replace(out)
        finally:
            part.unlink(missing_ok=True)
        return {"out": str(out)}

    carry_out(
        store, run, local=True, dashboard=False, as_json=as_json, deliver=deliver,
        again=shlex.join(["magi-ray", *typed]),
    )  # fmt: skip


def _summary(store: Store, run_id: str) -> dict[str, Any]:
    """A run in one line, without planning it: a video counts as done when its record, written last, is there."""
    from pyarrow import BufferReader, parquet

    from magi_ray.render.journal import STALE_S, read_progress
    from magi_ray.render.progress import Phase
    from magi_ray.storage import keys

    record = json.loads(store.get(keys.run_record(run_id)))
    videos = parquet.read_metadata(BufferReader(store.get(keys.run_manifest(run_id)))).num_rows
    done = {
        key.removeprefix(keys.videos(run_id)).removesuffix(".json")
        for key in store.list(keys.videos(run_id))
        if key.endswith(".json")
    }
    noted = read_progress(store, run_id)
    failed = [] if noted is None else [v.job_id for v in noted[0].videos.values() if v.phase is Phase.FAILED]
    here = rendered_here(store, run_id)
    return {
        "run_id": run_id,
        "submitted": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["created_unix"])),
        "videos": videos,
        "done": len(done),
        "failed": len(set(failed) - done),
        "running": here or (here is None and noted is not None and noted[1] and time.time() - noted[2] < STALE_S),
        "settings": record["settings"]["name"],
    }


def _progress(store: Store, run: Run) -> tuple[RunProgress, bool, float | None]:
    """How far ``run`` is, whether it is being rendered, and how many seconds ago its driver last noted progress.

    While it is rendered the driver's notes are the newest; otherwise the store is asked for what it holds.
    """
    from magi_ray.media.encoder import encoder_identity, find_ffmpeg
    from magi_ray.render.inventory import take_stock
    from magi_ray.render.journal import STALE_S, read_progress
    from magi_ray.render.progress import RunProgress

    noted = read_progress(store, run.run_id)
    age_s = None if noted is None else max(0.0, time.time() - noted[2])
    here = rendered_here(store, run.run_id)
    if noted is not None and noted[1] and age_s is not None and here is not False and (here or age_s < STALE_S):
        return noted[0], True, age_s
    encoder = encoder_identity(find_ffmpeg())
    rows = [take_stock(store, run.run_id, plan, encoder) for plan in run.plans.values()]
    fresh = RunProgress.of(run.run_id, rows, {job_id: plan.forwards_per_stage for job_id, plan in run.plans.items()})
    if noted is not None:
        fresh.keep_failures(noted[0])
    return fresh, bool(here), age_s


def _state(progress: RunProgress, running: bool, age_s: float | None) -> dict[str, Any]:
    return progress.as_json() | {"running": running, "seconds_since_update": age_s}


def _say_ended(store: Store, run: Run, progress: RunProgress, store_uri: str) -> int:
    """What to know of a run that is not being rendered; the exit code that fits it."""
    from magi_ray.render.progress import Phase
    from magi_ray.storage import keys

    left = [video for video in progress.videos.values() if video.phase is not Phase.DONE]
    if not left:
        say(f"All videos are done: {store.uri.rstrip('/')}/{keys.videos(run.run_id)}")
        return 0
    failed = sum(video.phase is Phase.FAILED for video in left)
    if failed == len(left):
        say(f"Finished; {failed} of {counted(len(progress.videos), 'video')} failed.")
    else:
        say(f"Not being rendered here; {len(left)} of {counted(len(progress.videos), 'video')} not done.")
    log = traces(store, run.run_id, "log")
    if log.exists():
        say(f"The last process in the background wrote to {log}.")
    say(f"next: {command_line('resume', run, store_uri)}", style="bold")
    return FAILED_ROWS if failed == len(left) else FAILURE
