"""A session: one driver's work on a run, from the lease to the tables. The same with Ray and without it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

from magi_ray.errors import Superseded
from magi_ray.events import StepDone
from magi_ray.media.encoder import encoder_identity, find_ffmpeg
from magi_ray.render.driving.inventory import take_stock, take_stock_of_run, untouched
from magi_ray.render.driving.leadership import Leadership, leading
from magi_ray.render.driving.progress import RunProgress
from magi_ray.render.driving.reports import Journal, Outcome, read_failures
from magi_ray.render.driving.requests import requested
from magi_ray.render.driving.scheduler import (
    CancelAsked,
    Command,
    Event,
    Inspected,
    PauseAsked,
    RowInventory,
    Scheduler,
)
from magi_ray.render.runs.record import Run
from magi_ray.render.runs.weights import require_same_weights
from magi_ray.storage.store import Store

# How often people's wishes are looked up.
LOOK_S = 2.0


class Session:
    """What a driver holds while it drives: the scheduler, its journal, and the right to go on."""

    def __init__(
        self, store: Store, run: Run, encoder: str, leadership: Leadership, scheduler: Scheduler, journal: Journal
    ) -> None:
        self.store, self.run, self.encoder = store, run, encoder
        self.epoch = leadership.epoch
        self.scheduler, self.journal = scheduler, journal
        self._leadership = leadership
        self._looked = -LOOK_S

    def handle(self, event: Event) -> list[Command]:
        """Let the scheduler and the journal know; what to do about it."""
        self.journal.note(event)
        commands = self.scheduler.handle(event)
        for command in commands:
            self.journal.note(command)
        return commands

    def doubt(self) -> None:
        """To be called when a group was superseded: perhaps we are. Raises Superseded then."""
        self._leadership.check(now=True)

    def note(self, step: StepDone) -> None:
        self.journal.note(step)

    def tick(self) -> list[Event]:
        """To be called every second or so: says that the run is alive, and hears what people want of it.

        Raises Superseded when another driver has taken over, StoreError.
        """
        self._leadership.check()
        self.journal.beat()
        if time.monotonic() - self._looked < LOOK_S:
            return []
        self._looked = time.monotonic()
        match requested(self.store, self.run.run_id):
            case "pause":
                return [PauseAsked()]
            case "cancel":
                return [CancelAsked()]
            case _:
                return []

    def inspect(self, job_id: str) -> Inspected:
        """What the store holds of a row now."""
        return Inspected(row=take_stock(self.store, self.run.run_id, self.run.plans[job_id], self.encoder))

    def close(self) -> Outcome:
        """The run has come to rest: write its tables."""
        return self.journal.close(self.scheduler.state)


@contextmanager
def session(
    store: Store,
    run: Run,
    *,
    observe: Callable[[RunProgress], None] | None,
    take_over: bool,
    retry: Collection[str],
    max_failed_rows: int | None,
) -> Iterator[Session]:
    """Take stock of ``run`` and drive it for as long as the block runs.

    observe: called with every change.  take_over: see ``leading``.  retry: rows to be read whole, and
    tried again though they failed before; the other failed ones are left alone.  max_failed_rows: more, and the run
    stops.
    Raises Superseded, WeightsError (not those of the submission), MediaError (no ffmpeg), StoreError.
    """
    require_same_weights(run)
    encoder = encoder_identity(find_ffmpeg())
    with leading(store, run.run_id, take_over=take_over) as leadership:
        earlier = {job: failed for job, failed in read_failures(store, run.run_id).items() if job not in retry}
        rows = [
            replace(row, failed=row.job_id in earlier and not row.published)
            for row in _stock(store, run, encoder, retry, leadership)
        ]
        journal = Journal(store, run, rows, earlier=earlier, observe=observe)
        scheduler = Scheduler(rows, max_failed_rows=max_failed_rows)
        try:
            yield Session(store, run, encoder, leadership, scheduler, journal)
        except Superseded:
            raise  # what the run's own records say is the other driver's business now
        except BaseException:
            journal.stop()
            raise


class _Asked(Exception):
    """Somebody asked the run to stop before it began."""


def _stock(store: Store, run: Run, encoder: str, retry: Collection[str], leadership: Leadership) -> list[RowInventory]:
    """What the store holds of the run's rows; nothing, if it is to stop anyway. Looking may take minutes."""
    looked = time.monotonic()

    def meanwhile() -> None:
        nonlocal looked
        leadership.check()
        if time.monotonic() - looked >= LOOK_S:
            looked = time.monotonic()
            if requested(store, run.run_id) is not None:
                raise _Asked

    try:
        return take_stock_of_run(store, run, encoder, reread=retry, meanwhile=meanwhile)
    except _Asked:
        return [untouched(plan) for plan in run.plans.values()]
