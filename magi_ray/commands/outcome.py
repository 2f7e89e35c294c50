"""How rendering ended, for people and scripts: messages, the videos' paths, an exit code."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from magi_ray.commands.console import CANCELLED, FAILED_ROWS, INTERRUPTED, PAUSED, counted, print_json, say, say_next
from magi_ray.commands.stores import StoredRun
from magi_ray.drivers.delivery import deliver
from magi_ray.drivers.status_file import DriverExit
from magi_ray.render.driving.reports import RunResult
from magi_ray.storage import keys

if TYPE_CHECKING:
    from magi_ray.render.runs.record import Run


def report_exit(
    stored: StoredRun,
    ended: DriverExit,
    *,
    as_json: bool,
    again: str | None = None,
) -> None:
    """Say how rendering ended: the videos' paths to stdout, the rest to stderr. Exits with a code other than 0 unless
    all videos are done. Writes the files of a run of `render`, and gives their paths instead.

    again: the command that goes on and retries what failed; default: ``resume`` and ``retry``.
    """
    result = ended.run_result
    resume, retry = again or stored.command("resume"), again or stored.command("retry --failed")
    if result is None:
        if as_json:
            print_json({"run_id": stored.run_id, "interrupted": True, "next_command": resume})
        say("Stopped. What was committed is kept.")
        say_next(resume)
        sys.exit(INTERRUPTED)
    videos = {job: f"{stored.store.uri.rstrip('/')}/{keys.video(stored.run_id, job)}" for job in result.published}
    files = [str(file) for file in deliver(stored.store, stored.run_id, result.published).values()]
    if as_json:
        print_json(
            {
                "run_id": stored.run_id,
                "state": result.state,
                "videos": videos,
                "failed": [{"job_id": f.job_id, "class": f.failure, "message": f.message} for f in result.failed],
                "problems": [asdict(problem) for problem in stored.run.record.problems],
                "stages_rendered": result.stages_rendered,
                "stages_reused": result.stages_reused,
                "seconds": round(ended.seconds, 1),
                **({"out": files[0] if len(stored.run.plans) == 1 else files} if files else {}),
            }
        )
    else:
        for path in map(_from_here, map(Path, files)) if files else videos.values():
            click.echo(path)
    _say_result(stored, result, ended.seconds)
    match result.state:
        case "paused":
            code, next_command = PAUSED, resume
            say("Paused. What was committed is kept.")
        case "cancelled":
            code, next_command = CANCELLED, resume
            say("Cancelled. What was committed is kept.")
        case "broken":
            code, next_command = FAILED_ROWS, retry
            say("Stopped: more rows failed than --max-failed-rows allows.")
        case "failed":
            code, next_command = FAILED_ROWS, retry
            if result.failed:
                say(f"Failed: {len(result.failed)} of {counted(len(stored.run.plans), 'video')}; the others are done.")
            else:
                next_command = stored.command("status")  # the rows that were left out
        case _:
            if stored.store.uri.startswith("s3:"):
                say_next(stored.command("fetch"))
            return
    say_next(next_command)
    sys.exit(code)


def _from_here(file: Path) -> str:
    """As short as it can be typed."""
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def _say_result(stored: StoredRun, result: RunResult, seconds: float) -> None:
    videos = counted(len(stored.run.plans), "video")
    if result.already_published == len(stored.run.plans):
        say(f"Nothing to render: {videos} of run {stored.run_id} published before.")
    else:
        say(
            f"{len(result.published)} of {videos} published in {seconds:.0f} s; "
            f"{counted(result.stages_rendered, 'stage')} rendered, {result.stages_reused} reused."
        )
    for failure in result.failed:
        first, *rest = failure.message.splitlines() or [""]
        say(f"{failure.job_id} failed ({failure.failure}, {failure.kind}): {first}", style="red")
        for line in rest:
            say(f"  {line}")
    if stored.run.record.problems:
        say_left_out(stored.run)


def say_left_out(run: Run) -> None:
    """Say which rows were left out at submission, and what to do about it."""
    from magi_ray.manifest import explain

    say(f"{counted(run.record.left_out, 'row')} left out as invalid:", style="red")
    say(explain(run.record.problems))
    say(f"Correct them in {run.record.name} and submit it again: only what is new is rendered.")
