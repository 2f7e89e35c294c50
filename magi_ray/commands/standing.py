"""Who renders a run now, and what is said of it: by its lease in the store, the same on every machine."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any, Literal

from magi_ray.commands.common import at_store, say
from magi_ray.commands.drivers import at_work_here
from magi_ray.errors import Superseded
from magi_ray.render.driving import requests as control
from magi_ray.render.driving.reports import ReportedProgress
from magi_ray.storage import keys
from magi_ray.storage.leases import BEAT_S, TTL_S, Owner, gone, read_lease
from magi_ray.storage.store import Store

State = Literal["new", "rendering", "pausing", "cancelling", "paused", "cancelled", "broken", "stopped", "done"]


@dataclass(frozen=True, kw_only=True)
class Driver:
    """The process that renders a run. ``beat``: of its lease; None while it loads and has none yet."""

    owner: Owner
    beat: int | None

    @property
    def here(self) -> bool:
        """Whether it is a process of this machine, which can be signalled."""
        here = Owner.here("")
        return bool(here.boot) and (self.owner.host, self.owner.boot) == (here.host, here.boot)

    def __str__(self) -> str:
        if self.owner.host == socket.gethostname():
            return f"process {self.owner.pid}"
        return f"process {self.owner.pid} on {self.owner.host}"

    def as_json(self) -> dict[str, Any]:
        return {"host": self.owner.host, "pid": self.owner.pid, "beat": self.beat}


def driver_of(store: Store, run_id: str) -> Driver | None:
    """Who renders the run, as far as one look can tell: of a process elsewhere that died this says it lives."""
    lease = read_lease(store, keys.run_lease(run_id))
    if lease is not None and lease.holder is not None and not gone(lease.holder):
        return Driver(owner=lease.holder, beat=lease.beat)
    loading = at_work_here(store, run_id)
    return None if loading is None else Driver(owner=loading, beat=None)


class Lookout:
    """Looks again and again: so a driver elsewhere that died is noticed, after TTL_S without a beat. ``last``: the one
    that was seen last."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store, self._run_id = store, run_id
        self.last: Driver | None = None
        self._moved = 0.0
        self.silent = False

    def look(self) -> Driver | None:
        """Who renders the run now. ``silent`` says whether None is because nothing was heard any more."""
        driver = driver_of(self._store, self._run_id)
        now = time.monotonic()
        if driver != self.last:
            self.last, self._moved = driver, now
        self.silent = driver is not None and not driver.here and now - self._moved > TTL_S
        return None if self.silent else driver


def state_of(
    store: Store, run_id: str, driver: Driver | None, noted: ReportedProgress | None, *, all_done: bool
) -> State:
    """The run in one word. A driver that is gone can no longer say that it renders."""
    if driver is None and all_done:
        return "done"
    match control.requested(store, run_id), driver:
        case None, None:
            if noted is None:
                return "new"
            return "broken" if noted.state == "broken" else "done" if noted.state == "done" else "stopped"
        case None, _:
            return "rendering"
        case "pause", _:
            return "paused" if driver is None else "pausing"
        case _:
            return "cancelled" if driver is None else "cancelling"


def refuse_second(store: Store, run_id: str, store_uri: str) -> None:
    """Raises Superseded while a process of this machine renders the run. Whether one elsewhere lives only time can
    tell: whoever is to render waits for that."""
    driver = driver_of(store, run_id)
    if driver is not None and driver.here:
        raise Superseded(
            f"Run {run_id} is being rendered already, by {driver}.",
            remedy="Watch it; or pause it first; or take it away from that process with --take-over.",
            next_command=f"magi-ray watch {run_id}{at_store(store_uri)}",
        )
    if driver is not None:
        say(f"It was last rendered by {driver}; {TTL_S + BEAT_S:.0f} s will show whether it still is.")
