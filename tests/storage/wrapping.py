"""A store that passes every call on, for tests to count, delay or break calls on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from magi_ray.storage.store import Entry, Store

T = TypeVar("T")


class StoreWrapper:
    """``inner``, of which every call goes through ``around``, and those that list through ``around_listing``."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
        """To override. ``call`` is ``inner``'s ``verb``; ``key``: its first argument, '' where it has none."""
        return call()

    def around_listing(self, verb: str, prefix: str, find: Callable[[], list[T]]) -> Iterator[T]:
        """``around`` of ``list``, ``entries`` and ``leftovers``: all of a listing is one call."""
        return iter(self.around(verb, prefix, find))

    @property
    def uri(self) -> str:
        return self.inner.uri

    def put(self, key: str, data: bytes) -> None:
        self.around("put", key, lambda: self.inner.put(key, data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self.around("put_if_absent", key, lambda: self.inner.put_if_absent(key, data))

    def put_file(self, key: str, path: Path) -> None:
        self.around("put_file", key, lambda: self.inner.put_file(key, path))

    def get(self, key: str) -> bytes:
        return self.around("get", key, lambda: self.inner.get(key))

    def get_to_file(self, key: str, path: Path, *, start: int = 0) -> None:
        self.around("get_to_file", key, lambda: self.inner.get_to_file(key, path, start=start))

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        return self.around("get_versioned", key, lambda: self.inner.get_versioned(key))

    def swap(self, key: str, data: bytes, version: str) -> str | None:
        return self.around("swap", key, lambda: self.inner.swap(key, data, version))

    def exists(self, key: str) -> bool:
        return self.around("exists", key, lambda: self.inner.exists(key))

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        return self.around_listing("list", prefix, lambda: [*self.inner.list(prefix, after)])

    def entries(self, prefix: str, after: str = "") -> Iterator[Entry]:
        return self.around_listing("entries", prefix, lambda: [*self.inner.entries(prefix, after)])

    def delete(self, key: str) -> None:
        self.around("delete", key, lambda: self.inner.delete(key))

    def leftovers(self) -> Iterator[Entry]:
        return self.around_listing("leftovers", "", lambda: [*self.inner.leftovers()])

    def sweep(self, name: str) -> None:
        self.around("sweep", name, lambda: self.inner.sweep(name))
