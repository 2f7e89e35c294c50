"""magi-ray doctor."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

import click

from magi_ray.commands.console import FAILURE, command_line, counted, print_json, print_table, say, say_next
from magi_ray.commands.options import example, json_option
from magi_ray.commands.stores import store_to_write
from magi_ray.errors import MediaError
from magi_ray.settings import cache_folder, chosen_store, device_here
from magi_ray.storage.probe import Finding, probe


@click.command(epilog=example("magi-ray doctor --store ./magi-ray-store"))
@click.option(
    "--store", "store_uri", default=chosen_store, show_default="$MAGI_RAY_STORE", metavar="URI",
    help="Test this store too: a folder, file:///… or s3://….",
)  # fmt: skip
@json_option
@click.pass_obj
def doctor(typed: list[str], store_uri: str | None, as_json: bool) -> None:
    """Check what this machine has and what a store really does, if one is named. Exit code 1 if something needed is
    missing."""
    from magi_ray.report import findings_table

    store = None if store_uri is None else store_to_write(store_uri)
    machine = list(_machine())
    if not as_json:
        print_table(findings_table(machine))
    found: list[Finding] = []
    if store is not None:
        say(f"Testing the store at {store.uri} …")
        found = probe(store, thorough=True)
        if not as_json:
            print_table(findings_table(found))
    missing = [finding for finding in (*machine, *found) if not finding.ok]
    needed = [finding for finding in missing if finding.needed]
    if as_json:
        content = {"ok": not needed, "machine": [asdict(finding) for finding in machine], "store": store_uri}
        print_json(content | {"findings": [asdict(finding) for finding in found]})
    for finding in missing:
        say(f"{finding.name}: {finding.seen} {finding.why}", style="red" if finding.needed else "yellow")
    if needed:
        where = "this store" if all(finding in found for finding in needed) else "this machine"
        say(f"Error: {where} lacks {counted(len(needed), 'thing')} that magi-ray needs.", style="red")
        say("Mend that, or name another store; then check again." if found else "Mend that, then check again.")
        say_next(command_line(typed, without=["--json"]))
        sys.exit(FAILURE)
    say("Everything that is needed is there" + ("; see above for the rest." if missing else "."))


def _machine() -> Iterator[Finding]:
    """What rendering needs on this machine, and whether it is there."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    about = f"{version('magi-ray')}, Python {platform.python_version()}, {counted(cores, 'core')}"
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
            seen = "there is an NVIDIA driver, but torch finds no device."
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

    try:
        path = find_ffmpeg()
        return Finding(name="ffmpeg", ok=True, seen=f"{encoder_identity(path)}, with libx264, {path}", why="")
    except MediaError as exc:
        return Finding(name="ffmpeg", ok=False, seen=exc.message, why=exc.remedy)
