"""Which process renders a run: whoever holds its lease in the store, whichever machine asks."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from typing import Any

from magi_ray.drivers.status_file import driver_on_this_machine
from magi_ray.storage import keys
from magi_ray.storage.leases import TTL_S, read_lease
from magi_ray.storage.store import Store
from magi_ray.system import Owner, gone


@dataclass(frozen=True, kw_only=True)
class Driver:
    """The process that renders a run. ``beat``: its lease's; None while it loads and has no lease yet."""

    owner: Owner
    beat: int | None

    @property
    def here(self) -> bool:
        """Whether it runs on this machine, so that it can be signalled."""
        here = Owner.here("")
        return bool(here.boot) and (self.owner.host, self.owner.boot) == (here.host, here.boot)

    def __str__(self) -> str:
        if self.owner.host == platform.node():
            return f"process {self.owner.pid}"
        return f"process {self.owner.pid} on {self.owner.host}"

    def as_json(self) -> dict[str, Any]:
        return {"host": self.owner.host, "pid": self.owner.pid, "beat": self.beat}


def find_driver(store: Store, run_id: str) -> Driver | None:
    """Who renders the run, as far as one look can tell: a driver that died on another machine still counts."""
    lease = read_lease(store, keys.run_lease(run_id))
    if lease is not None and lease.holder is not None and not gone(lease.holder):
        return Driver(owner=lease.holder, beat=lease.beat)
    loading = driver_on_this_machine(store, run_id)
    return None if loading is None else Driver(owner=loading, beat=None)


class DriverMonitor:
    """Looks again and again, and so notices the death of a driver on another machine: TTL_S without a beat.

    last: the driver seen last.  silent: whether the last look found none because that one had gone silent.
    """

    def __init__(self, store: Store, run_id: str) -> None:
        self._store, self._run_id = store, run_id
        self._changed = 0.0
        self.last: Driver | None = None
        self.silent = False

    def look(self) -> Driver | None:
        """Who renders the run now."""
        driver = find_driver(self._store, self._run_id)
        now = time.monotonic()
        if driver != self.last:
            self.last, self._changed = driver, now
        self.silent = driver is not None and not driver.here and now - self._changed > TTL_S
        return None if self.silent else driver
