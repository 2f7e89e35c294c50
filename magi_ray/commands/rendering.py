"""Carrying out a run: in this process, or in one of its own that this one follows and may leave."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import click

from magi_ray.commands.common import (
    CANCELLED,
    FAILED_ROWS,
    INTERRUPTED,
    PAUSED,
    command_line,
    counted,
    print_json,
    retry_line,
    say,
    stderr,
)
from magi_ray.errors import MagiRayError, StoreError, Superseded

if TYPE_CHECKING:
    from magi_ray.commands.drivers import End, Notebook
    from magi_ray.render.driving.reports import Noted, Outcome
    from magi_ray.render.driving.scheduler import RunState
    from magi_ray.render.runs.record import Run
    from magi_ray.storage.store import Store

LOOK_S = 0.5
# How long a process may take until it has begun to do something: Python starts, and reads its own files.
BEGIN_S = 60.0
LOG_LINES = 12


@dataclass(frozen=True, kw_only=True)
class How:
    """How a run is to be carried out, as the options of ``drive`` say it. Fields as those of ``render_here``.

    retry_failed, retry: the rows to try again though they failed.  weights: where the networks lie now, if not where
    they did at submission.
    """

    local: bool = False
    dashboard: bool = True
    take_over: bool = False
    max_failed_rows: int | None = None
    retry_failed: bool = False
    retry: tuple[str, ...] = ()
    weights: Path | None = None

    def words(self) -> list[str]:
        """As options of ``drive``."""
        words = ["--local"] if self.local else ["--dashboard" if self.dashboard else "--no-dashboard"]
        words += ["--take-over"] if self.take_over else []
        words += ["--max-failed-rows", str(self.max_failed_rows)] if self.max_failed_rows is not None else []
        words += ["--retry-failed"] if self.retry_failed else []
        words += [word for job_id in self.retry for word in ("--retry", job_id)]
        return words + (["--weights", str(self.weights)] if self.weights is not None else [])


def driving_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of all commands that render a run; the command gets ``how``."""

    @functools.wraps(command)
    def with_how(
        *args: Any, local: bool, dashboard: bool, take_over: bool, max_failed_rows: int | None, **others: Any
    ) -> Any:
        how = How(local=local, dashboard=dashboard, take_over=take_over, max_failed_rows=max_failed_rows)
        return command(*args, how=how, **others)

    for option in (
        click.option(
            "--max-failed-rows", type=click.IntRange(min=0), metavar="N", help="Stop when more rows than that failed."
        ),
        click.option("--take-over", is_flag=True, help="Take the run away from the process that renders it now."),
        click.option("--dashboard/--no-dashboard", default=True, show_default=True, help="Serve the Ray dashboard."),
        click.option("--local", is_flag=True, help="Render without Ray, in one process."),
    ):
        with_how = option(with_how)
    return with_how


def weights_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """For runs that exist: their networks may lie elsewhere on this machine."""
    return click.option(
        "--weights", type=click.Path(path_type=Path), metavar="FOLDER",
        help="Where the networks lie on this machine; default: where they lay at submission.",
    )(command)  # fmt: skip


def all_published(store: Store, run: Run) -> bool:
    from magi_ray.render.artifacts.videos import published as published_video

    return all(published_video(store, run.run_id, plan) is not None for plan in run.plans.values())


# In this process ------------------------------------------------------------------------------------------------


def render_now(store: Store, run: Run, how: How, notebook: Notebook | None = None) -> End:
    """Render what is left, here. Ctrl-C, SIGTERM and a closed terminal stop it, at whatever it is doing.

    Raises what ``render_here`` and ``render_on_ray`` raise.
    """
    from magi_ray.commands.drivers import End

    begun = time.monotonic()
    try:
        with _as_ctrl_c():
            outcome = _render(store, run, how, notebook)
    except (KeyboardInterrupt, SystemExit):  # while Ray starts, SIGTERM is its own affair: it exits
        return End(seconds=time.monotonic() - begun)
    except Superseded as exc:
        exc.next_command = exc.next_command or command_line("watch", run, store.uri)
        raise
    return End(outcome=outcome, seconds=time.monotonic() - begun)


def _render(store: Store, run: Run, how: How, notebook: Notebook | None) -> Outcome:
    from magi_ray.render.driving.reports import read_failures
    from magi_ray.render.driving.requests import requested
    from magi_ray.render.driving.scheduler import RunState
    from magi_ray.report import follow

    if not how.retry and all_published(store, run):
        return _at_rest(store, run, RunState.DONE)
    match requested(store, run.run_id):
        case "pause":
            return _at_rest(store, run, RunState.PAUSED)
        case "cancel":
            return _at_rest(store, run, RunState.CANCELLED)
    retry = frozenset(read_failures(store, run.run_id) if how.retry_failed else ()) | frozenset(how.retry)
    if how.local:
        from magi_ray.render.driving.local_workers import render_here

        with follow(stderr()) as show:
            return render_here(
                store, run, observe=show, take_over=how.take_over, retry=retry, max_failed_rows=how.max_failed_rows
            )
    from magi_ray.cluster.driver import render_on_ray
    from magi_ray.cluster.resources import local_ray

    say("Starting Ray on this machine …")
    with local_ray(namespace=f"magi-ray/{run.run_id}", dashboard=how.dashboard) as url:
        if url:
            say(f"Ray dashboard: {url}")
            if notebook is not None:
                notebook.write(dashboard=url)
        with follow(stderr()) as show:
            return render_on_ray(
                store, run, observe=show, take_over=how.take_over, retry=retry, max_failed_rows=how.max_failed_rows
            )


def _at_rest(store: Store, run: Run, state: RunState) -> Outcome:
    """How the run stands. Neither Ray nor torch is needed to say so."""
    from magi_ray.media.encoder import encoder_identity, find_ffmpeg
    from magi_ray.render.driving.inventory import take_stock_of_run
    from magi_ray.render.driving.reports import Journal, read_failures

    earlier = read_failures(store, run.run_id)
    rows = [
        replace(row, failed=row.job_id in earlier and not row.published)
        for row in take_stock_of_run(store, run, encoder_identity(find_ffmpeg()))
    ]
    return Journal(store, run, rows, earlier=earlier).close(state)


@contextmanager
def _as_ctrl_c() -> Iterator[None]:
    """SIGTERM and a closed terminal end the block as Ctrl-C does, with KeyboardInterrupt."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    with _handling((signal.SIGTERM, signal.SIGHUP), interrupt):
        yield


@contextmanager
def _handling(numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """``handler`` for these signals while the block runs, but for those that whoever started us wants ignored."""
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


# In a process of its own ----------------------------------------------------------------------------------------


def render_apart(store: Store, run: Run, store_uri: str, how: How, *, as_json: bool, no_wait: bool = False) -> None:
    """Render what is left in a process that outlives this one and its terminal; follow it to its end and say how it
    ended, or with ``no_wait`` leave it alone as soon as it has begun."""
    from magi_ray.commands.standing import refuse_second
    from magi_ray.render.driving import requests as control

    again = command_line("resume", run, store_uri)
    if not how.retry and all_published(store, run):
        report_end(store, run, render_now(store, run, how), as_json=as_json, again=again)
        return
    if not how.take_over:
        refuse_second(store, run.run_id, store_uri)
    wanted = control.requested(store, run.run_id)
    if wanted is not None:
        say(f"Run {run.run_id} was {'paused' if wanted == 'pause' else 'cancelled'}; going on with it.")
        control.clear(store, run.run_id)
    with _Signals() as signals:
        child = _Child(store, run, store_uri, how)
        if no_wait:
            child.begun()
            words = f"Rendering in the background, process {child.pid}; its log is {child.log}."
            child.leave(as_json=as_json, words=words)
            return
        try:
            with signals.raised():
                end = child.follow()
        except KeyboardInterrupt:
            with suppress(OSError):  # its terminal may be gone
                child.leave(as_json=as_json, words=f"Detached; process {child.pid} goes on rendering.")
            sys.exit(INTERRUPTED)
    report_end(store, run, end, as_json=as_json, again=again, retry=retry_line(run, store_uri))


class _Signals:
    """Ctrl-C, SIGTERM and a closed terminal, while the block runs: noted, lest a process be started and then forgotten,
    and raised as KeyboardInterrupt only in ``raised``."""

    def __init__(self) -> None:
        self._came = self._raising = False
        self._handling = _handling((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), self._note)

    def __enter__(self) -> Self:
        self._handling.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._handling.__exit__(*exc)

    @contextmanager
    def raised(self) -> Iterator[None]:
        try:
            self._raising = True
            if self._came:
                raise KeyboardInterrupt
            yield
        finally:
            self._raising = False

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._came = True
        if self._raising:
            raise KeyboardInterrupt


class _Child:
    """A process that renders ``run``: started, followed, left alone."""

    def __init__(self, store: Store, run: Run, store_uri: str, how: How) -> None:
        from magi_ray.commands.drivers import log_path, notes_path

        self._store, self._run, self._store_uri = store, run, store_uri
        self._seen = self._noted()
        self.log = log_path(store, run.run_id)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "magi_ray.cli", "drive", run.run_id, "--store", store_uri, *how.words()]
        with self.log.open("ab") as output:
            self._log_began = output.tell()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.pid = self._process.pid
        self._notes = notes_path(store, run.run_id, self.pid)

    def begun(self) -> None:
        """Wait until others can see that the run is being rendered, or is over already. Raises MagiRayError when it
        did not even begin."""
        from magi_ray.commands.drivers import read_notes

        deadline = time.monotonic() + BEGIN_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if (notes := read_notes(self._notes)) is not None and notes.driver.pid == self.pid:
                return
            time.sleep(0.05)
        if self._process.poll() is not None:
            self._end()

    def follow(self) -> End:
        """Show how far it is until it ends. Raises MagiRayError when it died without a word."""
        from magi_ray.commands.drivers import read_notes
        from magi_ray.report import follow

        say(f"Process {self.pid} renders; Ctrl-C leaves it alone. Its log is {self.log}.")
        dashboard = False
        with follow(stderr()) as show:
            while True:
                ended = self._process.poll() is not None
                notes = None if dashboard else read_notes(self._notes)
                if notes is not None and notes.driver.pid == self.pid and notes.dashboard:
                    dashboard = True
                    say(f"Ray dashboard: {notes.dashboard}")
                noted = self._noted()
                # What an earlier process noted says nothing of this one.
                if noted is not None and noted != self._seen:
                    self._seen = noted
                    show(noted.progress)
                if ended:
                    break
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(LOOK_S)
        return self._end()

    def leave(self, *, as_json: bool, words: str) -> None:
        """It goes on; say so, and how to see it again."""
        # Without this, Python warns of a process that is left alone.
        self._process.returncode = self._process.returncode or 0
        following = command_line("watch", self._run, self._store_uri)
        if as_json:
            print_json({"run_id": self._run.run_id, "pid": self.pid, "log": str(self.log), "next_command": following})
        say(words)
        say(f"next: {following}", style="bold")

    def _noted(self) -> Noted | None:
        """What is noted in the store of how far the run is. A store that is out of reach does not end us."""
        from magi_ray.render.driving.reports import read_noted

        try:
            return read_noted(self._store, self._run.run_id)
        except StoreError:
            return None

    def _end(self) -> End:
        from magi_ray.commands.drivers import read_notes

        notes = read_notes(self._notes)
        self._notes.unlink(missing_ok=True)
        if notes is None or notes.driver.pid != self.pid or notes.end is None:
            raise self._silent_death()
        if notes.end.error is None:
            return notes.end
        if notes.end.error.traceback:
            click.echo(notes.end.error.traceback, err=True, nl=False)
        raise notes.end.error.error()

    def _silent_death(self) -> MagiRayError:
        code = self._process.returncode
        how = f"exit code {code}"
        if code < 0:
            with suppress(ValueError):
                how = f"signal {-code} ({signal.Signals(-code).name})"
        lines: list[str] = []
        with suppress(OSError), self.log.open("rb") as log:
            log.seek(self._log_began)
            lines = log.read().decode(errors="replace").splitlines()[-LOG_LINES:]
        said = "".join(f"\n  {line}" for line in lines)
        return MagiRayError(
            f"Process {self.pid}, which rendered run {self._run.run_id}, ended with {how}."
            + (f" Its last words:{said}" if said else ""),
            remedy=f"What was committed is kept. Its whole log is {self.log}.",
            next_command=command_line("resume", self._run, self._store_uri),
        )


# How it ended ---------------------------------------------------------------------------------------------------


def report_end(
    store: Store,
    run: Run,
    end: End,
    *,
    as_json: bool,
    again: str,
    retry: str | None = None,
    delivered: Mapping[str, Any] | None = None,
) -> None:
    """Say how rendering ended: the videos' paths to stdout, the rest to stderr. Exits with another code than 0 unless
    all videos are done.

    again: the command that goes on.  retry: the one that tries failed rows again, if that is another.
    delivered: what a command made of the videos: printed in place of their paths.
    """
    from magi_ray.storage import keys

    outcome = end.outcome
    if outcome is None:
        if as_json:
            print_json({"run_id": run.run_id, "interrupted": True, "next_command": again})
        say("Stopped. What was committed is kept.")
        say(f"next: {again}", style="bold")
        sys.exit(INTERRUPTED)
    videos = {job: f"{store.uri.rstrip('/')}/{keys.video(run.run_id, job)}" for job in outcome.published}
    if as_json:
        print_json(
            {
                "run_id": run.run_id,
                "state": outcome.state,
                "videos": videos,
                "failed": [{"job_id": f.job_id, "class": f.failure, "message": f.message} for f in outcome.failed],
                "stages_rendered": outcome.stages_rendered,
                "stages_reused": outcome.stages_reused,
                "seconds": round(end.seconds, 1),
                **(delivered or {}),
            }
        )
    else:
        for path in (delivered or videos).values():
            click.echo(path)
    if outcome.already_published == len(run.plans):
        say(f"Nothing to render: {counted(len(run.plans), 'video')} of run {run.run_id} published before.")
    else:
        say(
            f"{len(outcome.published)} of {counted(len(run.plans), 'video')} published in {end.seconds:.0f} s; "
            f"{counted(outcome.stages_rendered, 'stage')} rendered, {outcome.stages_reused} reused."
        )
    for failure in outcome.failed:
        first, *rest = failure.message.splitlines() or [""]
        say(f"{failure.job_id} failed ({failure.failure}, {failure.kind}): {first}", style="red")
        for line in rest:
            say(f"  {line}")
    ends = {
        "paused": (PAUSED, "Paused. What was committed is kept.", again),
        "cancelled": (CANCELLED, "Cancelled. What was committed is kept.", again),
        "broken": (FAILED_ROWS, "Stopped: more rows failed than --max-failed-rows allows.", retry or again),
    }
    code, words, following = ends.get(outcome.state, (FAILED_ROWS if outcome.failed else 0, "", retry or again))
    if words:
        say(words)
    if code:
        say(f"next: {following}", style="bold")
        sys.exit(code)
