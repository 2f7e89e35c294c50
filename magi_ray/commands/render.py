"""magi-ray render."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import yaml

from magi_ray.commands.console import command_line, say
from magi_ray.commands.inputs import as_options, require_file, require_place
from magi_ray.commands.options import RenderOptions, example, json_option, settings_options, store_option
from magi_ray.commands.stores import StoredRun, store_to_write
from magi_ray.commands.submit import create_run, remember_submission, warn_of_made_weights
from magi_ray.errors import InputError, SettingsError
from magi_ray.render.driving import requests
from magi_ray.settings import Settings, override

SCHEDULES = (".json", ".jsonl", ".yaml", ".yml")


@click.command(epilog=example('magi-ray render --prompt "a boat on calm water" --num-chunks 4 -o boat.mp4'))
@click.option("--prompt", metavar="TEXT", help="What the video shows; or --schedule.")
@click.option(
    "--schedule", "schedule_file", type=click.Path(path_type=Path), metavar="FILE",
    help="Prompts over time: the entries of a manifest's schedule as .json, .jsonl or .yaml.",
)  # fmt: skip
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The mp4 to write.")
@click.option("--num-chunks", type=int, metavar="N", help="New video, in chunks of 24 frames.")
@click.option("--seconds", type=float, metavar="S", help="New video in seconds: whole chunks; exact after --video.")
@click.option("--image", metavar="FILE", help="Begin from this image, a file or s3://….")
@click.option("--video", metavar="FILE", help="Continue this clip, a file or s3://….")
@click.option("--prefix-from", metavar="start|end", help="Which end of the clip to go on from; default: end.")
@click.option("--prefix-frames", type=int, metavar="N", help="How many frames of the clip to go on from.")
@click.option("--include-prefix/--no-include-prefix", default=None, help="Whether the video begins with those frames.")
@click.option("--fit", metavar="crop|pad|fit", help="How an image or clip of another shape is made to fit.")
@click.option("--width", type=int, metavar="N", help="Pixels, a multiple of 16; default: after the image or clip.")
@click.option("--height", type=int, metavar="N", help="Likewise.")
@click.option("--fps", type=int, metavar="N", help="Frames per second.")
@click.option("--seed", type=int, metavar="N", help="The noise; the same seed gives the same video.")
@click.option(
    "--num-variations", type=click.IntRange(1, 1000), metavar="N",
    help="N videos, with the seeds from --seed on; each file has its seed in its name: boat-7.mp4.",
)  # fmt: skip
@click.option("--num-steps", type=int, metavar="N", help="Denoising steps of each chunk.")
@click.option(
    "--negative-prompt/--no-negative-prompt", default=None,
    help="Guide away from logos, captions and cuts: the setting negative_prompt of the run.",
)  # fmt: skip
@store_option
@settings_options
@json_option
@click.pass_obj
def render(
    typed: list[str],
    /,
    schedule_file: Path | None,
    out: Path,
    seed: int | None,
    num_variations: int | None,
    negative_prompt: bool | None,
    store_uri: str,
    settings: Settings,
    as_json: bool,
    **cells: str | float | None,
) -> None:
    """Render one video without a manifest, in this process. If interrupted, the same command goes on; so does
    `magi-ray resume`, and writes the file too."""
    from magi_ray.commands.foreground import render_in_foreground
    from magi_ray.commands.outcome import report_exit

    require_place(out, typed)
    row: dict[str, Any] = {**cells, "schedule": None if schedule_file is None else _schedule(schedule_file, typed)}
    if negative_prompt is not None:
        if negative_prompt and settings.runtime.cfg_number == 1:
            fault = f"--negative-prompt: {settings.name} has no guidance."
            raise SettingsError(fault, remedy="Leave it out, or use a base model.")
        settings = override(settings, {"negative_prompt": negative_prompt}, source="--negative-prompt")
    if num_variations is None:
        rows, files = [row | {"job_id": "video", "seed": seed}], {"video": out}
    else:
        first = settings.runtime.seed if seed is None else seed
        seeds = range(first, first + num_variations)
        rows = [row | {"job_id": f"seed-{each}", "seed": each} for each in seeds]
        files = {f"seed-{each}": out.with_stem(f"{out.stem}-{each}") for each in seeds}
    stored = _created(rows, store_uri, settings, name=out.name)
    remember_submission(stored, typed)
    from magi_ray.drivers.delivery import note_files

    note_files(stored.store, stored.run_id, files)
    # Whoever types this wants it rendered, even if it was cancelled or failed before.
    requests.clear(stored.store, stored.run_id)
    ended = render_in_foreground(stored, RenderOptions(local=True, retry_failed=True))
    report_exit(stored, ended, as_json=as_json, again=command_line(typed))


def _created(rows: list[dict[str, Any]], store_uri: str, settings: Settings, *, name: str) -> StoredRun:
    """The run of ``rows``, checked and in its store."""
    store = store_to_write(store_uri)
    from magi_ray.render.runs.media import MediaFiles
    from magi_ray.render.runs.shape import manifest_in_shape
    from magi_ray.render.runs.submission import prepare

    media = MediaFiles()
    manifest = manifest_in_shape(rows, settings, media, base=Path.cwd())
    with as_options():
        run, media = prepare(manifest, name=name, settings=settings, store=store, files=media)
    for note in run.manifest.notes:
        say(f"note: {note}", style="yellow")
    stored = StoredRun(store=store, store_uri=store_uri, run=run)
    if create_run(stored, media):
        warn_of_made_weights(settings)
    return stored


def _schedule(path: Path, typed: list[str]) -> Any:
    """What the file holds; the rules of rows say whether it is a schedule."""
    require_file(path, SCHEDULES, typed)
    if path.suffix.lower() not in SCHEDULES:
        raise InputError(f"--schedule: {path} ends in none of {', '.join(SCHEDULES)}.", remedy="Write one of these.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as exc:
        reason = " ".join(str(exc).split())
        raise InputError(f"--schedule: {path} is not readable as {path.suffix[1:]}: {reason}.") from exc
