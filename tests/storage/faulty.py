"""A store that misbehaves as real ones do, and only as a generator tells it to: the same seed, the same faults."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from wrapping import StoreWrapper, T

from magi_ray.errors import StoreUnavailable
from magi_ray.storage.store import Entry, Store

WRITES = ("put", "put_if_absent", "swap", "delete", "sweep")
ANSWERS = ("409 ConditionalRequestConflict", "500 InternalError", "503 SlowDown", "no answer")


def is_payload(key: str) -> bool:
    """Whether the object's name holds the id of one attempt to write (keys.py), so that nobody else writes it."""
    return "-" in key.rpartition("/")[2]


class FaultyStore(StoreWrapper):
    """``inner`` with faults, each of which strikes a call with its probability:

    failed    nothing happens; StoreUnavailable (409, 5xx, no answer).  A listing breaks off somewhere.
    lost      it happens, but the answer is lost: StoreUnavailable.
    late      StoreUnavailable, and it happens after one to ``late_calls`` further calls: creations and swaps, which
              then may be refused, and the puts of keys for which ``late_put`` is true.
    slow      ``sleep(slow_s)`` first.
    torn      of put_file: StoreUnavailable, no object, and an unfinished upload among ``leftovers``.

    ``clock`` gives those their age. ``calm`` ends all faults, and lands what is still to come.
    """

    def __init__(
        self,
        inner: Store,
        random: Random,
        *,
        failed: float = 0.0,
        lost: float = 0.0,
        late: float = 0.0,
        slow: float = 0.0,
        torn: float = 0.0,
        late_calls: int = 20,
        late_put: Callable[[str], bool] = is_payload,
        slow_s: float = 1.0,
        sleep: Callable[[float], None] = lambda pause_s: None,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        super().__init__(inner)
        self.calls = 0
        self.struck: dict[str, int] = dict.fromkeys(("failed", "lost", "late", "slow", "torn"), 0)
        self._chances = {"failed": failed, "lost": lost, "late": late, "slow": slow, "torn": torn}
        self._random, self._sleep, self._clock = random, sleep, clock
        self._late_calls, self._late_put, self._slow_s = late_calls, late_put, slow_s
        self._coming: list[tuple[int, Callable[[], object]]] = []
        self._torn: dict[str, float] = {}
        self._lock = threading.RLock()  # a call and what lands with it are one

    def calm(self) -> None:
        with self._lock:
            self._chances = dict.fromkeys(self._chances, 0.0)
            self._land(everything=True)

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
        with self._lock:
            self._begin()
            if self._strikes("failed"):
                raise self._error(key)
            late = verb in ("put_if_absent", "swap") or (verb == "put" and self._late_put(key))
            if late and self._strikes("late"):
                self._coming.append((self.calls + self._random.randint(1, self._late_calls), call))
                raise self._error(key)
            result = call()
            if verb in WRITES and self._strikes("lost"):
                raise self._error(key)
            return result

    def around_listing(self, verb: str, prefix: str, find: Callable[[], list[T]]) -> Iterator[T]:
        with self._lock:
            self._begin()
            found = find()
            end = self._random.randint(0, len(found)) if self._strikes("failed") else None
        yield from found[:end]
        if end is not None:
            raise self._error(prefix)

    def put_file(self, key: str, path: Path) -> None:
        data = path.read_bytes()  # now, since a late one lands when the file is gone
        with self._lock:
            if self._strikes("torn"):
                self._torn[f"{key}?{self.calls}"] = self._clock()
                raise StoreUnavailable(f"{self.uri} failed on {key}: the upload broke off")
        self.put(key, data)

    def leftovers(self) -> Iterator[Entry]:
        torn = [Entry(key=name, size=0, age_s=self._clock() - at) for name, at in self._torn.items()]
        return self.around_listing("leftovers", "leftovers", lambda: [*self.inner.leftovers(), *torn])

    def sweep(self, name: str) -> None:
        def remove() -> None:
            if self._torn.pop(name, None) is None:
                self.inner.sweep(name)

        self.around("sweep", name, remove)

    def _begin(self) -> None:
        self.calls += 1
        self._land()
        if self._strikes("slow"):
            self._sleep(self._slow_s)

    def _land(self, *, everything: bool = False) -> None:
        due = [act for at, act in self._coming if everything or at <= self.calls]
        self._coming = [] if everything else [(at, act) for at, act in self._coming if at > self.calls]
        for act in due:
            act()

    def _strikes(self, fault: str) -> bool:
        # Drawn only where it can strike, so that a fault that is off takes nothing from the generator.
        hit = self._chances[fault] > 0 and self._random.random() < self._chances[fault]
        self.struck[fault] += hit
        return hit

    def _error(self, key: str) -> StoreUnavailable:
        return StoreUnavailable(f"{self.uri} failed on {key}: {self._random.choice(ANSWERS)}")
