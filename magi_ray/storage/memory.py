"""A store in this process's memory, for tests and simulations."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

from magi_ray.errors import ObjectMissing
from magi_ray.storage.keys import check_key


class MemoryStore:
    """Thread-safe. Cannot be pickled: a copy in another process would not be the same store."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        return "memory:"

    def put(self, key: str, data: bytes) -> None:
        with self._lock:
            self._objects[check_key(key)] = bytes(data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._lock:
            if check_key(key) in self._objects:
                return False
            self._objects[key] = bytes(data)
            return True

    def put_file(self, key: str, path: Path) -> None:
        self.put(key, path.read_bytes())

    def get(self, key: str) -> bytes:
        with self._lock:
            if check_key(key) not in self._objects:
                raise ObjectMissing(f"There is no object {key} in {self.uri}")
            return self._objects[key]

    def get_to_file(self, key: str, path: Path) -> None:
        path.write_bytes(self.get(key))

    def exists(self, key: str) -> bool:
        with self._lock:
            return check_key(key) in self._objects

    def list(self, prefix: str) -> Iterator[str]:
        with self._lock:
            found = sorted(key for key in self._objects if key.startswith(prefix))
        return iter(found)

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(check_key(key), None)
