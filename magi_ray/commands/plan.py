"""magi-ray plan: what a submission would do, why, and what it costs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from magi_ray.commands.console import command_line, counted, print_json, print_table, say, say_next
from magi_ray.commands.inputs import GivenManifest
from magi_ray.commands.options import (
    example,
    json_option,
    manifest_argument,
    settings_options,
    skip_invalid_option,
    store_option,
)
from magi_ray.commands.stores import free_bytes, store_to_write
from magi_ray.errors import InputError
from magi_ray.settings import Settings
from magi_ray.storage.store import Store

if TYPE_CHECKING:
    from magi_ray.render.plans.space import Space
    from magi_ray.render.runs.record import Run
    from magi_ray.render.upkeep.forecast import Forecast
    from magi_ray.render.upkeep.reencoding import Reencoding


@click.command(epilog=example("magi-ray plan manifests/quickstart.parquet --store ./magi-ray-store"))
@manifest_argument
@store_option
@settings_options
@skip_invalid_option
@json_option
@click.pass_obj
def plan(
    typed: list[str], given: GivenManifest, store_uri: str, settings: Settings, skip_invalid: bool, as_json: bool
) -> None:
    """Show what `submit` would do with each row of MANIFEST, and why. Counts the forwards that it would cost; writes
    nothing."""
    store, run, _ = prepared(typed, given, store_uri, settings, skip_invalid=skip_invalid)
    show_plan(typed, store, run, as_json=as_json)


def prepared(
    typed: list[str], given: GivenManifest, store_uri: str, settings: Settings, *, skip_invalid: bool
) -> tuple[Store, Run, dict[str, Path]]:
    """The store, the run that the manifest asks for, and the media it needs, by sha256. Nothing is written."""
    from magi_ray.manifest import Defaults, explain

    # Rows first: this takes a moment, the rest loads torch.
    checked = given.read(typed, Defaults.of(settings), strict=False)
    store = store_to_write(store_uri)
    from magi_ray.render.runs.submission import prepare

    run, files = prepare(checked, name=given.name, settings=settings, store=store, skip_invalid=skip_invalid)
    for note in run.manifest.notes:
        say(f"note: {note}", style="yellow")
    if run.record.problems:
        say(f"{counted(run.record.left_out, 'row')} left out:", style="yellow")
        say(explain(run.record.problems))
    return store, run, files


def show_plan(typed: list[str], store: Store, run: Run, *, as_json: bool) -> None:
    """A line per row, the totals, and the command that does it. ``typed``: `plan` or `submit --dry-run`."""
    from magi_ray.report import in_bytes, in_time, plan_table

    rows, space, other_ffmpeg = _forecast(store, run)
    free = free_bytes(store)
    stages = sum(row.stages_left for row in rows)
    forwards = sum(row.forwards_left for row in rows)
    known = [row.left_s for row in rows if row.left_s is not None]
    left_s = sum(known) if len(known) == len(rows) else None
    following = command_line(["submit", *typed[1:]], without=["--json", "--dry-run"])
    if as_json:
        totals = {
            "stages_left": stages, "forwards_left": forwards, "left_s": left_s, "store_bytes_left": space.total,
            "store_bytes_free": free, "next_command": following,
            "other_ffmpeg": None if other_ffmpeg is None else asdict(other_ffmpeg),
        }  # fmt: skip
        problems = [asdict(problem) for problem in run.record.problems]
        print_json({"run_id": run.run_id, "videos": [asdict(row) for row in rows], "problems": problems} | totals)
    else:
        print_table(plan_table(rows))
    cost = f"{counted(stages, 'stage')} to render, {counted(forwards, 'forward')}"
    if left_s:
        cost += f", about {in_time(left_s)} as fast as earlier runs on this kind of device"
    if other_ffmpeg is not None:
        say(f"note: {other_ffmpeg}", style="yellow")
    has_free = "" if free is None else f", {in_bytes(free)} free"
    too_small = free is not None and space.total > free
    say(f"Store: about {in_bytes(space.total)} more{has_free}.", style="yellow" if too_small else "")
    say(f"Run {run.run_id}: {cost}. Nothing was written.")
    say_next(following)


def _forecast(store: Store, run: Run) -> tuple[tuple[Forecast, ...], Space, Reencoding | None]:
    """What is to be done for each row, what the store is to take in all, and what only another ffmpeg asks for."""
    from magi_ray.media.encoder import encoder_identity, find_ffmpeg
    from magi_ray.render.plans.space import Space
    from magi_ray.render.runs.record import with_takes
    from magi_ray.render.upkeep.forecast import forecast
    from magi_ray.render.upkeep.reencoding import reencoding

    run, encoder = with_takes(store, run), encoder_identity(find_ffmpeg())
    rows = forecast(store, run, encoder)
    return rows, sum((row.space_left for row in rows), Space()), reencoding(store, run, encoder)


def require_space(typed: list[str], store: Store, run: Run) -> None:
    """Raises InputError when what is left of ``run`` surely takes more than the disk of a local store has; says so when
    it probably does."""
    from magi_ray.render.plans.space import whole_space

    free = free_bytes(store)
    # Looking at what is there already takes long, and is seldom needed.
    if free is None or sum(whole_space(plan).total for plan in run.plans.values()) < free:
        return
    from magi_ray.report import in_bytes

    _, space, _ = _forecast(store, run)
    told = f"about {in_bytes(space.total)} of the store, but {in_bytes(free)} are free"
    if space.latents > free:
        raise InputError(
            f"Run {run.run_id} takes {told}.",
            remedy="Free some space, name a store on another disk with --store, or submit fewer rows. "
            "With --no-space-check it begins all the same.",
            next_command=command_line(typed),
        )
    if space.total > free:
        say(f"note: run {run.run_id} may take {told}.", style="yellow")
