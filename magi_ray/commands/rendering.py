"""Carrying out a run: here, or in a process of its own."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import click

from magi_ray.commands.common import FAILED_ROWS, INTERRUPTED, command_line, counted, print_json, say, stderr
from magi_ray.errors import InputError
from magi_ray.settings import cache_folder

if TYPE_CHECKING:
    from magi_ray.render.journal import Outcome
    from magi_ray.render.run import Run
    from magi_ray.storage.store import Store


def all_published(store: Store, run: Run) -> bool:
    from magi_ray.render.finish import published as published_video

    return all(published_video(store, run.run_id, plan) is not None for plan in run.plans.values())


def carry_out(
    store: Store,
    run: Run,
    *,
    local: bool,
    dashboard: bool,
    as_json: bool,
    again: str,
    claimed: int | None = None,
    deliver: Callable[[], dict[str, Any]] | None = None,
) -> None:
    """Render what is left and say how it ended. Exits with 4 when rows failed, 130 when interrupted.

    again: the command that goes on if this does not end well.  claimed: the run's claim, if it is held already.
    deliver: called when all videos are done; gives what --json is to say of it.
    """
    begun = time.monotonic()
    try:
        with _claim(store, run.run_id, claimed):
            outcome = render_run(store, run, local=local, dashboard=dashboard)
    except KeyboardInterrupt:
        if as_json:
            print_json({"run_id": run.run_id, "interrupted": True, "next_command": again})
        say("Stopped. What was committed is kept.")
        say(f"next: {again}", style="bold")
        sys.exit(INTERRUPTED)
    delivered = {} if deliver is None or outcome.failed else deliver()
    _end(store, run, outcome, time.monotonic() - begun, as_json=as_json, again=again, delivered=delivered)


def render_run(store: Store, run: Run, *, local: bool, dashboard: bool) -> Outcome:
    from magi_ray.report import follow

    if all_published(store, run):
        # Neither Ray nor torch is needed to say so.
        from magi_ray.media.encoder import encoder_identity, find_ffmpeg
        from magi_ray.render.inventory import take_stock
        from magi_ray.render.journal import Journal

        encoder = encoder_identity(find_ffmpeg())
        return Journal(store, run, [take_stock(store, run.run_id, p, encoder) for p in run.plans.values()]).close()
    if local:
        from magi_ray.render.local import render_here

        with follow(stderr()) as show:
            return render_here(store, run, observe=show)
    from magi_ray.cluster.driver import render_on_ray
    from magi_ray.cluster.resources import local_ray

    say("Starting Ray on this machine …")
    with local_ray(namespace=f"magi-ray/{run.run_id}", dashboard=dashboard) as url:
        if url:
            say(f"Ray dashboard: {url}")
        with follow(stderr()) as show:
            return render_on_ray(store, run, observe=show)


def _end(
    store: Store,
    run: Run,
    outcome: Outcome,
    seconds: float,
    *,
    as_json: bool,
    again: str,
    delivered: Mapping[str, Any],
) -> None:
    from magi_ray.storage import keys

    videos = {job: f"{store.uri.rstrip('/')}/{keys.video(run.run_id, job)}" for job in outcome.published}
    if as_json:
        print_json(
            {
                "run_id": run.run_id,
                "videos": videos,
                "failed": [{"job_id": f.job_id, "class": f.failure, "message": f.message} for f in outcome.failed],
                "stages_rendered": outcome.stages_rendered,
                "stages_reused": outcome.stages_reused,
                "seconds": round(seconds, 1),
                **delivered,
            }
        )
    else:
        for path in delivered.values() or videos.values():
            click.echo(path)
    if outcome.already_published == len(run.plans):
        say(f"Nothing to render: {counted(len(run.plans), 'video')} of run {run.run_id} published before.")
    else:
        say(
            f"{len(outcome.published)} of {counted(len(run.plans), 'video')} published in {seconds:.0f} s; "
            f"{counted(outcome.stages_rendered, 'stage')} rendered, {outcome.stages_reused} reused."
        )
    if outcome.failed:
        for failure in outcome.failed:
            first, *rest = failure.message.splitlines() or [""]
            say(f"{failure.job_id} failed ({failure.failure}, {failure.kind}): {first}", style="red")
            for line in rest:
                say(f"  {line}")
        say(f"next: {again}", style="bold")
        sys.exit(FAILED_ROWS)


def detach(store: Store, run: Run, store_uri: str, *, local: bool, dashboard: bool, as_json: bool) -> None:
    """Go on in a process of its own that outlives this one and its terminal."""
    command = [sys.executable, "-m", "magi_ray.cli", "resume", run.run_id, "--store", store_uri]
    command += ["--local"] if local else ["--dashboard" if dashboard else "--no-dashboard"]
    log = traces(store, run.run_id, "log")
    with _claim(store, run.run_id) as claim, log.open("ab") as output:
        # The claim goes from hand to hand: from now on until that process is gone the run counts as being rendered.
        handed = [] if claim is None else [claim.fileno()]
        process = subprocess.Popen(
            command + [word for handle in handed for word in ("--claimed", str(handle))],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=handed,
        )  # fmt: skip
        if claim is not None:
            _sign(claim, process.pid)
    # It is to outlive us; without this, Python warns of that.
    process.returncode = 0
    if as_json:
        print_json({"run_id": run.run_id, "pid": process.pid, "log": str(log)})
    say(f"Rendering in the background, process {process.pid}; its log is {log}.")
    say(f"next: {command_line('watch', run, store_uri)}", style="bold")


@contextmanager
def _claim(store: Store, run_id: str, held: int | None = None) -> Iterator[IO[str] | None]:
    """Holds the run's claim on this machine, so that no second process does the same work and others can tell that
    this one lives: the system lets go of it however the process ends. held: a handle of it from our parent.

    Raises InputError while another process has it.
    """
    if held is not None:
        os.set_inheritable(held, False)
        yield None
        return
    path = traces(store, run_id, "claim")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as claim:
        for _attempt in range(10):
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)  # `status` holds it for an instant when it looks
            except OSError:
                break  # a file system without locks: work done twice is harmless
        else:
            claim.seek(0)
            raise InputError(
                f"Run {run_id} is being rendered already, by process {claim.read().strip() or 'unknown'}.",
                remedy="Watch it, or stop that process first.",
                next_command=f"magi-ray watch {run_id} --store {shlex.quote(store.uri)}",
            )
        _sign(claim, os.getpid())
        yield claim


def _sign(claim: IO[str], pid: int) -> None:
    claim.seek(0)
    claim.truncate()
    claim.write(f"{pid}\n")
    claim.flush()


def rendered_here(store: Store, run_id: str) -> bool | None:
    """Whether a process of this machine renders the run now; None: none ever did, so another machine may."""
    try:
        with traces(store, run_id, "claim").open() as claim:
            fcntl.flock(claim, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def traces(store: Store, run_id: str, kind: Literal["claim", "log"]) -> Path:
    """Where this machine keeps the claim and the log of a run. The same id may be in several stores."""
    where = hashlib.sha256(store.uri.encode()).hexdigest()[:8]
    return cache_folder() / "runs" / where / f"{run_id}.{kind}"
