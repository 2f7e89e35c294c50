"""Leases: who works on something now. They save work; correctness comes from create-only commits.

A lease is one small object, changed by ``swap`` only. Its holder renews it with a beat: it swaps in the next count
every BEAT_S. A lease is free when it is missing, released, held by a process of this machine that is known to be dead,
or when nothing changed in it for TTL_S by the clock of whoever waits for it. Its holder considers it lost when its last
successful swap began TTL_S ago, which is before anybody else may take it. Wall clocks are never compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from magi_ray.errors import MagiRayError, ObjectDamaged, ObjectMissing, StoreError, Superseded
from magi_ray.settings import Frozen
from magi_ray.storage.records import canonical_json, json_object, new_write_id, require_readable
from magi_ray.storage.retrying import SHUTDOWN_PATIENCE_S, with_patience
from magi_ray.storage.store import Store
from magi_ray.system import Flag, Owner, System

FORMAT_VERSION = 1
TTL_S = 20.0
BEAT_S = 5.0
WATCH_INTERVAL_S = 1.0


class LeaseRecord(Frozen):
    """The stored object. ``holder``: None when released.  ``epoch``: of the driver it is held for.
    ``write_id``: of this one write, so that no two are alike."""

    version: int = FORMAT_VERSION
    holder: Owner | None
    epoch: int
    beat: int
    write_id: str


@dataclass(frozen=True, kw_only=True)
class Holding:
    """``beating``: whether the beat moved while it was watched; None when that was too short to tell."""

    owner: Owner
    epoch: int
    beating: bool | None


def read_lease(store: Store, key: str) -> LeaseRecord | None:
    """The lease as stored; None when there is none or it is damaged. Raises StoreError, and InputError when a newer
    magi-ray wrote it."""
    return _Watch(store, key, System()).look()


def holding(store: Store, key: str, *, watch_s: float = 0.0, system: System = System()) -> Holding | None:
    """Who holds the lease, without taking it; None when nobody does.

    Watches for at most ``watch_s`` (TTL_S is enough to know), and returns sooner when the beat moves.
    """
    watch = _Watch(store, key, system)
    while True:
        record = watch.look()
        if record is None or record.holder is None or system.gone(record.holder):
            return None
        if watch.moved or watch.unchanged_s >= TTL_S or watch.watched_s >= watch_s:
            beating = True if watch.moved else False if watch.unchanged_s >= TTL_S else None
            return Holding(owner=record.holder, epoch=record.epoch, beating=beating)
        system.sleep(WATCH_INTERVAL_S)


def until_free(
    store: Store, key: str, owner: Owner, *, within_s: float = TTL_S + BEAT_S, system: System = System()
) -> None:
    """Wait until ``owner`` may take the lease, without taking it. Raises as ``acquire`` does."""
    _Watch(store, key, system).until_free(owner, within_s=within_s)


def acquire(
    store: Store, key: str, owner: Owner, *, epoch: int, within_s: float = TTL_S + BEAT_S, force: bool = False,
    system: System = System(),
) -> Lease:  # fmt: skip
    """Take the lease under ``key``, as soon as it is free.

    owner: unique among those who may ask. If it holds the lease already, it lost sight of it and gets it back.
    within_s: how long to wait; more than TTL_S to outwait a dead machine's lease.  force: take it whoever holds it.
    Raises Superseded when it is still held after ``within_s``, or is or was held for a newer driver than ``epoch``;
    StoreError.
    """
    watch = _Watch(store, key, system)
    while True:
        record = watch.look() if force else watch.until_free(owner, within_s=within_s)
        if record is not None and record.epoch > epoch:
            raise Superseded(
                f"{key} belongs to driver {record.epoch} of this run, and {owner.name} works for driver {epoch}.",
                remedy="Nothing is lost: the newer driver goes on from what is committed.",
            )
        mine = LeaseRecord(holder=owner, epoch=epoch, beat=record.beat + 1 if record else 0, write_id=new_write_id())
        begun, version = system.clock(), None
        if watch.version is not None:
            version = store.swap(key, _serialise(mine), watch.version)
        elif store.put_if_absent(key, _serialise(mine)):
            found, version = store.get_versioned(key)
            version = version if found == _serialise(mine) else None
        if version is not None:
            return Lease(store, key, mine, version, begun=begun, system=system)


class Lease:
    """A lease that this process took with ``acquire``. Used by one thread, except for ``check`` and ``valid``.

    begun: when the swap that took it began, by the clock of ``system``.
    """

    def __init__(
        self, store: Store, key: str, record: LeaseRecord, version: str, *, begun: float, system: System
    ) -> None:
        self.key = key
        self._store, self._record, self._version, self._begun, self._system = store, record, version, begun, system
        self._attempt: LeaseRecord | None = None
        self._lost: Superseded | None = None

    @property
    def epoch(self) -> int:
        """Of the driver it is held for."""
        return self._record.epoch

    @property
    def valid(self) -> bool:
        """Whether nobody else may have taken it yet."""
        return self._lost is None and self._system.clock() - self._begun < TTL_S

    def check(self) -> None:
        """Raises Superseded when the lease is lost, or may be because no beat got through for too long."""
        if self._lost is not None:
            raise self._lost
        if not self.valid:
            raise Superseded(
                f"The last beat of {self.key} began {self._system.clock() - self._begun:.0f} s ago, but a lease holds "
                f"for {TTL_S:.0f} s: another may have taken it.",
                remedy="Check the store and the network if this happens often.",
            )

    def beat(self) -> None:
        """Renew the lease. Also after TTL_S: if nobody took it meanwhile, it was never lost.

        Raises Superseded when somebody did; StoreUnavailable, after which the lease stays valid for what is left of
        TTL_S and ``beat`` may be tried again.
        """
        while self._lost is None:
            begun = self._system.clock()
            # A retry writes the same bytes, so that one that landed unseen, or late, is recognised as ours.
            if self._attempt is None:
                self._attempt = self._record.model_copy(
                    update={"beat": self._record.beat + 1, "write_id": new_write_id()}
                )
            version = self._store.swap(self.key, _serialise(self._attempt), self._version)
            if version is not None:
                self._record, self._version, self._begun, self._attempt = self._attempt, version, begun, None
                return
            if (lost := self._adopt()) is not None:  # else it may have been released meanwhile
                self._lost = lost
        raise self._lost

    def release(self) -> None:
        """Let go, unless it is lost already. Where the store is out of reach or full it expires by itself."""
        # Not ours from here on, since nobody knows when the swap will land.
        lost, self._lost = self._lost, Superseded(f"{self.key} was released.")
        self._store = with_patience(self._store, SHUTDOWN_PATIENCE_S)
        with contextlib.suppress(StoreError):
            while lost is None:
                free = self._record.model_copy(update={"holder": None, "write_id": new_write_id()})
                if self._store.swap(self.key, _serialise(free), self._version) is not None:
                    return
                lost = self._adopt()

    def _adopt(self) -> Superseded | None:
        """After a refused swap: None to go on from our own earlier attempt, or why the lease is lost.

        ``valid`` keeps counting from the swap before: when that attempt began is not known.
        """
        try:
            found, version = self._store.get_versioned(self.key)
        except ObjectMissing:
            found, version = b"", ""
        if self._attempt is not None and found == _serialise(self._attempt):
            self._record, self._version, self._attempt = self._attempt, version, None
            return None
        other = _parse(found)
        holder = other.holder if other is not None else None
        return Superseded(
            f"{self.key} was taken by {holder or 'another'}.",
            remedy="Nothing is lost: the other one goes on from what is committed.",
        )


@contextlib.contextmanager
def renewing(lease: Lease, *, system: System = System(), every_s: float = BEAT_S) -> Iterator[Lease]:
    """Renew ``lease`` in the background while the block runs, then release it. The block calls ``lease.check()``."""
    over = system.flag()
    beating = system.start(lambda: _beat(lease, over, every_s), name="magi-ray-lease")
    try:
        yield lease
    finally:
        over.set()
        with contextlib.suppress(Exception):  # what the block did matters more
            beating.result(TTL_S)
        lease.release()


def _beat(lease: Lease, over: Flag, every_s: float) -> None:
    """Beat until the lease is lost or ``over``."""
    pause_s = every_s
    while not over.wait(pause_s):
        try:
            lease.beat()
            pause_s = every_s
        except StoreError:
            pause_s = every_s / 5
        except MagiRayError:  # lost to another, or to a newer magi-ray
            return


class _Watch:
    """Reads a lease repeatedly. ``version``: of what was read last, None when there was nothing."""

    def __init__(self, store: Store, key: str, system: System) -> None:
        self._store, self._key, self._system = store, key, system
        self.version: str | None = None
        self.moved = False
        self._began: float | None = None
        self._changed = 0.0

    def look(self) -> LeaseRecord | None:
        try:
            data, version = self._store.get_versioned(self._key)
        except ObjectMissing:
            data, version = b"", None
        now = self._system.clock()  # after reading: what we saw was written before
        if self._began is None:
            self._began = self._changed = now
        elif version != self.version:
            self.moved, self._changed = True, now
        self.version = version
        return _parse(data)

    def until_free(self, owner: Owner, *, within_s: float) -> LeaseRecord | None:
        """The lease as stored, once ``owner`` may take it. Raises Superseded if it is still held after ``within_s``."""
        while True:
            record = self.look()
            if record is None:
                free, holder = self.version is None, None  # else it is damaged: perhaps somebody's
            else:
                holder = record.holder
                free = holder is None or holder == owner or self._system.gone(holder)
            if free or self.unchanged_s >= TTL_S:
                return record
            if self.watched_s >= within_s:
                raise Superseded(
                    f"{self._key} is held by {holder or 'somebody whose record is damaged'}: its beat"
                    f" {'moved' if self.moved else 'did not move'} in the {self.watched_s:.0f} s it was watched,"
                    f" and it is free after {TTL_S:.0f} s without one.",
                    remedy="Let it finish or stop it; `magi-ray resume RUN --take-over` takes its work away from it.",
                )
            self._system.sleep(WATCH_INTERVAL_S)

    @property
    def watched_s(self) -> float:
        return self._system.clock() - (self._began or 0.0)

    @property
    def unchanged_s(self) -> float:
        return self._system.clock() - self._changed


def _serialise(record: LeaseRecord) -> bytes:
    return canonical_json(record.model_dump())


def _parse(data: bytes) -> LeaseRecord | None:
    """None for bytes that are no record."""
    try:
        body = json_object(data)
        require_readable("A lease", body["version"], FORMAT_VERSION)
        return LeaseRecord.model_validate(body)
    except (ObjectDamaged, KeyError, TypeError, ValidationError):
        return None
