"""The store: where everything durable lives. Bytes under keys (``keys.py``); no tensors, no Ray."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from magi_ray.errors import InputError, StoreError
from magi_ray.storage.local import LocalStore


class Store(Protocol):
    """What every store does. All of them pass ``tests/storage/contract.py``.

    An object is visible whole or not at all, and once a write returned it survives the death of this process.
    Failures of the store itself raise StoreError; keys that ``check_key`` refuses raise ValueError.
    """

    @property
    def uri(self) -> str:
        """Where it is, in the words the user would give."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Writes ``data``, in place of what was there."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Writes ``data`` unless the key exists. True when this call created it; of racing callers exactly one does."""
        ...

    def put_file(self, key: str, path: Path) -> None:
        """``put`` of a file's content, in constant memory."""
        ...

    def get(self, key: str) -> bytes:
        """Raises ObjectMissing."""
        ...

    def get_to_file(self, key: str, path: Path) -> None:
        """``get`` into a file, in constant memory. Raises ObjectMissing; a failure may leave the file half written."""
        ...

    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str) -> Iterator[str]:
        """Every key that begins with the string ``prefix`` ('' for all), in the order of the strings."""
        ...

    def delete(self, key: str) -> None:
        """Removes the object; a missing one is fine."""
        ...


def open_store(uri: str) -> Store:
    """The store at ``uri``: a path or ``file:///…``. Nothing is read or written yet; see ``check_store``.

    Raises InputError for any other kind of address.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator:
        path = Path(uri)
    elif scheme == "file":
        address = urlsplit(uri)
        if address.netloc not in ("", "localhost") or not address.path:
            raise InputError(
                f"{uri} is not a local folder.", remedy="Write file:/// with three slashes, or a plain path."
            )
        path = Path(unquote(address.path))
    elif scheme == "s3":
        raise InputError(
            f"{uri}: S3 stores come with the next release.",
            remedy="Until then give a folder that all machines mount, for example --store /mnt/shared/magi-ray-store.",
        )
    else:
        raise InputError(f"{uri}: stores of kind {scheme!r} are not known.", remedy="Give a folder or file:///….")
    if not uri:
        raise InputError(
            "The address of the store is empty.", remedy="Give a folder, for example --store ./magi-ray-store."
        )
    # Absolute, because workers have another working directory.
    return LocalStore(root=path.expanduser().absolute())


def check_store(store: Store) -> None:
    """Writes, reads, refuses to create twice, lists and deletes one small object: is this store good enough?

    Raises StoreError with a reason. Called before anything is computed.
    """
    key, data = f"probes/{uuid.uuid4().hex}", b"magi-ray"
    created = [store.put_if_absent(key, data), store.put_if_absent(key, data)]
    found, listed = store.get(key), list(store.list(key))
    store.delete(key)
    for expected, seen, rule in (
        ([True, False], created, "create an object exactly once"),
        (data, found, "return the bytes that were written"),
        ([key], listed, "list what was written"),
        (False, store.exists(key), "delete an object"),
    ):
        if seen != expected:
            raise StoreError(
                f"The store at {store.uri} does not {rule}: expected {expected!r}, found {seen!r}.",
                remedy="Renders could be lost here. Use another folder, on a file system with POSIX semantics.",
            )
