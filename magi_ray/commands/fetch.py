"""magi-ray fetch."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from magi_ray.commands.console import FAILED_ROWS, counted, print_json, say, say_next, stderr
from magi_ray.commands.options import example, json_option, run_argument, store_option
from magi_ray.commands.retry import require_row
from magi_ray.commands.stores import StoredRun, open_named_run
from magi_ray.errors import InputError, ObjectDamaged, ObjectMissing

SHOWN = 5  # of many rows or files, these are named


@click.command(epilog=example("magi-ray fetch quickstart -o videos"))
@run_argument
@click.option(
    "-o", "--output", "folder", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Where to put the videos; default: a folder here with the id of RUN.",
)  # fmt: skip
@click.option("--job", "job_ids", multiple=True, metavar="ID", help="The video of this row; may be repeated.")
@click.option("--force", is_flag=True, help="Replace files that hold something else.")
@store_option
@json_option
def fetch(
    name: str | None, folder: Path | None, job_ids: tuple[str, ...], force: bool, store_uri: str, as_json: bool
) -> None:
    """Copy the videos of RUN into a folder and check them. What is there already is not copied again; a copy that was
    interrupted goes on where it stopped."""
    from magi_ray.render.artifacts.videos import copy_video, is_video, published, video_sizes
    from magi_ray.report import in_bytes, status_line

    stored = open_named_run(name, store_uri, verb="fetch")
    for job_id in job_ids:
        require_row(stored, job_id)
    plans = {job_id: stored.run.plans[job_id] for job_id in job_ids or stored.run.plans}
    sizes = None if job_ids else video_sizes(stored.store, stored.run_id)
    found = {job: published(stored.store, stored.run_id, plan, sizes=sizes) for job, plan in plans.items()}
    records = {job: record for job, record in found.items() if record is not None}
    folder = (folder or Path(stored.run_id)).absolute()
    paths = {job: folder / f"{job}.mp4" for job in records}
    wanted = {job: record for job, record in records.items() if not is_video(paths[job], record)}
    if not force:
        _require_free_names(stored, folder, [paths[job] for job in wanted], job_ids)
    folder.mkdir(parents=True, exist_ok=True)
    _require_room(folder, wanted)

    damaged: dict[str, str] = {}
    with status_line(stderr()) as show:
        for number, (job, record) in enumerate(records.items(), start=1):
            try:
                if job in wanted:
                    show(f"{job}, {in_bytes(record['bytes'])}: {number} of {counted(len(records), 'video')}")
                    copy_video(stored.store, stored.run_id, job, record, paths[job])
                if not as_json:
                    click.echo(paths[job])
            except (ObjectDamaged, ObjectMissing) as exc:
                damaged[job] = exc.message
    _report(stored, {job: paths[job] for job in records if job not in damaged}, damaged, [*plans], as_json=as_json)


def _require_free_names(stored: StoredRun, folder: Path, paths: list[Path], job_ids: tuple[str, ...]) -> None:
    taken = [path for path in paths if path.exists()]
    if not taken:
        return
    chosen = "".join(f" --job {job_id}" for job_id in job_ids)
    which = ", ".join(path.name for path in taken[:SHOWN]) + " …" * (len(taken) > SHOWN)
    raise InputError(
        f"{folder} holds {counted(len(taken), 'file')} with the name of a video and other contents: {which}.",
        remedy="Name another folder with -o, or replace them:",
        next_command=stored.command(f"fetch -o {shlex.quote(str(folder))}{chosen} --force"),
    )


def _require_room(folder: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    from magi_ray.report import in_bytes

    parts = sum(part.stat().st_size for part in (folder / f"{job}.mp4.part" for job in records) if part.is_file())
    needed, free = sum(record["bytes"] for record in records.values()) - parts, shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"The videos need {in_bytes(needed)}, but only {in_bytes(free)} are free in {folder}.",
            remedy="Free some space, name a folder on another disk with -o, or some of the rows with --job.",
        )


def _report(
    stored: StoredRun, paths: Mapping[str, Path], damaged: Mapping[str, str], asked: list[str], *, as_json: bool
) -> None:
    """Say what was fetched and what was not. Exits with 4 unless all that was ``asked`` for was."""
    from magi_ray.render.driving.reports import read_failures

    missing = [job for job in asked if job not in paths]
    failures = read_failures(stored.store, stored.run_id, missing)
    bad = dict(damaged) | {job: (failed.message.splitlines() or [""])[0] for job, failed in failures.items()}
    waiting = [job for job in missing if job not in bad]
    following = None
    if damaged:
        following = stored.command(" ".join(["retry", *(f"--job {job}" for job in damaged)]))
    elif missing:
        following = stored.command("retry --failed" if bad else "resume")
    if as_json:
        print_json(
            {
                "run_id": stored.run_id,
                "videos": {job: str(path) for job, path in paths.items()},
                "failed": [{"job_id": job, "message": message} for job, message in bad.items()],
                "not_done": waiting,
                "next_command": following,
            }
        )
    say(f"{len(paths)} of {counted(len(asked), 'video')} fetched and checked.")
    for job, message in bad.items():
        say(f"{job} failed: {message}", style="red")
    if waiting:
        say(f"Not done: {', '.join(waiting[:SHOWN])}{' …' * (len(waiting) > SHOWN)}")
    if following is not None:
        say_next(following)
        sys.exit(FAILED_ROWS)
