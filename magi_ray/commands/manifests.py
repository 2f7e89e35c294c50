"""magi-ray manifest build, validate, show."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from magi_ray.commands.console import command_line, counted, print_json, print_table, say, say_next
from magi_ray.commands.inputs import SOURCES, require_file, require_manifest
from magi_ray.commands.options import example, json_option, settings_options, settings_words
from magi_ray.errors import ManifestError
from magi_ray.settings import Settings


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
    """Build the manifest FILE (.parquet) from ROWS (.jsonl, .csv or .yaml). Media paths start from FILE's folder."""
    from magi_ray.manifest import Defaults, build_manifest

    require_file(rows, SOURCES, typed)
    count = build_manifest(rows, out, defaults=None if no_check else Defaults.of(settings))
    if as_json:
        print_json({"manifest": str(out), "rows": count, "checked": not no_check})
    else:
        click.echo(str(out))
    say(f"{counted(count, 'row')}, {'not checked' if no_check else 'all valid'}.")
    say_next(command_line([*(["manifest", "validate"] if no_check else ["submit"]), str(out), *settings_words()]))


@manifest.command(epilog=example("magi-ray manifest validate manifests/quickstart.parquet"))
@click.argument("path", metavar="MANIFEST", type=click.Path(path_type=Path))
@click.option("--media/--no-media", default=True, help="Open the images and clips too; the default.")
@settings_options
@json_option
@click.pass_obj
def validate(typed: list[str], path: Path, media: bool, settings: Settings, as_json: bool) -> None:
    """Check every row of MANIFEST and the media it names, as `submit` does; exit code 3 if any is invalid."""
    from magi_ray.manifest import Defaults, read_manifest, require_valid
    from magi_ray.render.runs.captions import notes_on_prompts

    require_manifest(path, typed)
    content: dict[str, Any] = {"manifest": str(path), "valid": False, "rows": 0, "problems": [], "notes": []}
    try:
        checked = read_manifest(path, Defaults.of(settings), strict=False)
        if media:
            from magi_ray.render.runs.submission import look_at_media

            checked = look_at_media(checked).manifest
        notes = [*checked.notes, *notes_on_prompts(checked.rows, settings)]
        content |= {"rows": checked.table.num_rows, "notes": notes, "valid": not checked.problems}
        for note in notes:
            say(f"note: {note}", style="yellow")
        require_valid(checked, str(path))
    except ManifestError as exc:
        exc.json_beside = content | {"problems": [asdict(problem) for problem in exc.problems]}
        raise
    if as_json:
        print_json(content)
    opened = "" if media else " Media were not opened."
    say(f"{path}: {counted(len(checked.rows), 'row')}, all valid.{opened}")
    following = ["submit", *typed[typed.index("validate") + 1 :]]
    say_next(command_line(following, without=["--json", "--media", "--no-media"]))


@manifest.command(epilog=example("magi-ray manifest show manifests/quickstart.parquet"))
@click.argument("path", metavar="MANIFEST", type=click.Path(path_type=Path))
@settings_options
@json_option
@click.pass_obj
def show(typed: list[str], path: Path, settings: Settings, as_json: bool) -> None:
    """Show the rows of MANIFEST with the defaults of a run filled in."""
    from magi_ray.manifest import Defaults, read_manifest, table_for_show
    from magi_ray.report import manifest_table

    require_manifest(path, typed)
    rows = table_for_show(read_manifest(path, Defaults.of(settings)))
    if as_json:
        print_json({"rows": rows})
    else:
        print_table(manifest_table(rows))
