"""The probe finds out what a store does wrong: each fault here is one that a real server or file system has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from faulty import FaultyStore

from magi_ray.errors import StoreDenied, StoreError, StoreUnavailable
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.opening import open_store
from magi_ray.storage.probe import check_store, probe
from magi_ray.storage.retrying import RetryingStore
from magi_ray.storage.store import Store


class Swift(MemoryStore):
    """OpenStack Swift's s3api: looks whether the object exists, then writes it; has no If-Match on puts."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if self.exists(key):
            return False
        time.sleep(0.002)
        self.put(key, data)
        return True

    def swap(self, key: str, data: bytes, version: str) -> str | None:
        raise StoreError(f"s3://films failed on {key}: HTTP 501 NotImplemented from PutObject")


class IgnoresConditions(MemoryStore):
    """rclone serve s3, s3rver: If-None-Match and If-Match are not looked at."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True

    def swap(self, key: str, data: bytes, version: str) -> str | None:
        self.put(key, data)
        return self.get_versioned(key)[1]


class WritesWhatItRefuses(MemoryStore):
    def put_if_absent(self, key: str, data: bytes) -> bool:
        created = not self.exists(key)
        self.put(key, data)
        return created


class ListsLater(MemoryStore):
    """A store that is only eventually consistent."""

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        return (key for key in super().list(prefix, after) if not key.endswith("/ab"))


class ReadsOld(MemoryStore):
    def put(self, key: str, data: bytes) -> None:
        if not self.exists(key):
            super().put(key, data)


class KeepsAll(MemoryStore):
    def delete(self, key: str) -> None:
        pass


class ComparesQuotes(MemoryStore):
    """Gives one version and wants another."""

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        data, version = super().get_versioned(key)
        return data, f'"{version}"'


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Swift, {"Create once, in a race", "Swap", "Stale swap", "Swap of nothing"}),
        (IgnoresConditions, {"Create once", "Create once, in a race", "Stale swap", "Swap of nothing"}),
        (WritesWhatItRefuses, {"Create once", "Create once, in a race"}),
        (ListsLater, {"List after write"}),
        (ReadsOld, {"Read after write"}),
        (ComparesQuotes, {"Swap", "Stale swap"}),
    ],
)
def test_a_store_that_is_not_good_enough_is_refused_with_what_it_does_wrong(
    kind: Callable[[], Store], names: set[str]
) -> None:
    store = kind()
    findings = probe(RetryingStore(store))
    assert {finding.name for finding in findings if not finding.ok} == names
    assert all(finding.needed for finding in findings if not finding.ok)
    assert list(store.list("")) == []
    with pytest.raises(StoreError, match="cannot be used") as caught:
        check_store(store)
    assert all(f"\n{name}: " in caught.value.message for name in names)
    assert list(store.list("")) == []


def test_what_cannot_be_deleted_is_found() -> None:
    assert [finding.name for finding in probe(KeepsAll()) if not finding.ok] == ["Swap of nothing", "Delete"]


def test_swift_is_refused_with_its_two_reasons() -> None:
    with pytest.raises(StoreError) as caught:
        check_store(RetryingStore(Swift()))
    assert (
        "creation is not atomic: of several writers that race to create one object exactly one must win"
        in caught.value.message
    )
    assert "HTTP 501 NotImplemented" in caught.value.message
    assert "no lease can be held" in caught.value.message


def test_a_good_store_has_only_good_findings_and_keeps_nothing_of_them(tmp_path: Path) -> None:
    for store in (MemoryStore(), open_store(str(tmp_path / "store"))):
        findings = probe(store, thorough=True)
        assert len(findings) == 9
        assert all(finding.ok and finding.seen and finding.why for finding in findings)
        assert list(store.list("")) == []


def test_a_real_s3_server_passes_with_two_findings_more(s3_address: str) -> None:
    store = open_store(s3_address)
    findings = probe(store, thorough=True)
    assert [finding.name for finding in findings if not finding.ok] == []
    assert {"Damage on the way", "Large file"} <= {finding.name for finding in findings}
    assert list(store.list("")) == list(store.leftovers()) == []


def test_a_store_that_is_busy_now_and_then_passes() -> None:
    faulty = FaultyStore(MemoryStore(), Random(4), failed=0.1, lost=0.1)
    check_store(RetryingStore(faulty, jitter=lambda longest_s: 0.0))
    assert min(faulty.struck["failed"], faulty.struck["lost"]) > 0


def test_nobody_waits_two_minutes_for_a_store_that_is_gone() -> None:
    waited: list[float] = []
    gone = FaultyStore(MemoryStore(), Random(4), failed=1.0)
    store = RetryingStore(gone, sleep=waited.append, clock=lambda: sum(waited), jitter=lambda longest_s: longest_s)
    with pytest.raises(StoreUnavailable, match="patience is 10 s"):
        check_store(store)
    assert sum(waited) < 15


def test_a_denied_store_says_so_itself() -> None:
    class Closed(MemoryStore):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            raise StoreDenied("403", remedy="Allow s3:PutObject")

    for ask in (probe, check_store):
        with pytest.raises(StoreDenied, match="s3:PutObject"):
            ask(Closed())


def test_damage_that_is_accepted_is_told_but_does_not_refuse_the_store() -> None:
    class Careless(MemoryStore):
        def refuses_damage(self, key: str) -> bool:
            self.put(key, b"x")
            return False

    [finding] = [finding for finding in probe(Careless()) if not finding.ok]
    assert (finding.name, finding.needed) == ("Damage on the way", False)
    check_store(Careless())
