"""Epochs: which driver is a run's driver. Each takes the next number; the highest counts, the others are superseded."""

from __future__ import annotations

from magi_ray.settings import Frozen
from magi_ray.storage import keys
from magi_ray.storage.leases import BEAT_S, TTL_S, Lease, acquire, until_free
from magi_ray.storage.records import canonical_json, new_write_id
from magi_ray.storage.store import Store
from magi_ray.system import Owner, System

FORMAT_VERSION = 1


class EpochRecord(Frozen):
    version: int = FORMAT_VERSION
    number: int
    owner: Owner
    write_id: str


def take_epoch(store: Store, run_id: str, owner: Owner) -> int:
    """Become the driver of ``run_id``. The number is ours alone, and higher than all before. Raises StoreError."""
    # Numbers have no gap, so that ``superseded`` has to look at one key only.
    number = _highest(store, run_id) + 1
    while True:
        record = EpochRecord(number=number, owner=owner, write_id=new_write_id())
        if store.put_if_absent(keys.epoch(run_id, number), canonical_json(record.model_dump())):
            return number
        number += 1


def become_driver(
    store: Store, run_id: str, owner: Owner, *, within_s: float = TTL_S + BEAT_S, take_over: bool = False,
    system: System = System(),
) -> Lease:  # fmt: skip
    """Wait until nobody drives ``run_id``, or ``take_over`` at once; then take the next epoch and with it the lease.

    within_s: how long to wait.  Raises Superseded when somebody still drives it, or a newer driver came meanwhile;
    StoreError.
    """
    key = keys.run_lease(run_id)
    # Waiting comes first, since a new epoch ends the driver before. After it the lease goes to the highest, without
    # waiting: whoever holds it is superseded.
    if not take_over:
        until_free(store, key, owner, within_s=within_s, system=system)
    epoch = take_epoch(store, run_id, owner)
    return acquire(store, key, owner, epoch=epoch, force=True, system=system)


def superseded(store: Store, run_id: str, number: int) -> bool:
    """Whether a newer driver than ``number`` has come. One call to the store."""
    return store.exists(keys.epoch(run_id, number + 1))


def _highest(store: Store, run_id: str) -> int:
    return max(filter(None, map(keys.number_of, store.list(keys.epochs(run_id)))), default=0)
