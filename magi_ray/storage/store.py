"""The store: where everything durable lives. Bytes under keys (``keys.py``); no tensors, no Ray."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One object of a listing. ``size``: bytes.  ``age_s``: seconds since it was written, by the store's own clock, so
    that no two machines' clocks are compared."""

    key: str
    size: int
    age_s: float


def open_at(path: Path, start: int) -> BinaryIO:
    """The file, to be written from byte ``start`` on; what came after is gone."""
    file = path.open("r+b" if start else "wb")
    file.seek(start)
    file.truncate()
    return file


class Store(Protocol):
    """What every store does. All of them pass ``tests/storage/contract.py``.

    An object is visible whole or not at all, and survives this process once the write has returned. Failures of the
    store raise StoreError; keys that ``check_key`` refuses raise ValueError. After StoreUnavailable a write may have
    landed all the same, or may land later.
    """

    @property
    def uri(self) -> str:
        """Its address, as a user would write it."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Writes ``data``, and replaces what was there."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Writes ``data`` unless the key exists. True if this call created it; of racing callers exactly one does."""
        ...

    def put_file(self, key: str, path: Path) -> None:
        """``put`` of a file's content, in constant memory."""
        ...

    def get(self, key: str) -> bytes:
        """Raises ObjectMissing."""
        ...

    def get_to_file(self, key: str, path: Path, *, start: int = 0) -> None:
        """``get`` into a file, in constant memory. Raises ObjectMissing; a failure may leave the file half written.

        start: the first byte to read, less than the object has; the file must hold those before it, and keeps them.
        """
        ...

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """``get``, and the version that ``swap`` wants. Raises ObjectMissing."""
        ...

    def swap(self, key: str, data: bytes, version: str) -> str | None:
        """Compare-and-swap: writes ``data`` if the object still has ``version``. The new version, None if it has not.

        Of racing callers with one version exactly one succeeds. An object that is swapped is never ``put``, and its
        data holds an id of the write, so that no two writes are alike.
        """
        ...

    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        """The keys that begin with ``prefix`` ('' for all) and come after ``after``, sorted as strings."""
        ...

    def entries(self, prefix: str, after: str = "") -> Iterator[Entry]:
        """``list`` with sizes and ages."""
        ...

    def delete(self, key: str) -> None:
        """Removes the object, if there is one."""
        ...

    def leftovers(self) -> Iterator[Entry]:
        """What killed writers left behind under no key; ``Entry.key`` is a name for ``sweep`` only."""
        ...

    def sweep(self, name: str) -> None:
        """Removes one of ``leftovers``, if it is still there."""
        ...


def delete_command(store: Store, key: str) -> str:
    """What to type to delete one object by hand."""
    return _by_hand(("rm",), ("aws", "s3", "rm"), _address(store, key))


def move_command(store: Store, folder: str, target: str = "") -> str:
    """What to type to move everything below ``folder`` to the folder ``target``; '': out of the store."""
    here = folder.rstrip("/").rpartition("/")[2]
    there = _address(store, target) if target else f"./{here}"
    return _by_hand(("mv",), ("aws", "s3", "mv", "--recursive"), _address(store, folder), there)


def _address(store: Store, key: str) -> str:
    return f"{store.uri.rstrip('/')}/{key}".rstrip("/")


def _by_hand(local: Sequence[str], bucket: Sequence[str], *addresses: str) -> str:
    return shlex.join([*(bucket if addresses[0].startswith("s3://") else local), *addresses])
