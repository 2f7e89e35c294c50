"""Who may work on what: one driver for a run, one group for a row (docs/decisions/0009)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from magi_ray.errors import AlreadyRendered, StoreError, Superseded, magi_ray_command
from magi_ray.storage import keys
from magi_ray.storage.epochs import become_driver, superseded
from magi_ray.storage.leases import BEAT_S, TTL_S, Lease, acquire, holding, renewing
from magi_ray.storage.store import Store
from magi_ray.system import System


class Leadership:
    """This process's right to drive the run, as its ``epoch``-th driver."""

    def __init__(self, store: Store, run_id: str, lease: Lease, system: System) -> None:
        self.epoch = lease.epoch
        self._store, self._run_id, self._lease, self._system = store, run_id, lease, system
        self._checked = system.clock()

    def check(self, *, now: bool = False) -> None:
        """Raises Superseded when another driver has taken over; StoreError when the run itself is gone from the store.

        Asks the store every BEAT_S seconds, or ``now``, and always once the lease may have expired: even then this
        driver leads until another takes the next epoch.
        """
        if now or not self._lease.valid or self._system.clock() - self._checked >= BEAT_S:
            if superseded(self._store, self._run_id, self.epoch):
                raise Superseded(
                    f"Another driver has taken over run {self._run_id}: this one is number {self.epoch}.",
                    remedy="Nothing is lost: it goes on from what is committed.",
                    next_command=magi_ray_command("watch", self._run_id, "--store", self._store.uri),
                )
            if not self._lease.valid and not self._store.exists(keys.epoch(self._run_id, self.epoch)):
                raise StoreError(
                    f"Run {self._run_id} is gone from {self._store.uri}: its driver's epoch is not there either.",
                    remedy="If nobody meant to delete it, look at the mount; then submit the manifest again.",
                    next_command=magi_ray_command("list", "--store", self._store.uri),
                )
            self._checked = self._system.clock()


@contextmanager
def lead(
    store: Store, run_id: str, *, take_over: bool = False, name: str = "driver", system: System = System()
) -> Iterator[Leadership]:
    """Be the driver of ``run_id`` for as long as the block runs.

    take_over: replace a driver even if it is alive; it notices and stops. Otherwise only one that is dead, or silent
    for long enough, is replaced.  name: of this process, for people.  Raises AlreadyRendered when another is alive, or
    was faster; Superseded, from the block.
    """
    key = keys.run_lease(run_id)
    if not take_over:
        found = holding(store, key, watch_s=TTL_S, system=system)
        if found is not None and found.beating:
            raise AlreadyRendered(
                f"Run {run_id} is being rendered already, by the {found.owner}.",
                remedy="Watch it, or take its work away from it with --take-over.",
                next_command=magi_ray_command("watch", run_id, "--store", store.uri),
            )
        take_over = found is not None  # it has been silent for long enough
    try:
        lease = become_driver(store, run_id, system.owner(name), take_over=take_over, system=system)
    except Superseded as exc:
        raise AlreadyRendered(exc.message, remedy=exc.remedy, next_command=exc.next_command) from exc
    with renewing(lease, system=system):
        yield Leadership(store, run_id, lease, system)


@contextmanager
def row_lease(
    store: Store, run_id: str, job_id: str, *, epoch: int, name: str, system: System = System()
) -> Iterator[Lease]:
    """Be the group that denoises the row ``job_id`` for driver ``epoch``. Ask ``check()`` of the lease often.

    The lease is taken from whoever has it: a driver gives a row to a group when the one before has failed or is lost,
    and one whose node cannot be reached may renew for ever. The previous holder notices when it renews next.
    name: of the worker.  Raises Superseded when a newer driver's group has it.
    """
    lease = acquire(store, keys.row_lease(run_id, job_id), system.owner(name), epoch=epoch, force=True, system=system)
    with renewing(lease, system=system):
        yield lease
