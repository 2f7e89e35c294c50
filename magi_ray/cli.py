"""The command line. Data goes to stdout, everything else to stderr; errors end with the next command to type.

Exit codes: 0 done · 1 failure · 2 usage or input · 3 invalid manifest · 4 finished with failed rows · 130 interrupted.
Heavy imports are inside the commands: a wrong manifest is explained before torch would have been found.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console

from magi_ray import __version__
from magi_ray.errors import InputError, MagiRayError, SettingsError
from magi_ray.settings import PRESETS, Settings, cache_folder, job, preset, published

if TYPE_CHECKING:
    from magi_ray.render.journal import Outcome
    from magi_ray.render.run import Run
    from magi_ray.storage.store import Store

DEFAULT_STORE = "magi-ray-store"
FAILED_ROWS, INTERRUPTED = 4, 130


class _Group(click.Group):
    """Turns our errors into messages and exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MagiRayError as exc:
            _say(f"Error: {exc.message}", style="red")
            if exc.remedy:
                _say(exc.remedy)
            if exc.next_command:
                _say(f"next: {exc.next_command}", style="bold")
            sys.exit(exc.exit_code)


def main() -> NoReturn:
    """The console script."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _say("Stopped.")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone; there is nobody left to tell.
        sys.stderr.close()
        sys.exit(1)
    except Exception:  # noqa: BLE001 - the last line of defence
        traceback.print_exc()
        _say("This is a bug in magi-ray; please report it with the lines above.", style="red")
        sys.exit(1)
    sys.exit(0)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Render long videos with MAGI-1: prompts in a Parquet manifest, mp4 files out, resumable anywhere.

    \b
    Example:
      magi-ray submit manifests/quickstart.parquet
    """


def _store_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--store", "store_uri", default=DEFAULT_STORE, show_default=True, metavar="URI",
        help="Where everything durable lives: a folder or file:///….",
    )(command)  # fmt: skip


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")(command)


def _settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--job", "job_file", type=click.Path(path_type=Path), help="A job file (jobs/*.toml)."),
        click.option("--preset", "preset_name", metavar="NAME", help=f"One of {', '.join(PRESETS)}."),
        click.option("--config", "config_file", type=click.Path(path_type=Path), help="A published MAGI-1 config."),
        click.option("--weights", type=click.Path(path_type=Path), help="Folder of the preset's networks."),
    ):
        command = option(command)
    return command


def _ray_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--local", is_flag=True, help="Render in this process, without Ray."),
        click.option("--dashboard/--no-dashboard", default=True, show_default=True, help="Serve the Ray dashboard."),
    ):
        command = option(command)
    return command


# Runs -----------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("manifest", type=click.Path(path_type=Path))
@_store_option
@_settings_options
@_ray_options
@click.option("--no-wait", is_flag=True, help="Render in the background and return at once.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be rendered.")
@_json_option
def submit(
    manifest: Path,
    store_uri: str,
    job_file: Path | None,
    preset_name: str | None,
    config_file: Path | None,
    weights: Path | None,
    local: bool,
    dashboard: bool,
    no_wait: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Render every row of MANIFEST into a video. What exists already is not rendered again.

    \b
    Example:
      magi-ray submit manifests/quickstart.parquet --store ./magi-ray-store
    """
    from magi_ray.manifest import Defaults, read_manifest

    settings = _settings(job_file, preset_name, config_file, weights)
    # Rows first: this takes a moment, what follows loads torch.
    for note in read_manifest(manifest, Defaults.of(settings)).notes:
        _say(f"note: {note}", style="yellow")
    store = _open(store_uri)
    from magi_ray.render.run import create, prepare

    run, files = prepare(manifest.read_bytes(), name=str(manifest), base=manifest.parent, settings=settings)
    if dry_run:
        _dry_run(store, run, as_json=as_json)
        return
    if create(store, run, files):
        _say(f"Run {run.run_id}: {len(run.plans)} videos, settings {settings.name}, store {store.uri}")
    else:
        _say(f"Run {run.run_id} was submitted before; going on with it.")
    if no_wait:
        _detach(run.run_id, store_uri, local=local, dashboard=dashboard, as_json=as_json)
    else:
        _carry_out(store, run, store_uri, local=local, dashboard=dashboard, as_json=as_json)


@cli.command()
@click.argument("run_id", metavar="RUN")
@_store_option
@_ray_options
@_json_option
def resume(run_id: str, store_uri: str, local: bool, dashboard: bool, as_json: bool) -> None:
    """Go on with RUN where it stopped, on this machine or another.

    \b
    Example:
      magi-ray resume quickstart-1a2b3c4d5e
    """
    from magi_ray.render.run import open_run

    store = _open(store_uri, must_exist=True)
    _carry_out(store, open_run(store, run_id), store_uri, local=local, dashboard=dashboard, as_json=as_json)


@cli.command()
@click.argument("run_id", metavar="RUN")
@_store_option
@_json_option
def status(run_id: str, store_uri: str, as_json: bool) -> None:
    """How far RUN is, video by video.

    \b
    Example:
      magi-ray status quickstart-1a2b3c4d5e
    """
    from magi_ray.render.run import open_run
    from magi_ray.report import status_table

    store = _open(store_uri, must_exist=True)
    run = open_run(store, run_id)
    progress, running, age = _progress(store, run)
    if as_json:
        _print_json(progress.as_json() | {"running": running, "seconds_since_update": age})
        return
    _out(status_table(progress))
    if running:
        _say(f"Rendering; last heard of {age:.0f} s ago.")
        _next("watch", run_id, store_uri)
    elif any(video.phase != "done" for video in progress.videos.values()):
        _say("Not rendering.")
        _next("resume", run_id, store_uri)
    else:
        _say(f"All videos are done: {_videos_folder(store, run_id)}")


@cli.command(name="list")
@_store_option
@_json_option
def list_command(store_uri: str, as_json: bool) -> None:
    """The runs in the store, oldest first.

    \b
    Example:
      magi-ray list --store ./magi-ray-store
    """
    from rich.table import Table

    from magi_ray.render.run import list_runs, open_run

    store = _open(store_uri, must_exist=True)
    lines = []
    for run_id in list_runs(store):
        run = open_run(store, run_id)
        progress, running, _ = _progress(store, run)
        done = sum(video.phase == "done" for video in progress.videos.values())
        lines.append(
            {
                "run_id": run_id,
                "created": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.record.created_unix)),
                "videos": len(progress.videos),
                "done": done,
                "running": running,
                "settings": run.settings.name,
            }
        )
    if as_json:
        _print_json({"runs": lines})
        return
    table = Table("run", "submitted", "videos", "done", "running", "settings", box=None, pad_edge=False)
    for line in lines:
        table.add_row(*(str(value) for value in line.values()))
    _out(table)
    if not lines:
        _say("The store holds no runs.")
        _say("next: magi-ray submit MANIFEST", style="bold")


@cli.command()
@click.argument("run_id", metavar="RUN")
@_store_option
def watch(run_id: str, store_uri: str) -> None:
    """Follow RUN, which another process renders, until it ends. Ctrl-C stops watching, not rendering.

    \b
    Example:
      magi-ray watch quickstart-1a2b3c4d5e
    """
    from magi_ray.render.run import open_run
    from magi_ray.report import follow

    store = _open(store_uri, must_exist=True)
    run = open_run(store, run_id)
    with follow(_stderr()) as show:
        while True:
            progress, running, _ = _progress(store, run)
            show(progress)
            if not running:
                break
            time.sleep(1)
    left = [video for video in progress.videos.values() if video.phase != "done"]
    if left:
        _say(f"Run {run_id} is not being rendered; {len(left)} of {len(progress.videos)} videos are not done.")
        _next("resume", run_id, store_uri)
        sys.exit(FAILED_ROWS if any(video.phase == "failed" for video in left) else 0)
    _say(f"All videos are done: {_videos_folder(store, run_id)}")


@cli.command()
@click.option("--prompt", required=True, help="What to show.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The mp4 to write.")
@click.option("--num-chunks", type=int, help="Length in chunks of 24 frames.")
@click.option("--seconds", type=float, help="Length in seconds.")
@click.option("--image", type=click.Path(path_type=Path), help="Begin from this image.")
@click.option("--video", type=click.Path(path_type=Path), help="Go on from this video.")
@click.option("--width", type=int)
@click.option("--height", type=int)
@click.option("--seed", type=int)
@click.option("--num-steps", type=int)
@_store_option
@_settings_options
@_json_option
def render(
    prompt: str,
    out: Path,
    num_chunks: int | None,
    seconds: float | None,
    image: Path | None,
    video: Path | None,
    width: int | None,
    height: int | None,
    seed: int | None,
    num_steps: int | None,
    store_uri: str,
    job_file: Path | None,
    preset_name: str | None,
    config_file: Path | None,
    weights: Path | None,
    as_json: bool,
) -> None:
    """Render one video without a manifest, in this process.

    \b
    Example:
      magi-ray render --prompt "a boat on calm water" --num-chunks 4 -o boat.mp4
    """
    from magi_ray.manifest import Defaults, manifest_of
    from magi_ray.storage import keys

    if out.suffix != ".mp4":
        raise InputError(f"{out} does not end in .mp4.", remedy="Name the video to write, for example -o boat.mp4.")
    if not out.absolute().parent.is_dir():
        raise InputError(f"There is no folder {out.parent}.", remedy="Make it, or write somewhere else.")
    settings = _settings(job_file, preset_name, config_file, weights)
    row = {
        "job_id": "video", "prompt": prompt, "num_chunks": num_chunks, "seconds": seconds, "width": width,
        "height": height, "seed": seed, "num_steps": num_steps,
        "image": None if image is None else str(image), "video": None if video is None else str(video),
    }  # fmt: skip
    manifest = manifest_of([row], Defaults.of(settings), base=Path.cwd(), name="the options of render")
    store = _open(store_uri)
    from magi_ray.render.run import create, prepare

    run, files = prepare(manifest.parquet(), name=out.name, base=Path.cwd(), settings=settings)
    create(store, run, files)
    _carry_out(store, run, store_uri, local=True, dashboard=False, as_json=as_json, out=out)
    store.get_to_file(keys.video(run.run_id, "video"), out)
    if not as_json:
        click.echo(str(out))


@cli.command()
def version() -> None:
    """The version of magi-ray."""
    click.echo(__version__)


# Manifests ------------------------------------------------------------------------------------------------------


@cli.group()
def manifest() -> None:
    """Build, check and show manifests."""


@manifest.command()
@click.argument("rows", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The Parquet file to write.")
@click.option("--no-check", is_flag=True, help="Write rows that break rules too; types are always checked.")
@_settings_options
def build(
    rows: Path,
    out: Path,
    no_check: bool,
    job_file: Path | None,
    preset_name: str | None,
    config_file: Path | None,
    weights: Path | None,
) -> None:
    """Build a manifest from ROWS: .jsonl, .csv or .yaml.

    \b
    Example:
      magi-ray manifest build manifests/quickstart.jsonl -o quickstart.parquet
    """
    from magi_ray.manifest import Defaults, build_manifest

    settings = _settings(job_file, preset_name, config_file, weights)
    count = build_manifest(rows, out, defaults=None if no_check else Defaults.of(settings))
    _say(f"{out}: {count} rows.")
    _say(f"next: magi-ray submit {out}", style="bold")


@manifest.command()
@click.argument("path", metavar="MANIFEST", type=click.Path(path_type=Path))
@_settings_options
@_json_option
def validate(
    path: Path,
    job_file: Path | None,
    preset_name: str | None,
    config_file: Path | None,
    weights: Path | None,
    as_json: bool,
) -> None:
    """Check every row of MANIFEST; exit code 3 if any is invalid.

    \b
    Example:
      magi-ray manifest validate manifests/quickstart.parquet
    """
    from dataclasses import asdict

    from magi_ray.errors import ManifestError
    from magi_ray.manifest import Defaults, read_manifest

    settings = _settings(job_file, preset_name, config_file, weights)
    try:
        checked = read_manifest(path, Defaults.of(settings))
    except ManifestError as exc:
        if as_json:
            _print_json({"valid": False, "problems": [asdict(problem) for problem in exc.problems]})
            sys.exit(exc.exit_code)
        raise
    for note in checked.notes:
        _say(f"note: {note}", style="yellow")
    if as_json:
        _print_json({"valid": True, "rows": len(checked.rows), "problems": []})
        return
    _say(f"{path}: {len(checked.rows)} rows, all valid.")
    _say(f"next: magi-ray submit {path}", style="bold")


@manifest.command()
@click.argument("path", metavar="MANIFEST", type=click.Path(path_type=Path))
@_settings_options
@_json_option
def show(
    path: Path,
    job_file: Path | None,
    preset_name: str | None,
    config_file: Path | None,
    weights: Path | None,
    as_json: bool,
) -> None:
    """The rows of MANIFEST with the run's defaults filled in.

    \b
    Example:
      magi-ray manifest show manifests/quickstart.parquet
    """
    from magi_ray.manifest import Defaults, read_manifest, table_for_show

    settings = _settings(job_file, preset_name, config_file, weights)
    rows = table_for_show(read_manifest(path, Defaults.of(settings)))
    if as_json:
        _print_json({"rows": rows})
        return
    from magi_ray.report import manifest_table

    _out(manifest_table(rows))


# Parts ----------------------------------------------------------------------------------------------------------


def _settings(
    job_file: Path | None, preset_name: str | None, config_file: Path | None, weights: Path | None
) -> Settings:
    given = [
        name for name, value in (("--job", job_file), ("--preset", preset_name), ("--config", config_file)) if value
    ]
    if len(given) > 1:
        raise SettingsError(f"{' and '.join(given)} stand beside each other.", remedy="Give one of them.")
    if weights is not None and (job_file or config_file):
        raise SettingsError(
            f"--weights stands beside {given[0]}.", remedy="Name the folders of the networks in the file."
        )
    if job_file is not None:
        return job(job_file)
    if config_file is not None:
        return published(config_file)
    return preset(preset_name or PRESETS[0], weights=weights)


def _open(uri: str, *, must_exist: bool = False) -> Store:
    from magi_ray.storage.store import check_store, open_store

    store = open_store(uri)
    if must_exist:
        return store
    check_store(store)
    return store


def _carry_out(
    store: Store, run: Run, store_uri: str, *, local: bool, dashboard: bool, as_json: bool, out: Path | None = None
) -> None:
    """Render what is left and say how it ended. Exits with 4 when rows failed, 130 when interrupted."""
    from magi_ray.report import follow

    begun = time.monotonic()
    try:
        if local:
            from magi_ray.render.local import render_here

            with follow(_stderr()) as show:
                outcome = render_here(store, run, observe=show)
        else:
            from magi_ray.cluster.driver import render_on_ray
            from magi_ray.cluster.resources import local_ray

            _say("Starting Ray on this machine …")
            with local_ray(namespace=f"magi-ray/{run.run_id}", dashboard=dashboard) as url:
                if url:
                    _say(f"Ray dashboard: {url}")
                with follow(_stderr()) as show:
                    outcome = render_on_ray(store, run, observe=show)
    except KeyboardInterrupt:
        _say("Stopped. What was committed is kept.")
        _next("resume", run.run_id, store_uri)
        sys.exit(INTERRUPTED)
    _end(store, run, outcome, store_uri, time.monotonic() - begun, as_json=as_json, quiet=out is not None)


def _end(
    store: Store, run: Run, outcome: Outcome, store_uri: str, seconds: float, *, as_json: bool, quiet: bool
) -> None:
    from magi_ray.storage import keys

    videos = [f"{store.uri.rstrip('/')}/{keys.video(run.run_id, job_id)}" for job_id in outcome.published]
    if as_json:
        _print_json(
            {
                "run_id": run.run_id,
                "videos": dict(zip(outcome.published, videos, strict=True)),
                "failed": [{"job_id": f.job_id, "class": f.failure, "message": f.message} for f in outcome.failed],
                "stages_rendered": outcome.stages_rendered,
                "stages_reused": outcome.stages_reused,
                "seconds": round(seconds, 1),
            }
        )
    elif not quiet:
        for video in videos:
            click.echo(video)
    if outcome.already_published == len(run.plans):
        _say(f"Nothing to render: all {len(run.plans)} videos of run {run.run_id} were published before.")
    else:
        _say(
            f"{len(outcome.published)} of {len(run.plans)} videos published in {seconds:.0f} s; "
            f"{outcome.stages_rendered} stages rendered, {outcome.stages_reused} reused."
        )
    if outcome.failed:
        for failure in outcome.failed:
            first, *rest = failure.message.splitlines()
            _say(f"{failure.job_id} failed ({failure.failure}, {failure.kind}): {first}", style="red")
            for line in rest:
                _say(f"  {line}")
        _next("resume", run.run_id, store_uri)
        sys.exit(FAILED_ROWS)


def _dry_run(store: Store, run: Run, *, as_json: bool) -> None:
    from rich.table import Table

    from magi_ray.media.encoder import encoder_identity, find_ffmpeg
    from magi_ray.render.inventory import take_stock

    encoder = encoder_identity(find_ffmpeg())
    lines = []
    for plan in run.plans.values():
        row = take_stock(store, run.run_id, plan, encoder)
        left = row.num_stages - row.stages_done
        what = "reuse" if row.published else f"resume at stage {row.stages_done}" if row.stages_done else "render"
        lines.append(
            {
                "job_id": plan.job_id,
                "plan": what,
                "frames": plan.timeline.num_frames,
                "stages": left,
                "steps": left * plan.forwards_per_stage,
            }
        )
    if as_json:
        _print_json({"run_id": run.run_id, "videos": lines})
        return
    table = Table("job", "plan", "frames", "stages to render", "denoising steps", box=None, pad_edge=False)
    for line in lines:
        table.add_row(*(str(value) for value in line.values()))
    _out(table)
    _say(f"Run {run.run_id}: nothing was written.")


def _detach(run_id: str, store_uri: str, *, local: bool, dashboard: bool, as_json: bool) -> None:
    """Go on in a process of its own that outlives this one and its terminal."""
    log = cache_folder() / "logs" / f"{run_id}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "magi_ray.cli", "resume", run_id, "--store", store_uri]
    command += ["--local"] if local else ["--dashboard" if dashboard else "--no-dashboard"]
    with log.open("ab") as output:
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    if as_json:
        _print_json({"run_id": run_id, "log": str(log)})
    _say(f"Rendering in the background; its log is {log}.")
    _next("watch", run_id, store_uri)


def _progress(store: Store, run: Run) -> tuple[Any, bool, float]:
    """Progress by what the store holds, the step in work by what the driver last noted; whether it seems alive."""
    from magi_ray.media.encoder import encoder_identity, find_ffmpeg
    from magi_ray.render.inventory import take_stock
    from magi_ray.render.journal import STALE_S, read_progress
    from magi_ray.render.progress import RunProgress

    noted = read_progress(store, run.run_id)
    if noted is not None:
        progress, running, updated = noted
        age = max(0.0, time.time() - updated)
        if running and age < STALE_S:
            return progress, True, age
    encoder = encoder_identity(find_ffmpeg())
    rows = [take_stock(store, run.run_id, plan, encoder) for plan in run.plans.values()]
    fresh = RunProgress.of(run.run_id, rows, {job_id: plan.forwards_per_stage for job_id, plan in run.plans.items()})
    if noted is not None:
        fresh.keep_failures(noted[0])
    return fresh, False, 0.0 if noted is None else max(0.0, time.time() - noted[2])


def _videos_folder(store: Store, run_id: str) -> str:
    from magi_ray.storage import keys

    return f"{store.uri.rstrip('/')}/{keys.videos(run_id)}"


def _next(verb: str, run_id: str, store_uri: str) -> None:
    where = "" if store_uri == DEFAULT_STORE else f" --store {store_uri}"
    _say(f"next: magi-ray {verb} {run_id}{where}", style="bold")


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)


def _say(text: str, *, style: str = "") -> None:
    _stderr().print(text, style=style or None, markup=False, soft_wrap=True)


def _out(renderable: Any) -> None:
    # A pipe gets whole lines, however narrow Rich takes it to be.
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200, file=sys.stdout)
    console.print(renderable)


def _print_json(content: Mapping[str, Any]) -> None:
    click.echo(json.dumps(content, ensure_ascii=False))


if __name__ == "__main__":
    main()
