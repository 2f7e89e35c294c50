"""magi-ray manifest build, validate, show."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from magi_ray.commands.console import command_line, counted, print_json, print_table, say, say_next
from magi_ray.commands.inputs import GivenManifest, require_table
from magi_ray.commands.options import example, json_option, manifest_argument, settings_options, settings_words
from magi_ray.errors import ManifestError, MediaError
from magi_ray.settings import Settings
from magi_ray.timeline import FRAMES_PER_LATENT

if TYPE_CHECKING:
    from magi_ray.manifest import Row
    from magi_ray.media.clips import Taken


@click.group(epilog=example("magi-ray manifest validate manifests/quickstart.parquet"))
def manifest() -> None:
    """Build, check and show manifests."""


@manifest.command(epilog=example("magi-ray manifest build manifests/quickstart.jsonl -o manifests/my.parquet"))
@click.argument("rows", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="What to write.")
@click.option("--no-check", is_flag=True, help="Write rows that break rules too; types are always checked.")
@settings_options
@json_option
@click.pass_obj
def build(typed: list[str], rows: Path, out: Path, no_check: bool, settings: Settings, as_json: bool) -> None:
    """Build the manifest FILE (.parquet) from ROWS, a table of any kind. Media paths start from FILE's folder."""
    from magi_ray.manifest import Defaults, build_manifest

    require_table(rows, typed)
    count, notes = build_manifest(rows, out, defaults=None if no_check else Defaults.of(settings))
    for note in notes:
        say(f"note: {note}", style="yellow")
    if as_json:
        print_json({"manifest": str(out.absolute()), "rows": count, "checked": not no_check, "notes": list(notes)})
    else:
        click.echo(str(out))
    say(f"{counted(count, 'row')}, {'not checked' if no_check else 'all valid'}.")
    say_next(command_line([*(["manifest", "validate"] if no_check else ["submit"]), str(out), *settings_words()]))


@manifest.command(epilog=example("magi-ray manifest validate manifests/quickstart.parquet"))
@manifest_argument
@click.option("--media/--no-media", default=True, help="Open the images and clips too; the default.")
@settings_options
@json_option
@click.pass_obj
def validate(typed: list[str], given: GivenManifest, media: bool, settings: Settings, as_json: bool) -> None:
    """Check every row of MANIFEST and the media it names, as `submit` does; exit code 3 if any is invalid."""
    from magi_ray.manifest import Defaults, require_valid
    from magi_ray.render.runs.captions import notes_on_prompts

    content: dict[str, Any] = {"manifest": given.name, "valid": False, "rows": 0, "problems": [], "notes": []}
    try:
        checked = given.read(typed, Defaults.of(settings), strict=False)
        if media:
            from magi_ray.render.runs.submission import look_at_media

            checked = look_at_media(checked).manifest
        notes = [*checked.notes, *notes_on_prompts(checked.rows, settings)]
        content |= {"rows": checked.table.num_rows, "notes": notes, "valid": not checked.problems}
        for note in notes:
            say(f"note: {note}", style="yellow")
        require_valid(checked, given.name)
    except ManifestError as exc:
        exc.json_beside = content | {"problems": [asdict(problem) for problem in exc.problems]}
        raise
    if as_json:
        print_json(content)
    opened = "" if media else " Media were not opened."
    say(f"{given.name}: {counted(len(checked.rows), 'row')}, all valid.{opened}")
    following = ["submit", *typed[typed.index("validate") + 1 :]]
    say_next(command_line(following, without=["--json", "--media", "--no-media"]))


@manifest.command(epilog=example("magi-ray manifest show manifests/quickstart.parquet"))
@manifest_argument
@settings_options
@json_option
@click.pass_obj
def show(typed: list[str], given: GivenManifest, settings: Settings, as_json: bool) -> None:
    """Show the rows of MANIFEST with the defaults of a run filled in."""
    from magi_ray.manifest import Defaults, table_for_show
    from magi_ray.report import manifest_table

    read = given.read(typed, Defaults.of(settings))
    rows, clips = table_for_show(read), [_taken(row) for row in read.rows]
    if as_json:
        numbers = [clip and asdict(clip) for clip in clips]
        print_json({"rows": [row | {"clip": clip} for row, clip in zip(rows, numbers, strict=True)]})
    else:
        print_table(manifest_table([row | {"clip": clip} for row, clip in zip(rows, clips, strict=True)]))


def _taken(row: Row) -> Taken | None:
    """Which frames of its clip ``row`` continues; None if the clip is not on this machine or cannot be read."""
    from magi_ray.media.clips import Taken
    from magi_ray.media.reader import clip_frames

    if row.video is None or row.prefix_location is None or row.prefix_location.lower().startswith("s3://"):
        return None
    with suppress(MediaError):
        found = clip_frames(Path(row.prefix_location), fps=row.fps)
        if frames := min(found, row.prefix.max_frames) // FRAMES_PER_LATENT * FRAMES_PER_LATENT:
            return Taken.of_clip(found, frames=frames, part=row.prefix.clip_end, fps=row.fps)
    return None
