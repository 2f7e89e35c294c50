"""magi-ray verify, gc."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from magi_ray.commands.completion import complete_run
from magi_ray.commands.console import FAILURE, command_line, counted, print_json, print_table, say, say_next, stderr
from magi_ray.commands.options import example, json_option, store_option
from magi_ray.commands.stores import find_run, store_flag, store_to_read
from magi_ray.errors import magi_ray_command
from magi_ray.storage.store import Store

if TYPE_CHECKING:
    from magi_ray.render.upkeep.verify import Damage


class _Duration(click.ParamType[float]):
    """A number with the unit s, m, h or d; the command gets seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
        try:
            number = float(value[:-1]) * units[value[-1]]
        except (ValueError, KeyError, IndexError):
            number = -1.0
        if not 0 <= number < float("inf"):
            self.fail(f"{value!r} is not a duration; write 30m, 12h or 7d.", param, ctx)
        return number


@click.command(epilog=example("magi-ray verify"))
@click.argument("names", metavar="[RUN]...", nargs=-1, shell_complete=complete_run)
@store_option
@json_option
def verify(names: tuple[str, ...], store_uri: str, as_json: bool) -> None:
    """Read everything in the store again, or all that RUN needs. Names what is not as it was committed, and how to
    repair it. Changes nothing; exit code 1 if anything is damaged."""
    from magi_ray.render.upkeep.verify import verify as read_again
    from magi_ray.report import damages_table, in_bytes, status_line

    store = store_to_read(store_uri)
    run_ids = [find_run(store, name, store_uri, verb="verify") for name in names]
    with status_line(stderr()) as show:
        found = read_again(
            store, run_ids or None, on_progress=lambda n, size: show(f"{counted(n, 'object')} read, {in_bytes(size)}")
        )
    again = magi_ray_command("verify", *names) + store_flag(store_uri)
    # The store does not know all that is to be typed to submit a run again; this machine may.
    found.damages = [
        replace(damage, next_command=_submitted(store, damage) or again)
        if damage.next_command.startswith("magi-ray submit ")
        else damage
        for damage in found.damages
    ]
    if as_json:
        print_json(asdict(found))
    elif found.damages:
        print_table(damages_table(found.damages))
    for note in found.notes:
        say(f"note: {note}", style="yellow")
    read = f"{counted(found.objects, 'object')}, {in_bytes(found.bytes)}"
    if not found.damages:
        say(f"All {'that is there ' if found.notes else ''}is as it was committed: {read}.")
        return
    say(f"Error: of {read}, {len(found.damages)} {'is' if len(found.damages) == 1 else 'are'} damaged.", style="red")
    for remedy in dict.fromkeys(damage.remedy for damage in found.damages if damage.remedy):
        say(remedy)
    commands = dict.fromkeys(damage.next_command for damage in found.damages)
    for command in sorted(commands, key=lambda command: command == again):  # to look again comes last
        say_next(command)
    sys.exit(FAILURE)


def _submitted(store: Store, damage: Damage) -> str:
    """The command that submits the first run again that needs what is damaged, if this machine knows it."""
    from magi_ray.drivers.status_file import submission

    return next((command for run_id, _ in damage.needed_by if (command := submission(store, run_id))), "")


@click.command(epilog=example("magi-ray gc --min-age 30d"))
@store_option
@click.option(
    "--min-age", "min_age_s", type=_Duration(), default="7d", show_default=True, metavar="TIME",
    help="Leave alone whatever is younger, as in 30m, 12h, 7d.",
)  # fmt: skip
@click.option(
    "--forget", "forgotten", multiple=True, metavar="RUN", shell_complete=complete_run,
    help="Count what only this run needs as garbage; its videos and records stay. May be repeated.",
)  # fmt: skip
@click.option("--yes", is_flag=True, help="Delete it; without --yes it is only shown.")
@json_option
@click.pass_obj
def gc(
    typed: list[str], store_uri: str, min_age_s: float, forgotten: tuple[str, ...], yes: bool, as_json: bool
) -> None:
    """Show what no run in the store needs, and with --yes delete it. Videos and the records of runs stay."""
    from magi_ray.render.upkeep.gc import collect, garbage
    from magi_ray.report import garbage_table, in_bytes, status_line

    store = store_to_read(store_uri)
    forget = [find_run(store, name, store_uri, verb="gc --forget") for name in forgotten]
    with status_line(stderr()) as show:
        items, size = [], 0
        for item in garbage(store, min_age_s=min_age_s, forget=forget):
            items.append(item)
            size += item.size
            show(f"{counted(len(items), 'object')} found that no run needs, {in_bytes(size)}")
    deleted = collect(store, items) if yes else (0, 0)
    if as_json:
        totals = {"objects": len(items), "bytes": size, "deleted_objects": deleted[0], "deleted_bytes": deleted[1]}
        print_json({"garbage": [asdict(item) for item in items]} | totals)
    elif items:
        print_table(garbage_table(items))
    what = f"{counted(len(items), 'object')}, {in_bytes(size)}"
    if not items:
        age = f"{min_age_s / 86400:g} d" if min_age_s >= 86400 else f"{min_age_s:g} s"
        say(f"{store.uri} holds nothing older than {age} that no run needs.")
    elif yes:
        say(f"Deleted {counted(deleted[0], 'object')}, {in_bytes(deleted[1])}, of {what}.")
    else:
        say(f"No run needs {what}. Nothing was deleted.")
        say_next(command_line([*typed, "--yes"], without=["--json"]))
