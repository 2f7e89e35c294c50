"""A store in this process's memory: for ``magi_ray.load``, and for tests."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from magi_ray.errors import ObjectMissing
from magi_ray.storage.keys import check_key
from magi_ray.storage.store import Entry, open_at


class MemoryStore:
    """Thread-safe. Cannot be pickled: a copy in another process would not be the same store.

    clock: seconds, for the ages of objects.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._objects: dict[str, bytes] = {}
        self._written: dict[str, float] = {}
        self._clock = clock
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        return "memory:"

    def put(self, key: str, data: bytes) -> None:
        with self._lock:
            self._set(check_key(key), data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._lock:
            if check_key(key) in self._objects:
                return False
            self._set(key, data)
            return True

    def put_file(self, key: str, path: Path) -> None:
        self.put(key, path.read_bytes())

    def get(self, key: str) -> bytes:
        with self._lock:
            if check_key(key) not in self._objects:
                raise ObjectMissing(f"There is no object {key} in {self.uri}")
            return self._objects[key]

    def get_to_file(self, key: str, path: Path, *, start: int = 0) -> None:
        with open_at(path, start) as target:
            target.write(self.get(key)[start:])

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        data = self.get(key)
        return data, _version(data)

    def swap(self, key: str, data: bytes, version: str) -> str | None:
        with self._lock:
            if check_key(key) not in self._objects or _version(self._objects[key]) != version:
                return None
            self._set(key, data)
            return _version(data)

    def exists(self, key: str) -> bool:
        with self._lock:
            return check_key(key) in self._objects

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        return iter([entry.key for entry in self.entries(prefix, after)])

    def entries(self, prefix: str, after: str = "") -> Iterator[Entry]:
        with self._lock:
            now = self._clock()
            found = [
                Entry(key=key, size=len(data), age_s=now - self._written[key])
                for key, data in sorted(self._objects.items())
                if key.startswith(prefix) and key > after
            ]
        return iter(found)

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(check_key(key), None)
            self._written.pop(key, None)

    def leftovers(self) -> Iterator[Entry]:
        return iter(())

    def sweep(self, name: str) -> None:
        pass

    def _set(self, key: str, data: bytes) -> None:
        self._objects[key], self._written[key] = bytes(data), self._clock()


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
