"""magi-ray render."""

from __future__ import annotations

from pathlib import Path

import click

from magi_ray.commands.console import command_line
from magi_ray.commands.inputs import as_options, require_place
from magi_ray.commands.options import RenderOptions, example, json_option, settings_options, store_option
from magi_ray.commands.stores import StoredRun, store_to_write
from magi_ray.commands.submit import create_run, warn_of_made_weights
from magi_ray.render.driving import requests
from magi_ray.settings import Settings
from magi_ray.storage import keys


@click.command(epilog=example('magi-ray render --prompt "a boat on calm water" --num-chunks 4 -o boat.mp4'))
@click.option("--prompt", required=True, metavar="TEXT", help="What the video shows.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The mp4 to write.")
@click.option("--num-chunks", type=int, metavar="N", help="Length in chunks of 24 frames.")
@click.option("--seconds", type=float, metavar="S", help="Length in seconds, rounded up to whole chunks.")
@click.option("--image", type=click.Path(path_type=Path), metavar="FILE", help="Begin from this image.")
@click.option("--video", type=click.Path(path_type=Path), metavar="FILE", help="Continue this video.")
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
    """Render one video without a manifest, in this process. If interrupted, the same command goes on."""
    from magi_ray.commands.foreground import render_in_foreground
    from magi_ray.commands.outcome import report_exit
    from magi_ray.manifest import Defaults, manifest_of

    require_place(out, typed)
    begin = {"image": None if image is None else str(image), "video": None if video is None else str(video)}
    row = {"job_id": "video", "prompt": prompt} | begin | values
    manifest = manifest_of([row], Defaults.of(settings), base=Path.cwd(), strict=False)
    store = store_to_write(store_uri)
    from magi_ray.render.runs.submission import prepare

    with as_options():
        run, files = prepare(manifest, name=out.name, settings=settings, store=store)
    stored = StoredRun(store=store, store_uri=store_uri, run=run)
    if create_run(stored, files):
        warn_of_made_weights(settings)
    # Whoever types this wants it rendered, even if it was cancelled or failed before.
    requests.clear(store, run.run_id)
    ended = render_in_foreground(stored, RenderOptions(local=True, retry_failed=True))
    result = ended.run_result
    delivered = None
    if result is not None and result.state == "done" and not result.failed:
        _deliver(stored, out)
        delivered = {"out": str(out)}
    report_exit(stored, ended, as_json=as_json, again=command_line(typed), delivered=delivered)


def _deliver(stored: StoredRun, out: Path) -> None:
    """Write the video to ``out``, whole or not at all."""
    part = out.with_name(f".{out.name}.part")
    try:
        stored.store.get_to_file(keys.video(stored.run_id, "video"), part)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
