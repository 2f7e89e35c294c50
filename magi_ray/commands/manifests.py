"""magi-ray manifest build, validate, show."""

from __future__ import annotations

from pathlib import Path

import click

from magi_ray.commands.console import command_line, counted, print_json, print_table, say, say_next
from magi_ray.commands.inputs import SOURCES, require_file, require_manifest
from magi_ray.commands.options import example, json_option, settings_options
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
    say_next(command_line([*(["manifest", "validate"] if no_check else ["submit"]), str(out)]))


@manifest.command(epilog=example("magi-ray manifest validate manifests/quickstart.parquet"))
@click.argument("path", metavar="MANIFEST", type=click.Path(path_type=Path))
@settings_options
@json_option
@click.pass_obj
def validate(typed: list[str], path: Path, settings: Settings, as_json: bool) -> None:
    """Check every row of MANIFEST; exit code 3 if any is invalid."""
    from magi_ray.manifest import Defaults, read_manifest

    require_manifest(path, typed)
    checked = read_manifest(path, Defaults.of(settings))
    for note in checked.notes:
        say(f"note: {note}", style="yellow")
    if as_json:
        print_json({"manifest": str(path), "rows": len(checked.rows), "notes": checked.notes})
    say(f"{path}: {counted(len(checked.rows), 'row')}, all valid.")
    say_next(command_line(["submit", *typed[2:]], without=["--json"]))


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
