"""A session: one driver's time with a run, from the lease to the tables. The same wherever the workers are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf

from magi_ray.errors import Superseded
from magi_ray.events import CancelAsked, Event, Inspected, PauseAsked, RowInventory, TaskKind
from magi_ray.render.driving.inventory import take_inventory, take_inventory_of_run, untouched
from magi_ray.render.driving.leadership import Leadership, lead
from magi_ray.render.driving.reports import Observer, RunReports, RunResult, read_failures
from magi_ray.render.driving.requests import requested
from magi_ray.render.driving.scheduler import Command, Scheduler
from magi_ray.render.driving.timings import Timings
from magi_ray.render.runs.record import Run
from magi_ray.storage.store import Store
from magi_ray.system import System


@dataclass(frozen=True, kw_only=True)
class DriveOptions:
    """take_over: take the run from a driver that is alive; it notices and stops.  retry: rows to be read whole, and
    tried again though they failed before; the other failed ones are left alone.  max_failed_rows: if more fail, the run
    stops."""

    take_over: bool = False
    retry: frozenset[str] = frozenset()
    max_failed_rows: int | None = None


class Session:
    """What a driver holds while it drives: the scheduler, the reports and the leadership."""

    def __init__(
        self,
        store: Store,
        run: Run,
        encoder: str,
        *,
        leadership: Leadership,
        scheduler: Scheduler,
        reports: RunReports,
        timings: Timings,
        system: System,
    ) -> None:
        self.store, self.run, self.encoder, self.epoch = store, run, encoder, leadership.epoch
        self.scheduler, self.timings, self.system = scheduler, timings, system
        self._leadership, self._reports = leadership, reports
        self._requests_read = -inf

    def start(self) -> list[Command]:
        """The commands the run begins with."""
        return self._noted(self.scheduler.start())

    def handle(self, event: Event) -> list[Command]:
        """Let the reports and the scheduler know; what is to be done about it."""
        self._reports.note(event)
        return self._noted(self.scheduler.handle(event))

    def _noted(self, commands: list[Command]) -> list[Command]:
        for command in commands:
            self._reports.note(command)
        return commands

    def recheck_leadership(self) -> None:
        """Call when a worker lost its row to another: perhaps this driver is superseded too. Raises Superseded."""
        self._leadership.check(now=True)

    def tick(self) -> list[Event]:
        """Call every second or so: keeps ``progress.json`` fresh and reads the users' requests.

        Raises Superseded when another driver has taken over, StoreError.
        """
        self._leadership.check()
        self._reports.write_if_due()
        now = self.system.clock()
        if now - self._requests_read < self.timings.requests_s:
            return []
        self._requests_read = now
        match requested(self.store, self.run.run_id):
            case "pause":
                return [PauseAsked()]
            case "cancel":
                return [CancelAsked()]
            case _:
                return []

    def inspect(self, job_id: str) -> Inspected:
        """What the store holds of a row now."""
        return Inspected(row=take_inventory(self.store, self.run.run_id, self.run.plans[job_id], self.encoder))

    def close(self) -> RunResult:
        """Call once the scheduler has finished: writes progress and tables. Raises Superseded: they are another's."""
        self._leadership.check(now=True)
        return self._reports.close(self.scheduler.state)


@contextmanager
def open_session(
    store: Store,
    run: Run,
    *,
    encoder: str,
    workers: Mapping[TaskKind, int],
    options: DriveOptions,
    observers: Sequence[Observer],
    name: str,
    timings: Timings,
    system: System,
) -> Iterator[Session]:
    """Take inventory of ``run`` and drive it for as long as the block runs.

    encoder: identity of ffmpeg.  workers: how many of each kind.  observers: called with every event and command.
    name: of this driver.  Raises Superseded, StoreError.
    """
    with lead(store, run.run_id, take_over=options.take_over, name=name, system=system) as leadership:
        reported = read_failures(store, run.run_id, run.plans)
        earlier = {job: failed for job, failed in reported.items() if job not in options.retry}
        found = _inventory(store, run, encoder, options.retry, leadership, timings, system)
        rows = [replace(row, failed=row.job_id in earlier and not row.published) for row in found]
        reports = RunReports(
            store, run, rows, earlier=earlier, observers=observers, encoder=encoder,
            interval_s=timings.reports_s, system=system,
        )  # fmt: skip
        scheduler = Scheduler(rows, workers=workers, max_failed_rows=options.max_failed_rows)
        try:
            yield Session(
                store,
                run,
                encoder,
                leadership=leadership,
                scheduler=scheduler,
                reports=reports,
                timings=timings,
                system=system,
            )
        except Superseded:
            raise  # the run's own records now belong to the newer driver
        except BaseException:
            reports.stop()
            raise


class _StopAsked(Exception):
    """A user asked the run to stop before it began."""


def _inventory(
    store: Store,
    run: Run,
    encoder: str,
    reread: Collection[str],
    leadership: Leadership,
    timings: Timings,
    system: System,
) -> list[RowInventory]:
    """What the store holds of the run's rows. Takes minutes at times; untouched rows, if a stop is asked for."""
    asked = system.clock()

    def meanwhile() -> None:
        nonlocal asked
        leadership.check()
        if system.clock() - asked >= timings.requests_s:
            asked = system.clock()
            if requested(store, run.run_id) is not None:
                raise _StopAsked

    try:
        return take_inventory_of_run(store, run, encoder, reread=reread, meanwhile=meanwhile, system=system)
    except _StopAsked:
        return [untouched(plan) for plan in run.plans.values()]
