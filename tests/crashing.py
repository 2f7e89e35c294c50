"""A store as a process sees it that is killed at its n-th call to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from magi_ray.errors import StoreUnavailable
from magi_ray.storage.store import Entry, Store


class Death(BaseException):
    """Not an Exception: nothing may catch it and go on, as nothing catches SIGKILL."""


class CrashingStore:
    """Passes calls on to ``inner`` until the ``at``-th (from 0; None: never), which does or does not reach it.

    From then on this process is dead: whichever of its threads calls, nothing reaches the store any more.
    """

    def __init__(self, inner: Store, at: int | None = None, *, lands: bool = False) -> None:
        self._inner, self._at, self._lands = inner, at, lands
        self._lock = threading.Lock()
        self.calls: list[str] = []
        self.dead = False

    @property
    def uri(self) -> str:
        return self._inner.uri

    def put(self, key: str, data: bytes) -> None:
        self._call("put", key, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        created: bool = self._call("put_if_absent", key, data)
        return created

    def put_file(self, key: str, path: Path) -> None:
        self._call("put_file", key, path)

    def get(self, key: str) -> bytes:
        data: bytes = self._call("get", key)
        return data

    def get_to_file(self, key: str, path: Path) -> None:
        self._call("get_to_file", key, path)

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        found: tuple[bytes, str] = self._call("get_versioned", key)
        return found

    def swap(self, key: str, data: bytes, version: str) -> str | None:
        new: str | None = self._call("swap", key, data, version)
        return new

    def exists(self, key: str) -> bool:
        found: bool = self._call("exists", key)
        return found

    def list(self, prefix: str) -> Iterator[str]:
        found: Iterator[str] = self._call("list", prefix)
        return found

    def entries(self, prefix: str) -> Iterator[Entry]:
        found: Iterator[Entry] = self._call("entries", prefix)
        return found

    def delete(self, key: str) -> None:
        self._call("delete", key)

    def leftovers(self) -> Iterator[Entry]:
        found: Iterator[Entry] = self._call("leftovers")
        return found

    def sweep(self, name: str) -> None:
        self._call("sweep", name)

    def _call(self, verb: str, *arguments: Any) -> Any:
        with self._lock:
            dies = not self.dead and len(self.calls) == self._at
            if not self.dead:
                self.calls.append(f"{verb} {arguments[0] if arguments else ''}")
            self.dead = self.dead or dies
            if not self.dead or (dies and self._lands):
                answer = getattr(self._inner, verb)(*arguments)
            if not self.dead:
                return answer
        if threading.current_thread().name == "magi-ray-lease":
            raise StoreUnavailable("dead")  # it would try for ever, until the process has ended
        raise Death
