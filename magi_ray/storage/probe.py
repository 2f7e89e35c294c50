"""Tries out what a store really does. Many servers speak S3; not all keep the promises of ``Store``."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from magi_ray.errors import StoreDenied, StoreError, StoreUnavailable, StoreUnwritable, magi_ray_command
from magi_ray.storage import keys
from magi_ray.storage.records import new_write_id
from magi_ray.storage.retrying import RetryingStore, with_patience
from magi_ray.storage.store import Store
from magi_ray.system import temporary_folder

PROBE_PATIENCE_S = 10.0  # somebody waits for the answer
CLEAN_UP_PATIENCE_S = 1.0
# Writers in each race. A few writers start closer together, and large objects take longer: Swift let several win in 5
# to 9 of 10 races with 4 writers, in 4 of 10 with 16.
RACES = (4, 4, 4, 4, 4, 4, 16, 16)
RACE_REPEATS = 2048  # of a write id's 32 bytes
LARGE_BYTES = 9 * 2**20


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a store does or does not do. seen: what it did.  why: what goes wrong without it.  needed: the
    store is refused without it."""

    name: str
    ok: bool
    seen: str
    why: str
    needed: bool = True


def probe(store: Store, *, thorough: bool = False) -> list[Finding]:
    """Tries everything ``check_store`` needs, and what is good to have. thorough: a large file too (9 MiB up and down).

    Writes below ``probes/`` and deletes it again. Raises StoreError when nothing can be found out.
    """
    checks = _NEEDED + _GOOD_TO_HAVE + (_THOROUGH if thorough else ())
    return _findings(store, checks)


def check_store(store: Store) -> None:
    """Raises StoreError with the reasons if ``store`` lacks something needed. Makes some 80 small writes and deletes
    them again. Called before anything is computed."""
    faults = [finding for finding in _findings(store, _NEEDED) if not finding.ok]
    if faults:
        lines = [f"{fault.name}: {fault.seen} {fault.why}" for fault in faults]
        raise StoreError(
            "\n".join([f"The store at {store.uri} cannot be used.", *lines]),
            remedy="Use a folder with POSIX semantics, or a server with atomic conditional puts: AWS S3, Ceph RGW, …",
            next_command=magi_ray_command("doctor", "--store", store.uri),
        )


def _findings(store: Store, checks: tuple[_Check, ...]) -> list[Finding]:
    store = with_patience(store, PROBE_PATIENCE_S)
    folder = keys.probe(new_write_id())
    findings: list[Finding] = []
    try:
        for check in checks:
            try:
                fault = check.fault(store, folder)
            except (StoreDenied, StoreUnavailable, StoreUnwritable):
                raise
            except StoreError as exc:
                if not findings:
                    raise  # what the first writes meet is true of the store as a whole: no bucket, a full disk
                fault = exc.message
            if fault is not None:
                seen, needed = fault or check.good, check in _NEEDED
                findings.append(Finding(name=check.name, ok=not fault, seen=seen, why=check.why, needed=needed))
        return findings
    finally:
        with suppress(StoreError):  # gc deletes what stays
            store = with_patience(store, CLEAN_UP_PATIENCE_S)
            for key in store.list(folder):
                store.delete(key)


def _created_twice(store: Store, folder: str) -> str:
    key, mine, other = folder + "once", new_write_id().encode(), new_write_id().encode()
    if not store.put_if_absent(key, mine):
        return "an object that was not there could not be created."
    if store.put_if_absent(key, other):
        return "an object that was there was created a second time."
    return "" if store.get(key) == mine else "the refused second creation replaced the bytes all the same."


def _created_at_once(store: Store, folder: str) -> str:
    winners, altered = [], 0
    with ThreadPoolExecutor(max(RACES)) as pool:
        for race, racers in enumerate(RACES):
            key, barrier = f"{folder}race-{race}", threading.Barrier(racers)
            bids = [new_write_id().encode() * RACE_REPEATS for _ in range(racers)]

            def create(bid: bytes, key: str = key, barrier: threading.Barrier = barrier) -> bool:
                barrier.wait(timeout=60)
                return store.put_if_absent(key, bid)

            won = [bid for bid, created in zip(bids, list(pool.map(create, bids)), strict=True) if created]
            winners.append(len(won))
            altered += store.get(key) not in won
    if set(winners) != {1}:
        found = f"in {len(RACES)} races {', '.join(map(str, winners))} did."
        return (
            f"creation is not atomic: of several writers that race to create one object exactly one must win; {found}"
        )
    return f"{altered} of {len(RACES)} objects hold the bytes of a writer that was told it lost." if altered else ""


def _not_swapped(store: Store, folder: str) -> str:
    key, before, after = folder + "swap", new_write_id().encode(), new_write_id().encode()
    store.put_if_absent(key, before)
    if (version := store.swap(key, after, store.get_versioned(key)[1])) is None:
        return "a swap from the version just read was refused."
    found = store.get_versioned(key)
    return "" if found == (after, version) else f"after a swap to version {version} the object has {found[1]}."


def _swapped_from_an_old_version(store: Store, folder: str) -> str:
    key, before, after = folder + "stale", new_write_id().encode(), new_write_id().encode()
    store.put_if_absent(key, before)
    version = store.get_versioned(key)[1]
    store.swap(key, after, version)
    if store.swap(key, new_write_id().encode(), version) is not None:
        return "a swap from a version that somebody had replaced succeeded."
    return "" if store.get(key) == after else "the refused swap replaced the bytes all the same."


def _swapped_from_nothing(store: Store, folder: str) -> str:
    key = folder + "nothing"
    store.put_if_absent(key, new_write_id().encode())
    version = store.get_versioned(key)[1]
    store.delete(key)
    if store.swap(key, new_write_id().encode(), version) is not None or store.exists(key):
        return "a swap made an object that had been deleted."
    return ""


def _not_overwritten(store: Store, folder: str) -> str:
    for turn in range(3):
        data = new_write_id().encode() * (3 - turn)
        store.put(folder + "same", data)
        if store.get(folder + "same") != data:
            return "a read just after a write gave other bytes than those written."
    return ""


def _not_listed(store: Store, folder: str) -> str:
    written = [f"{folder}list/{name}" for name in ("a-b", "a.b", "a/b", "ab")]
    for key in reversed(written):
        store.put(key, b"")
    found = list(store.list(f"{folder}list/"))
    return "" if found == written else f"of {len(written)} objects just written the list gave {found}."


def _not_deleted(store: Store, folder: str) -> str:
    key = folder + "delete"
    store.put(key, b"x")
    store.delete(key)
    return "an object was still there after it was deleted." if store.exists(key) or [*store.list(key)] else ""


@runtime_checkable
class _ChecksPuts(Protocol):
    def refuses_damage(self, key: str) -> bool: ...


def _damage_kept(store: Store, folder: str) -> str | None:
    inner = store.inner if isinstance(store, RetryingStore) else store
    if not isinstance(inner, _ChecksPuts):
        return None
    return "" if inner.refuses_damage(folder + "damaged") else "a put with a wrong Content-MD5 was accepted."


def _large_file_lost(store: Store, folder: str) -> str:
    with temporary_folder() as folder_here:
        sent, got = folder_here / "sent", folder_here / "got"
        sent.write_bytes(new_write_id().encode() * (LARGE_BYTES // 32))
        store.put_file(folder + "large", sent)
        store.get_to_file(folder + "large", got)
        whole = sent.read_bytes() == got.read_bytes()
    left = Counter(entry.key.partition("?")[0] for entry in store.leftovers())
    if left[folder + "large"]:
        return "the parts of a large file that is complete are still listed as unfinished."
    return "" if whole else "a large file came back altered."


@dataclass(frozen=True)
class _Check:
    """``fault``: (store, folder) → what is wrong, '' if nothing is, None if the check does not apply to the store."""

    name: str
    good: str
    why: str
    fault: Callable[[Store, str], str | None]


_NEEDED = (
    _Check("Create once", "a second creation of one object is refused",
           "Without it a late worker replaces what was committed.", _created_twice),
    _Check("Create once, in a race", f"of {min(RACES)} to {max(RACES)} writers at once exactly one creates the object",
           "Without it several drivers become the driver of one run, and commits replace each other; OpenStack Swift's "
           "s3api is known for this.", _created_at_once),
    _Check("Swap", "an object is replaced when it is the version that was read",
           "Without it (S3: If-Match on a put) no lease can be held, and two groups render the same row.",
           _not_swapped),
    _Check("Stale swap", "a swap from a version that was replaced is refused",
           "Without it a worker whose lease was taken takes it back unnoticed.", _swapped_from_an_old_version),
    _Check("Swap of nothing", "an object that was deleted is not swapped back",
           "Without it a late worker brings back the lease of a run that was deleted.", _swapped_from_nothing),
    _Check("Read after write", "a read gives what was written last",
           "Without it a run goes on though it was cancelled, and resumes behind where it was.", _not_overwritten),
    _Check("List after write", "a list shows what was just written, in order",
           "Without it drivers do not see each other, and gc takes needed objects for unneeded ones.", _not_listed),
    _Check("Delete", "what was deleted is gone from reads and lists",
           "Without it gc frees nothing.", _not_deleted),
)  # fmt: skip
_GOOD_TO_HAVE = (
    _Check("Damage on the way", "a put whose bytes do not match their MD5 is refused",
           "Without it such damage is only found when a stage is read again, and the stage is rendered anew.",
           _damage_kept),
)  # fmt: skip
_THOROUGH = (
    _Check("Large file", f"{LARGE_BYTES >> 20} MiB go up in parts, come down unchanged and leave nothing",
           "Without it finished videos cannot be stored.", _large_file_lost),
)  # fmt: skip
