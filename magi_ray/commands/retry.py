"""magi-ray retry, takes."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path

import click

from magi_ray.commands.console import counted, print_json, print_table, say, say_next
from magi_ray.commands.options import (
    RenderOptions,
    example,
    json_option,
    no_wait_option,
    run_argument,
    run_options,
    store_option,
)
from magi_ray.commands.outcome import say_left_out
from magi_ray.commands.stores import StoredRun, open_named_run
from magi_ray.errors import AlreadyRendered, InputError
from magi_ray.manifest import explain
from magi_ray.system import local_time

GC_KEEPS = "Garbage collection keeps the take in use."


@click.command(epilog=example("magi-ray retry quickstart --failed"))
@click.option("--failed", is_flag=True, help="All failed rows; the default.")
@click.option("--job", "job_ids", multiple=True, metavar="ID", help="This row; may be repeated.")
@click.option("--from-chunk", type=int, metavar="N", help="Render the row of --job anew from chunk N on: a new take.")
@click.option("--take", type=int, metavar="N", help="Bring take N of the row of --job back; see `magi-ray takes`.")
@run_options
@no_wait_option
@json_option
def retry(
    name: str | None,
    failed: bool,
    job_ids: tuple[str, ...],
    from_chunk: int | None,
    take: int | None,
    store_uri: str,
    options: RenderOptions,
    no_wait: bool,
    as_json: bool,
) -> None:
    """Try rows of RUN again: all that failed, or those named. A row that is done is checked, and what is damaged of
    it is rendered again. Without RUN: the newest run."""
    from magi_ray.commands.background import render_in_background
    from magi_ray.render.driving.reports import read_failures

    if failed and job_ids:
        raise InputError("--failed and --job cannot be combined.", remedy="Give one of them.")
    if from_chunk is not None and take is not None:
        raise InputError("--from-chunk and --take cannot be combined.", remedy="Give one of them.")
    if (from_chunk is not None or take is not None) and len(job_ids) != 1:
        fault = f"{'--take' if from_chunk is None else '--from-chunk'} is for one row, but {len(job_ids)} are named."
        raise InputError(fault, remedy="Name the row with one --job ID.")
    stored = open_named_run(name, store_uri, verb="retry", weights=options.weights)
    for job_id in job_ids:
        require_row(stored, job_id)
    if not options.take_over:
        _require_nobody_here(stored)
    options = replace(options, retry=job_ids)
    if from_chunk is not None:
        stored = _with_take(stored, job_ids[0], from_chunk, options.weights)
    elif take is not None:
        stored = _with_take_back(stored, job_ids[0], take, options.weights)
    elif not job_ids:
        count = len(read_failures(stored.store, stored.run_id, stored.run.plans))
        if not count:
            if as_json:
                print_json({"run_id": stored.run_id, "retried": 0})
            say(f"No row of run {stored.run_id} has failed.")
            if stored.run.record.problems:
                say_left_out(stored.run)
            say_next(stored.command("status" if stored.all_published() else "resume"))
            return
        options = replace(options, retry_failed=True)
        say(f"Trying {counted(count, 'row')} of run {stored.run_id} again.")
    render_in_background(stored, options, as_json=as_json, no_wait=no_wait)


def require_row(stored: StoredRun, job_id: str) -> None:
    """Raises InputError with the rows there are."""
    rows = list(stored.run.plans)
    if job_id in rows:
        return
    problems = [problem for problem in stored.run.record.problems if problem.job_id == job_id]
    if problems:
        raise InputError(
            f"{job_id} was left out when run {stored.run_id} was submitted:\n{explain(problems)}",
            remedy=f"Correct it in {stored.run.record.name} and submit it again: only what is new is rendered.",
            next_command=stored.command("status"),
        )
    near = difflib.get_close_matches(job_id, rows, n=1, cutoff=0.4)
    raise InputError(
        f"Run {stored.run_id} has no row {job_id!r}.",
        remedy=f"Did you mean {near[0]}?" if near else f"Its rows are {', '.join(rows[:5])}{' …' * (len(rows) > 5)}",
        next_command=stored.command("status"),
    )


def _require_nobody_here(stored: StoredRun) -> None:
    """Raises AlreadyRendered while a process of this machine renders the run: no take is added to it then."""
    from magi_ray.drivers.driver_monitor import find_driver

    driver = find_driver(stored.store, stored.run_id)
    if driver is not None and driver.here:
        raise AlreadyRendered(
            f"Run {stored.run_id} is being rendered by {driver}.",
            remedy="Retry when it has ended, or pause it first.",
            next_command=stored.command("pause"),
        )


def _with_take(stored: StoredRun, job_id: str, from_chunk: int, weights: Path | None) -> StoredRun:
    """The run after a new take of ``job_id`` has been asked for."""
    from magi_ray.render.plans.takes import add_take
    from magi_ray.render.runs.record import open_run

    chunks = stored.run.plans[job_id].timeline.num_chunks
    number = add_take(stored.store, stored.run_id, job_id, from_chunk, num_chunks=chunks)
    say(f"Take {number} of {job_id}: anew from chunk {from_chunk} on.")
    return replace(stored, run=open_run(stored.store, stored.run_id, weights=weights))


def _with_take_back(stored: StoredRun, job_id: str, take: int, weights: Path | None) -> StoredRun:
    """The run after an earlier take of ``job_id`` has been asked for again."""
    from magi_ray.render.driving.inventory import stages_committed
    from magi_ray.render.plans.takes import bring_back, take_in_use
    from magi_ray.render.runs.record import open_run

    if take_in_use(stored.run.plans[job_id].takes) == take:
        say(f"Take {take} of {job_id} is in use already.")
        return stored
    bring_back(stored.store, stored.run_id, job_id, take)
    stored = replace(stored, run=open_run(stored.store, stored.run_id, weights=weights))
    plan = stored.run.plans[job_id]
    missing = len(plan.stage_keys) - stages_committed(stored.store, plan)
    say(f"Take {take} of {job_id} is brought back.")
    if missing:
        forwards = counted(missing * plan.forwards_per_stage, "forward")
        say(f"{counted(missing, 'stage')} of it are gone from the store and rendered again: {forwards}. {GC_KEEPS}")
    return stored


@click.command(epilog=example("magi-ray takes quickstart"))
@run_argument
@click.option("--job", "job_id", metavar="ID", help="Of this row; default: of all rows that have several.")
@store_option
@json_option
def takes(name: str | None, job_id: str | None, store_uri: str, as_json: bool) -> None:
    """List the takes of RUN's rows.

    Take 1 is a row as first rendered; `retry --from-chunk` makes the next ones, `retry --take` brings one back.
    """
    from magi_ray.render.driving.inventory import stages_committed
    from magi_ray.render.plans.takes import list_takes, take_in_use
    from magi_ray.report import takes_table

    stored = open_named_run(name, store_uri, verb="takes")
    run = stored.run
    if job_id is not None:
        require_row(stored, job_id)
    wanted = [job for job, plan in run.plans.items() if plan.takes] if job_id is None else [job_id]
    rows = {row.job_id: row for row in run.manifest.rows}
    found = [
        {
            "job_id": job,
            "take": take.number,
            "asked": None if take.asked_unix is None else local_time(take.asked_unix),
            "from_chunk": take.from_chunk,
            "base": take.base,
            "in_use": take.number == take_in_use(run.plans[job].takes),
            "stages": len(run.plans[job].stage_keys),
            "stages_in_store": stages_committed(stored.store, run.plan(rows[job], take.wishes)),
        }
        for job, listed in list_takes(stored.store, run.run_id, wanted, submitted_unix=run.record.created_unix).items()
        for take in listed
    ]
    if as_json:
        print_json({"run_id": run.run_id, "takes": found})
        return
    if not found:
        say(f"No row of run {run.run_id} has more than one take.")
        return
    print_table(takes_table(found))
    if any(take["stages_in_store"] != take["stages"] and not take["in_use"] for take in found):
        say(f"What is gone of a take would be rendered again, to the same bytes. {GC_KEEPS}")
    others = [take for take in found if not take["in_use"]]
    if others:
        say_next(stored.command(f"retry --job {others[-1]['job_id']} --take {others[-1]['take']}"))
