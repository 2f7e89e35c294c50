"""magi-ray doctor, verify, gc."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import click

from magi_ray import __version__
from magi_ray.commands.common import (
    FAILURE,
    at_store,
    counted,
    example,
    find_run,
    json_option,
    out,
    print_json,
    say,
    stderr,
    store_option,
    store_to_read,
    store_to_write,
    without,
)
from magi_ray.errors import MediaError
from magi_ray.settings import cache_folder, device_here

if TYPE_CHECKING:
    from magi_ray.storage.probe import Finding


class _Duration(click.ParamType[float]):
    """A number with s, m, h or d behind it, in seconds."""

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
            self.fail(f"{value!r} is not a time; write 30m, 12h or 7d.", param, ctx)
        return number


@click.command(epilog=example("magi-ray doctor --store ./magi-ray-store"))
@click.option(
    "--store", "store_uri", metavar="URI", help="Try out this store: a folder, file:///… or s3://bucket/prefix."
)
@json_option
def doctor(store_uri: str | None, as_json: bool) -> None:
    """What this machine has, and what a store really does. Exit code 1 if something needed is missing."""
    from magi_ray.report import findings_table
    from magi_ray.storage.probe import probe

    store = None if store_uri is None else store_to_write(store_uri)
    machine = list(_machine())
    if not as_json:
        out(findings_table(machine))
    found: list[Finding] = []
    if store is not None:
        say(f"Trying out the store at {store.uri} …")
        found = probe(store, thorough=True)
        if not as_json:
            out(findings_table(found))
    missing = [finding for finding in (*machine, *found) if not finding.ok]
    needed = [finding for finding in missing if finding.needed]
    if as_json:
        print_json(
            {
                "ok": not needed,
                "machine": [asdict(finding) for finding in machine],
                "store": store_uri,
                "findings": [asdict(finding) for finding in found],
            }
        )
    for finding in missing:
        say(f"{finding.name}: {finding.seen} {finding.why}", style="red" if finding.needed else "yellow")
    if needed:
        where = "this store" if needed[0] in found else "this machine"
        say(f"Error: {where} lacks {counted(len(needed), 'thing')} that magi-ray needs.", style="red")
        say(f"next: magi-ray doctor{' --store ANOTHER' if where == 'this store' else ''}", style="bold")
        sys.exit(FAILURE)
    say("All that is needed is there." if not missing else "All that is needed is there; see above for the rest.")


def _machine() -> Iterator[Finding]:
    """What a render needs of this machine, and what of that it has."""
    from magi_ray.storage.probe import Finding

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    about = f"{__version__}, Python {platform.python_version()}, {counted(cores, 'core')}"
    yield Finding(name="magi-ray", ok=True, seen=about, why="")
    try:
        import torch
    except (ImportError, OSError) as exc:
        yield Finding(name="torch", ok=False, seen=f"cannot be imported: {exc}.", why="It computes everything.")
    else:
        cuda = torch.cuda.is_available()
        where = torch.cuda.get_device_name() if cuda else f"the CPU, {counted(torch.get_num_threads(), 'thread')}"
        yield Finding(name="torch", ok=True, seen=f"{torch.__version__}, computes on {where}", why="")
        if device_here() == "cuda" and not cuda:
            why = "Install a build of torch for CUDA, or everything is computed on the CPU."
            seen = "there is an NVIDIA driver, but torch does not find a device."
            yield Finding(name="CUDA", ok=False, seen=seen, why=why, needed=False)
    try:
        yield Finding(name="ray", ok=True, seen=version("ray"), why="")
    except PackageNotFoundError:
        why = "Without it only --local renders, one task after the other."
        yield Finding(name="ray", ok=False, seen="is not installed.", why=why, needed=False)
    yield _ffmpeg()
    folder = cache_folder()
    above = next(path for path in (folder, *folder.parents) if path.exists())
    free = f"{folder}, {shutil.disk_usage(above).free / 2**30:.0f} GiB free"
    if os.access(above, os.W_OK):
        yield Finding(name="cache", ok=True, seen=free, why="")
    else:
        why = "Weights of magi-tiny and logs are kept there; set MAGI_RAY_CACHE to a folder of yours."
        yield Finding(name="cache", ok=False, seen=f"{folder} cannot be written.", why=why)


def _ffmpeg() -> Finding:
    from magi_ray.media.encoder import encoder_identity, find_ffmpeg
    from magi_ray.storage.probe import Finding

    try:
        path = find_ffmpeg()
        return Finding(name="ffmpeg", ok=True, seen=f"{encoder_identity(path)}, with libx264, {path}", why="")
    except MediaError as exc:
        return Finding(name="ffmpeg", ok=False, seen=exc.message, why=exc.remedy)


@click.command(epilog=example("magi-ray verify"))
@click.argument("run_ids", metavar="[RUN]...", nargs=-1)
@store_option
@json_option
def verify(run_ids: tuple[str, ...], store_uri: str, as_json: bool) -> None:
    """Read everything in the store again, or what RUN needs of it. Whatever is not what was committed is named, with
    what mends it. Changes nothing; exit code 1 if anything is damaged."""
    from magi_ray.render.upkeep.verify import verify as read_again
    from magi_ray.report import count_up, damages_table, in_bytes

    store = store_to_read(store_uri)
    ids = [find_run(store, run_id, "verify", store_uri) for run_id in run_ids]
    with count_up(stderr()) as show:
        found = read_again(
            store,
            ids or None,
            on_progress=lambda objects, size: show(f"{counted(objects, 'object')} read, {in_bytes(size)}"),
        )
    if as_json:
        print_json(asdict(found))
    elif found.damages:
        out(damages_table(found.damages))
    for note in found.notes:
        say(f"note: {note}", style="yellow")
    read = f"{counted(found.objects, 'object')}, {in_bytes(found.bytes)}"
    if not found.damages:
        say(f"All is as it was committed: {read}.")
        return
    say(f"Error: of {read}, {len(found.damages)} are damaged.", style="red")
    mended = {damage.remedy: damage.next_command for damage in reversed(found.damages) if damage.remedy}
    for remedy in reversed(mended):
        say(remedy)
    commands = dict.fromkeys(damage.next_command for damage in found.damages if damage.next_command)
    for command in commands or [f"magi-ray verify{at_store(store_uri)}"]:
        say(f"next: {command}", style="bold")
    sys.exit(FAILURE)


@click.command(epilog=example("magi-ray gc --min-age 30d"))
@store_option
@click.option(
    "--min-age", "min_age_s", type=_Duration(), default="7d", show_default=True, metavar="TIME",
    help="Leave alone what was written later than that: 30m, 12h, 7d.",
)  # fmt: skip
@click.option(
    "--forget", "forgotten", multiple=True, metavar="RUN",
    help="What only this run needs counts as unneeded; its videos and records stay. Several may be given.",
)  # fmt: skip
@click.option("--yes", is_flag=True, help="Delete it; otherwise it is only shown.")
@json_option
@click.pass_obj
def gc(
    typed: list[str], store_uri: str, min_age_s: float, forgotten: tuple[str, ...], yes: bool, as_json: bool
) -> None:
    """Show what no run in the store needs, and delete it with --yes. Videos and all that belongs to a run stay."""
    from magi_ray.render.upkeep.gc import collect, garbage
    from magi_ray.report import count_up, garbage_table, in_bytes

    store = store_to_read(store_uri)
    forget = [find_run(store, run_id, "gc --forget", store_uri) for run_id in forgotten]
    with count_up(stderr()) as show:
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
        out(garbage_table(items))
    what = f"{counted(len(items), 'object')}, {in_bytes(size)}"
    if not items:
        say(f"Nothing in {store.uri} is unneeded and older than {_in_words(min_age_s)}.")
    elif yes:
        say(f"Deleted {counted(deleted[0], 'object')}, {in_bytes(deleted[1])}, of {what}.")
    else:
        say(f"{what} are needed by no run. Nothing was deleted.")
        say(f"next: {shlex.join(['magi-ray', *without(typed, '--json'), '--yes'])}", style="bold")


def _in_words(seconds: float) -> str:
    return f"{seconds / 86400:g} d" if seconds >= 86400 else f"{seconds:g} s"
