"""Leases and epochs under a clock that only moves when somebody sleeps."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from wrapping import StoreWrapper, T

from magi_ray.errors import StoreUnavailable, Superseded
from magi_ray.storage import keys
from magi_ray.storage.epochs import become_driver, superseded, take_epoch
from magi_ray.storage.leases import (
    BEAT_S,
    TTL_S,
    Lease,
    LeaseRecord,
    acquire,
    holding,
    read_lease,
    renewing,
)
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.store import Store
from magi_ray.system import Owner, System, gone

KEY = keys.row_lease("run", "row")


def owner(name: str, host: str = "elsewhere") -> Owner:
    return Owner(name=name, host=host, boot="another boot", pid=1, started=1)


ALICE, BOB = owner("alice"), owner("bob")


class Clock(System):
    """``during``: what happens while somebody sleeps, once a sleep.  ``dead``: who surely is gone."""

    def __init__(self, during: Callable[[], object] = lambda: None) -> None:
        self.now = 1000.0
        self.during = during
        self.dead: Owner | None = None

    def clock(self) -> float:
        return self.now

    def gone(self, owner: Owner) -> bool:
        return owner == self.dead

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.during()


class Tripwire(StoreWrapper):
    """``before[verb]`` runs once, before the next call of that verb; ``lose[verb]``: what of it gets lost, once."""

    def __init__(self) -> None:
        super().__init__(MemoryStore())
        self.before: dict[str, Callable[[], object]] = {}
        self.lose: dict[str, str] = {}

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
        if act := self.before.pop(verb, None):
            act()
        match self.lose.pop(verb, None):
            case "request":
                raise StoreUnavailable("timed out")
            case "answer":
                call()
                raise StoreUnavailable("timed out")
        return call()


@pytest.fixture
def store() -> Tripwire:
    return Tripwire()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def take(store: Store, who: Owner, clock: Clock, **options: Any) -> Lease:
    return acquire(store, KEY, who, **({"epoch": 1, "system": clock} | options))


def holder(store: Store) -> Owner | None:
    record = read_lease(store, KEY)
    assert record is not None
    return record.holder


# Taking ---------------------------------------------------------------------------------------------------------


def test_a_lease_that_nobody_holds_is_taken_at_once(store: Tripwire, clock: Clock) -> None:
    assert read_lease(store, KEY) is None
    take(store, ALICE, clock).release()
    assert holder(store) is None
    lease = take(store, BOB, clock)
    assert lease.valid
    assert (holder(store), clock.now) == (BOB, 1000.0)


@pytest.mark.parametrize("released", [False, True])
def test_of_two_racing_takers_one_gets_it_and_the_other_is_told_who(
    store: Tripwire, clock: Clock, released: bool
) -> None:
    if released:
        take(store, owner("earlier"), clock).release()
    bobs: list[Lease] = []
    store.before["swap" if released else "put_if_absent"] = lambda: bobs.append(take(store, BOB, clock))
    with pytest.raises(Superseded, match=r"held by bob on elsewhere \(process 1\): .* the 0 s it was watched"):
        take(store, ALICE, clock, within_s=0)
    bobs[0].beat()
    assert holder(store) == BOB


def test_an_unchanged_beat_is_taken_over_after_its_time_and_not_before(store: Tripwire, clock: Clock) -> None:
    dead = take(store, ALICE, clock)
    lease = take(store, BOB, clock)
    assert 1000.0 + TTL_S <= clock.now < 1000.0 + TTL_S + BEAT_S
    assert (lease.valid, dead.valid) == (True, False)


def test_a_beating_holder_is_left_alone_for_as_long_as_it_beats(store: Tripwire, clock: Clock) -> None:
    held = take(store, ALICE, clock)
    beat_at = [clock.now]

    def beat() -> None:
        if clock.now - beat_at[0] >= TTL_S - 1:  # slow, but in time
            held.beat()
            beat_at[0] = clock.now

    clock.during = beat
    with pytest.raises(Superseded, match="its beat moved in the 600 s"):
        take(store, BOB, clock, within_s=600)
    held.check()


def test_a_holder_that_dies_while_it_is_watched_is_outlived(store: Tripwire, clock: Clock) -> None:
    held = take(store, ALICE, clock)

    def beat_for_a_minute() -> None:
        if clock.now < 1060:
            held.beat()

    clock.during = beat_for_a_minute
    take(store, BOB, clock, within_s=600)
    assert 1059 + TTL_S <= clock.now <= 1061 + TTL_S


def test_wall_clocks_that_are_wrong_by_hours_change_nothing(
    store: Tripwire, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = take(store, ALICE, clock)
    clock.during = held.beat
    hours = iter(range(0, 1_000_000, 7))
    monkeypatch.setattr(time, "time", lambda: next(hours) * 3600.0 * (-1) ** next(hours))
    with pytest.raises(Superseded):
        take(store, BOB, clock, within_s=100)
    # Nor do monotonic clocks of different machines have anything in common.
    other = Clock(held.beat)
    other.now = -5e9
    with pytest.raises(Superseded):
        take(store, BOB, other, within_s=100)
    assert held.valid


def test_a_surely_dead_holder_is_not_waited_for(store: Tripwire, clock: Clock) -> None:
    take(store, ALICE, clock)
    clock.dead = ALICE
    take(store, BOB, clock, within_s=0)
    assert clock.now == 1000.0


def test_force_takes_a_lease_from_a_living_holder_which_is_told(store: Tripwire, clock: Clock) -> None:
    held = take(store, ALICE, clock)
    store.before["swap"] = held.beat  # even if it beats in that very moment
    take(store, BOB, clock, force=True, within_s=0)
    with pytest.raises(Superseded, match="taken by bob"):
        held.beat()


@pytest.mark.parametrize("released", [False, True])
def test_an_older_driver_gets_nothing_back_by_waiting_or_force(store: Tripwire, clock: Clock, released: bool) -> None:
    held = take(store, ALICE, clock, epoch=7)
    if released:
        held.release()
    with pytest.raises(Superseded, match=r"driver 7 .* bob works for driver 6"):
        take(store, BOB, clock, epoch=6, force=True)
    assert clock.now == 1000.0


def test_one_that_lost_sight_of_its_lease_gets_it_back(store: Tripwire, clock: Clock) -> None:
    store.lose["put_if_absent"] = "answer"
    with pytest.raises(StoreUnavailable):
        take(store, ALICE, clock)
    take(store, ALICE, clock, within_s=0).check()


def test_a_damaged_lease_is_nobodys_after_its_time(store: Tripwire, clock: Clock) -> None:
    store.put(KEY, b"\x00")
    with pytest.raises(Superseded, match="damaged"):
        take(store, BOB, clock, within_s=0)
    take(store, BOB, clock)
    assert clock.now >= 1000.0 + TTL_S


# Holding --------------------------------------------------------------------------------------------------------


def test_a_stalled_holder_finds_out_by_its_own_clock_and_from_the_store(store: Tripwire, clock: Clock) -> None:
    stalled = take(store, ALICE, clock)
    stalled.check()
    take(store, BOB, clock)
    with pytest.raises(Superseded, match=f"{TTL_S:.0f} s ago"):
        stalled.check()
    with pytest.raises(Superseded, match="taken by bob"):
        stalled.beat()
    with pytest.raises(Superseded, match="taken by bob"):
        stalled.check()
    stalled.release()
    assert holder(store) == BOB


def test_a_stalled_holder_whom_nobody_followed_goes_on(store: Tripwire, clock: Clock) -> None:
    stalled = take(store, ALICE, clock)
    clock.now += 10 * TTL_S
    stalled.beat()
    stalled.check()


def test_a_lease_lives_through_a_short_outage_and_not_through_a_long_one(store: Tripwire, clock: Clock) -> None:
    lease = take(store, ALICE, clock)
    for _ in range(3):
        clock.now += BEAT_S
        store.lose["swap"] = "request"
        with pytest.raises(StoreUnavailable):
            lease.beat()
        lease.check()
    clock.now += BEAT_S
    with pytest.raises(Superseded):
        lease.check()


def test_the_time_of_a_lease_counts_from_when_the_beat_began(store: Tripwire, clock: Clock) -> None:
    lease = take(store, ALICE, clock)
    store.before["swap"] = lambda: clock.sleep(TTL_S)
    lease.beat()
    assert not lease.valid


@pytest.mark.parametrize("what", ["request", "answer"])
def test_a_beat_whose_answer_was_lost_is_known_for_our_own(store: Tripwire, clock: Clock, what: str) -> None:
    lease = take(store, ALICE, clock)
    store.lose["swap"] = what
    with pytest.raises(StoreUnavailable):
        lease.beat()
    clock.now += TTL_S - 1
    lease.beat()
    clock.now += TTL_S - 1
    lease.check()
    lease.release()
    assert holder(store) is None


def test_a_release_after_a_beat_that_landed_unseen_lets_go(store: Tripwire, clock: Clock) -> None:
    lease = take(store, ALICE, clock)
    store.lose["swap"] = "answer"
    with pytest.raises(StoreUnavailable):
        lease.beat()
    lease.release()
    assert holder(store) is None


def test_a_released_lease_is_not_valid_and_cannot_beat(store: Tripwire, clock: Clock) -> None:
    lease = take(store, ALICE, clock)
    store.lose["swap"] = "request"
    lease.release()  # does not raise: where the store is gone the lease ends by itself
    assert not lease.valid
    for act in (lease.check, lease.beat):
        with pytest.raises(Superseded, match="released"):
            act()


def test_a_lease_is_not_valid_any_more_while_it_is_being_released(store: Tripwire, clock: Clock) -> None:
    # Found by the simulation: the release had landed and another held the lease, before the answer came.
    lease = take(store, ALICE, clock)
    seen: list[bool] = []
    store.before["swap"] = lambda: seen.append(lease.valid)
    lease.release()
    assert seen == [False]


def test_a_deleted_lease_is_lost(store: Tripwire, clock: Clock) -> None:
    lease = take(store, ALICE, clock)
    store.delete(KEY)
    with pytest.raises(Superseded, match="another"):
        lease.beat()


def test_a_thread_keeps_the_lease_through_an_outage_and_releases_it(store: Tripwire) -> None:
    lease = acquire(store, KEY, ALICE, epoch=1)
    beaten = threading.Event()

    def count() -> None:
        record = read_lease(store, KEY)
        if record is not None and record.beat >= 3:
            beaten.set()
        else:
            store.before["swap"] = count

    store.lose["swap"] = "answer"
    store.before["swap"] = count
    with renewing(lease, every_s=0.002):
        assert beaten.wait(timeout=30)
        lease.check()
    assert holder(store) is None
    assert "magi-ray-lease" not in {thread.name for thread in threading.enumerate()}


def test_a_thread_that_keeps_a_lost_lease_ends_and_leaves_it_alone(store: Tripwire) -> None:
    lease = acquire(store, KEY, ALICE, epoch=1)
    acquire(store, KEY, BOB, epoch=1, force=True)
    with renewing(lease, every_s=0.002):
        deadline = time.monotonic() + 30
        while lease.valid and time.monotonic() < deadline:
            time.sleep(0.002)
        with pytest.raises(Superseded, match="taken by bob"):
            lease.check()
    assert holder(store) == BOB


# Looking --------------------------------------------------------------------------------------------------------


def look(store: Store, clock: Clock, watch_s: float) -> tuple[Owner, bool | None] | None:
    found = holding(store, KEY, watch_s=watch_s, system=clock)
    return found and (found.owner, found.beating)


def test_one_look_tells_who_holds_a_lease_and_a_longer_one_whether_it_lives(store: Tripwire, clock: Clock) -> None:
    assert look(store, clock, TTL_S) is None
    lease = take(store, ALICE, clock)
    assert look(store, clock, 0) == (ALICE, None)
    assert look(store, clock, 3) == (ALICE, None)
    assert look(store, clock, TTL_S) == (ALICE, False)
    clock.during = lease.beat
    before = clock.now
    assert look(store, clock, TTL_S) == (ALICE, True)
    assert clock.now - before < BEAT_S
    lease.release()
    assert look(store, clock, TTL_S) is None


def test_a_dead_process_of_this_machine_holds_nothing(store: Tripwire, clock: Clock) -> None:
    take(store, ALICE, clock)
    clock.dead = ALICE
    assert holding(store, KEY, system=clock) is None


def test_a_record_is_read_as_it_was_written(store: Tripwire, clock: Clock) -> None:
    take(store, ALICE, clock, epoch=3).beat()
    record = read_lease(store, KEY)
    assert isinstance(record, LeaseRecord)
    assert (record.version, record.holder, record.epoch, record.beat) == (1, ALICE, 3, 1)


# Processes ------------------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not tell: never gone")


@linux
def test_a_process_is_gone_once_it_is_dead_and_also_as_a_zombie() -> None:
    child = subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()"], stdin=-1, stdout=-1)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        # "pid (name) state …", where the name may hold anything; the start is field 22.
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        there = Owner.here("x").model_copy(update={"pid": child.pid, "started": int(fields[19])})
        assert not gone(there)
    finally:
        child.kill()
    deadline = time.monotonic() + 30
    while not gone(there) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert os.path.exists(f"/proc/{child.pid}")  # noqa: PTH110 - nobody waited for it yet: a zombie
    assert gone(there)
    child.communicate()
    assert gone(there)


@linux
def test_a_pid_that_was_used_again_is_another_process() -> None:
    here = Owner.here("x")
    assert here.pid == os.getpid()
    assert not gone(here)
    assert gone(here.model_copy(update={"started": here.started - 1000}))


@pytest.mark.parametrize("changed", [{"host": "another"}, {"boot": "another"}, {"boot": ""}])
def test_processes_of_other_machines_and_boots_are_not_ours_to_judge(changed: dict[str, str]) -> None:
    assert not gone(Owner.here("x").model_copy(update={"pid": 2**22 + 1, "started": 1} | changed))


# Epochs ---------------------------------------------------------------------------------------------------------


def test_every_driver_takes_the_next_number_and_supersedes_those_before(store: Tripwire) -> None:
    assert take_epoch(store, "run", ALICE) == 1
    assert not superseded(store, "run", 1)
    assert take_epoch(store, "run", BOB) == 2
    assert superseded(store, "run", 1)
    assert not superseded(store, "run", 2)
    assert take_epoch(store, "another", ALICE) == 1


def test_racing_drivers_get_numbers_without_a_gap(store: Tripwire) -> None:
    numbers: list[int] = []
    store.before["put_if_absent"] = lambda: numbers.append(take_epoch(store, "run", BOB))
    numbers.append(take_epoch(store, "run", ALICE))
    assert numbers == [1, 2]


def drive(store: Store, who: Owner, clock: Clock, **options: Any) -> Lease:
    return become_driver(store, "run", who, system=clock, **options)


def test_a_second_driver_waits_for_the_first_and_leaves_it_alone(store: Tripwire, clock: Clock) -> None:
    first = drive(store, ALICE, clock)
    clock.during = first.beat
    with pytest.raises(Superseded, match="held by alice"):
        drive(store, BOB, clock, within_s=60)
    assert not superseded(store, "run", first.epoch)
    clock.during = lambda: None
    second = drive(store, BOB, clock)
    assert second.epoch == first.epoch + 1
    assert superseded(store, "run", first.epoch)


def test_taking_over_ends_the_driver_that_was(store: Tripwire, clock: Clock) -> None:
    first = drive(store, ALICE, clock)
    second = drive(store, BOB, clock, take_over=True)
    with pytest.raises(Superseded, match="taken by bob"):
        first.beat()
    assert (second.valid, clock.now) == (True, 1000.0)


@pytest.mark.parametrize("moment", ["put_if_absent", "swap"])
def test_of_drivers_that_take_over_at_once_exactly_the_highest_stays(
    store: Tripwire, clock: Clock, moment: str
) -> None:
    drive(store, owner("earlier"), clock).release()
    leases: list[Lease] = []
    store.before[moment] = lambda: leases.append(drive(store, BOB, clock, take_over=True))
    with contextlib.suppress(Superseded):
        leases.append(drive(store, ALICE, clock, take_over=True))
    for lease in leases:
        with contextlib.suppress(Superseded):
            lease.beat()
    [driver] = [lease for lease in leases if lease.valid]
    assert driver.epoch == 3
    assert not superseded(store, "run", 3)


def test_a_damaged_epoch_still_counts(store: Tripwire) -> None:
    take_epoch(store, "run", ALICE)
    store.put(keys.epoch("run", 1), b"{")
    assert take_epoch(store, "run", BOB) == 2
