"""Trying again: over a store that fails at a seeded generator's will (``faulty.py``)."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from contract import StoreContract
from faulty import FaultyStore
from wrapping import StoreWrapper, T

from magi_ray.errors import ObjectMissing, StoreDenied, StoreUnavailable
from magi_ray.storage.local import LocalStore
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.retrying import FIRST_PAUSE_S, LONGEST_PAUSE_S, RetryingStore
from magi_ray.storage.store import Store


class Clock:
    """Goes on only while somebody sleeps."""

    def __init__(self) -> None:
        self.now_s, self.pauses = 0.0, []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, pause_s: float) -> None:
        self.pauses.append(pause_s)
        self.now_s += pause_s


def patient(inner: Store, clock: Clock | None = None) -> RetryingStore:
    clock = clock or Clock()
    return RetryingStore(inner, clock=clock, sleep=clock.sleep, jitter=lambda longest_s: longest_s / 2)


def restless(inner: Store, **chances: float) -> RetryingStore:
    return RetryingStore(FaultyStore(inner, Random(11), **chances), jitter=lambda longest_s: 0.0)


class TestRetryingStore(StoreContract):
    """Calls fail or lose their answer four times in ten, and the contract holds."""

    @pytest.fixture
    def inner(self) -> Store:
        return MemoryStore()

    @pytest.fixture
    def store(self, inner: Store) -> Iterator[RetryingStore]:
        store = restless(inner, failed=0.2, lost=0.2)
        yield store
        assert store.inner.calls < 50 or min(store.inner.struck["failed"], store.inner.struck["lost"]) > 0

    def test_racing_swappers_lose_no_increment(self, inner: Store) -> None:
        # No answer is lost here: a swap that landed unheard and was swapped away at once counts as refused, so its
        # writer would count twice.
        super().test_racing_swappers_lose_no_increment(restless(inner, failed=0.4))


class TestRetryingStoreOfALocalStore(TestRetryingStore):
    @pytest.fixture
    def inner(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "store")


class Scripted(StoreWrapper):
    """Fails as told: each call takes the next word of ``script``; when it is used up all goes well.

    "down": nothing happens. "lost": it happens and the answer is lost. "denied". A callable is called with the store
    behind, then "down".
    """

    def __init__(self, *script: str | Callable[[Store], object]) -> None:
        super().__init__(MemoryStore())
        self.script = list(script)

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
        word = self.script.pop(0) if self.script else "well"
        if word == "denied":
            raise StoreDenied("no permission")
        if word == "well":
            return call()
        if word == "lost":
            call()
        if callable(word):
            word(self.inner)
        raise StoreUnavailable("a/key: 503 SlowDown", remedy="wait")


def by_another(data: bytes = b"theirs") -> Callable[[Store], object]:
    return lambda store: store.put("a/key", data)


def deleted(store: Store) -> None:
    store.delete("a/key")


@pytest.mark.parametrize(
    ("script", "created"),
    [
        (["lost"], True),
        (["down", "down"], True),
        (["lost", "down", "lost"], True),
        ([by_another()], False),
        (["down", by_another()], False),
        (["lost", "well", "down", "down"], True),
        ([by_another(), "well", "down"], False),
    ],
    ids=["lost", "down", "lost and down", "theirs", "down, then theirs", "ours, unreadable", "theirs, unreadable"],
)
def test_a_lost_answer_to_a_creation_is_settled_by_what_the_object_holds(script: list, created: bool) -> None:
    store = Scripted(*script)
    assert patient(store).put_if_absent("a/key", b"ours") is created
    assert store.script == []
    assert store.inner.get("a/key") == (b"ours" if created else b"theirs")


def test_a_creation_that_was_lost_and_deleted_meanwhile_is_made_again() -> None:
    store = Scripted("lost", "well", deleted)
    assert patient(store).put_if_absent("a/key", b"ours")
    assert store.inner.get("a/key") == b"ours"


def test_what_is_certain_is_not_read_again() -> None:
    class WriteOnly(MemoryStore):
        def get(self, key: str) -> bytes:
            raise AssertionError("read")

    store = patient(WriteOnly())
    assert store.put_if_absent("a/key", b"ours")
    assert not store.put_if_absent("a/key", b"ours")


@pytest.mark.parametrize(
    ("script", "ours"),
    [
        (["lost"], True),
        (["down", "down"], True),
        (["lost", "well", "down", "down"], True),
        ([by_another()], False),
        (["lost", by_another()], False),
        (["lost", deleted], False),
        ([deleted], False),
    ],
    ids=["lost", "down", "ours, unreadable", "theirs", "ours, then theirs", "ours, then deleted", "deleted"],
)
def test_a_lost_answer_to_a_swap_is_settled_by_what_the_object_holds(script: list, ours: bool) -> None:
    store = Scripted()
    store.put("a/key", b"before")
    _, version = store.get_versioned("a/key")
    store.script = list(script)
    swapped = patient(store).swap("a/key", b"ours", version)
    assert store.script == []
    if ours:
        assert store.get_versioned("a/key") == (b"ours", swapped)
    else:
        assert swapped is None


def test_it_waits_longer_and_longer_until_its_patience_ends_and_says_how_long_it_tried() -> None:
    clock = Clock()
    store = patient(Scripted(*["down"] * 1000), clock)
    with pytest.raises(StoreUnavailable) as caught:
        store.put("a/key", b"x")
    assert clock.pauses[:3] == [FIRST_PAUSE_S / 2, FIRST_PAUSE_S, FIRST_PAUSE_S * 2]
    assert max(clock.pauses) == LONGEST_PAUSE_S / 2
    assert clock.now_s == pytest.approx(120)
    tried = len(clock.pauses) + 1
    assert caught.value.message == (
        f"a/key: 503 SlowDown. It was tried {tried} times in {clock.now_s:.0f} s, and the patience is 120 s."
    )
    assert caught.value.remedy == "wait"


def test_the_pauses_of_two_stores_differ() -> None:
    def pauses() -> list[float]:
        clock = Clock()
        RetryingStore(Scripted(*["down"] * 5), clock=clock, sleep=clock.sleep).put("a/key", b"x")
        return clock.pauses

    first, second = pauses(), pauses()
    assert first != second
    assert all(0 <= pause <= FIRST_PAUSE_S * 2**n for n, pause in enumerate(first))


def test_other_errors_pass_straight_through() -> None:
    clock = Clock()
    with pytest.raises(StoreDenied):
        patient(Scripted("denied"), clock).put("a/key", b"x")
    with pytest.raises(ObjectMissing):
        patient(MemoryStore(), clock).get("a/key")
    with pytest.raises(ValueError, match="is not a key"):
        patient(MemoryStore(), clock).get("..")
    assert clock.pauses == []


def test_a_listing_that_breaks_goes_on_behind_the_last_key_it_gave() -> None:
    inner = MemoryStore()
    keys = [f"a/{n:03d}" for n in range(200)]
    for key in keys:
        inner.put(key, b"")
    faulty = FaultyStore(inner, Random(3), failed=0.7)
    assert list(patient(faulty).list("a/")) == keys
    assert [entry.key for entry in patient(faulty).entries("a/", after="a/100")] == keys[101:]
    assert faulty.struck["failed"] >= 3


def test_a_long_listing_has_the_whole_patience_wherever_it_breaks() -> None:
    clock = Clock()

    class Flaky(MemoryStore):
        """Fails after every key, so a listing of 100 keys needs 100 tries."""

        def list(self, prefix: str, after: str = "") -> Iterator[str]:
            yield next(iter(super().list(prefix, after)))
            raise StoreUnavailable("503")

    store = Flaky()
    for n in range(100):
        store.put(f"{n:02d}", b"")
    listing = patient(store, clock).list("")
    for n in range(100):
        assert next(listing) == f"{n:02d}"
        clock.now_s += 1_000  # what its user does meanwhile is not its waiting


def test_it_pickles_with_real_clocks() -> None:
    store = RetryingStore(LocalStore(Path("/somewhere")))
    assert pickle.loads(pickle.dumps(store)) == store


def use(store: Store, random: Random, tmp_path: Path) -> list[object]:
    """Many calls, and what came of each."""
    seen: list[object] = []
    (tmp_path / "file").write_bytes(b"film")
    for n in range(400):
        key = f"a/{random.randrange(10)}"
        act: Callable[[], object] = random.choice(
            [
                lambda n=n, key=key: store.put(f"{key}/state-{n}", b"%d" % n),
                lambda n=n, key=key: store.put_if_absent(f"{key}/commit", b"%d" % n),
                lambda n=n, key=key: store.put_file(f"{key}/chunk-{n}", tmp_path / "file"),
                lambda n=n, key=key: store.swap(f"{key}/commit", b"%d" % n, store.get_versioned(f"{key}/commit")[1]),
                lambda key=key: store.get(f"{key}/commit"),
                lambda: [entry.key for entry in store.entries("a/")],
                lambda: [entry.key for entry in store.leftovers()],
                lambda n=n, key=key: store.delete(f"{key}/state-{n - 1}"),
            ]
        )
        try:
            seen.append(act())
        except (StoreUnavailable, ObjectMissing) as exc:
            seen.append(str(exc))
    return seen


FAULTS = {"failed": 0.1, "lost": 0.1, "late": 0.1, "slow": 0.1, "torn": 0.3}


def test_the_same_seed_gives_the_same_faults(tmp_path: Path) -> None:
    def trace(seed: int) -> tuple[list[object], dict[str, int]]:
        clock = Clock()
        store = FaultyStore(MemoryStore(clock), Random(seed), **FAULTS, sleep=clock.sleep, clock=clock)
        return use(store, Random(1), tmp_path), store.struck

    first, struck = trace(5)
    assert trace(5) == (first, struck)
    assert trace(6)[0] != first
    assert min(struck.values()) > 0, struck


def test_a_late_creation_lands_after_some_calls_unless_somebody_was_faster() -> None:
    for rival in (False, True):
        store = FaultyStore(MemoryStore(), Random(1), late=1.0, late_calls=3)
        with pytest.raises(StoreUnavailable):
            store.put_if_absent("a/commit", b"late")
        assert not MemoryStore.exists(store.inner, "a/commit")
        if rival:
            store.inner.put("a/commit", b"rival")
        for _ in range(3):
            store.exists("else")
        assert store.inner.get("a/commit") == (b"rival" if rival else b"late")


def test_only_the_puts_of_payloads_land_late() -> None:
    store = FaultyStore(MemoryStore(), Random(1), late=1.0)
    store.put("runs/r/progress.json", b"x")
    assert store.get("runs/r/progress.json") == b"x"
    with pytest.raises(StoreUnavailable):
        store.put("stages/k/state-w.safetensors", b"x")
    store.calm()
    assert store.get("stages/k/state-w.safetensors") == b"x"


def test_a_torn_upload_leaves_no_object_but_something_to_sweep(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"film")
    clock = Clock()
    store = FaultyStore(MemoryStore(), Random(1), torn=1.0, clock=clock)
    with pytest.raises(StoreUnavailable):
        store.put_file("a/film", tmp_path / "file")
    clock.now_s = 60
    [left] = store.leftovers()
    assert left.age_s == 60
    assert not store.exists("a/film")
    store.sweep(left.key)
    assert list(store.leftovers()) == []
