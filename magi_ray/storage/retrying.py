"""A store that retries calls while the one behind it is busy or gone, for as long as its patience lasts.

Only StoreUnavailable is retried. After it nobody knows whether the write landed, so a later "no" of ``put_if_absent``
or ``swap`` may come from our own success. Reading the object settles it: exactly our bytes (they hold an id of the
write) are ours, others are not; while it cannot be read, the call is retried.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from magi_ray.errors import ObjectMissing, StoreUnavailable
from magi_ray.storage.store import Entry, Store

RUN_PATIENCE_S = 120.0  # an outage may last, and nobody waits
SHUTDOWN_PATIENCE_S = 5.0  # for a last write that only spares others a wait
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0

T = TypeVar("T")


def full_jitter(longest_s: float) -> float:
    """Uniform from 0 to ``longest_s``, from the system's randomness, so that machines do not retry in step."""
    return random.SystemRandom().uniform(0.0, longest_s)


def with_patience(store: Store, patience_s: float) -> Store:
    """``store`` with a patience of at most ``patience_s`` seconds."""
    if isinstance(store, RetryingStore):
        return replace(store, patience_s=min(store.patience_s, patience_s))
    return store


@dataclass(frozen=True)
class RetryingStore:
    """``inner`` with retries for ``patience_s`` seconds from a call's first try, or from the last key that a listing
    gave. Pauses are ``jitter(longest pause)``; the longest doubles from 0.2 to 10 s. A try under way when the patience
    ends is not cut short. Then the last error is raised, with how long and how often the call was tried.

    ``swap`` also gives None when it succeeded and somebody has swapped since: either way the version is not ours.
    """

    inner: Store
    patience_s: float = RUN_PATIENCE_S
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    jitter: Callable[[float], float] = full_jitter

    @property
    def uri(self) -> str:
        return self.inner.uri

    def put(self, key: str, data: bytes) -> None:
        self._retried(lambda: self.inner.put(key, data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        patience, in_doubt = _Patience(self), False
        while True:
            try:
                if self.inner.put_if_absent(key, data):
                    return True
                if not in_doubt:
                    return False
                return self.inner.get(key) == data
            except ObjectMissing:  # created and deleted meanwhile: the next try decides
                patience.wait(StoreUnavailable(f"{key} in {self.uri} exists, but cannot be read."))
            except StoreUnavailable as exc:
                in_doubt = True
                patience.wait(exc)

    def put_file(self, key: str, path: Path) -> None:
        self._retried(lambda: self.inner.put_file(key, path))

    def get(self, key: str) -> bytes:
        return self._retried(lambda: self.inner.get(key))

    def get_to_file(self, key: str, path: Path, *, start: int = 0) -> None:
        self._retried(lambda: self.inner.get_to_file(key, path, start=start))

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        return self._retried(lambda: self.inner.get_versioned(key))

    def swap(self, key: str, data: bytes, version: str) -> str | None:
        patience, in_doubt = _Patience(self), False
        while True:
            try:
                if (swapped := self.inner.swap(key, data, version)) is not None or not in_doubt:
                    return swapped
                found, found_version = self.inner.get_versioned(key)
                return found_version if found == data else None
            except ObjectMissing:
                return None
            except StoreUnavailable as exc:
                in_doubt = True
                patience.wait(exc)

    def exists(self, key: str) -> bool:
        return self._retried(lambda: self.inner.exists(key))

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        return self._resumed(lambda last: self.inner.list(prefix, last), lambda key: key, after)

    def entries(self, prefix: str, after: str = "") -> Iterator[Entry]:
        return self._resumed(lambda last: self.inner.entries(prefix, last), lambda entry: entry.key, after)

    def delete(self, key: str) -> None:
        self._retried(lambda: self.inner.delete(key))

    def leftovers(self) -> Iterator[Entry]:
        return iter(self._retried(lambda: [*self.inner.leftovers()]))

    def sweep(self, name: str) -> None:
        self._retried(lambda: self.inner.sweep(name))

    def _retried(self, call: Callable[[], T]) -> T:
        patience = _Patience(self)
        while True:
            try:
                return call()
            except StoreUnavailable as exc:
                patience.wait(exc)

    def _resumed(self, listing: Callable[[str], Iterator[T]], key_of: Callable[[T], str], last: str) -> Iterator[T]:
        """The listing, continued after the last key it gave whenever it fails."""
        patience = _Patience(self)
        while True:
            try:
                for found in listing(last):
                    yield found
                    last, patience = key_of(found), _Patience(self)
                return
            except StoreUnavailable as exc:
                patience.wait(exc)


class _Patience:
    """How long and how often one call has been tried."""

    def __init__(self, store: RetryingStore) -> None:
        self._store, self._began, self._tries = store, store.clock(), 0

    def wait(self, error: StoreUnavailable) -> None:
        """Pauses before the next try. Raises ``error`` when the patience is over."""
        store = self._store
        pause_s = store.jitter(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._tries, 10)))
        self._tries += 1
        tried_s = store.clock() - self._began
        if tried_s >= store.patience_s:
            raise StoreUnavailable(
                f"{error.message.rstrip('.')}. It was tried {self._tries} times in {tried_s:.0f} s, "
                f"and the patience is {store.patience_s:.0f} s.",
                remedy=error.remedy,
                next_command=error.next_command,
            ) from error
        store.sleep(min(pause_s, store.patience_s - tried_s))
