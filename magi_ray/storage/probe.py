"""What a store really does, found out by doing it."""

from __future__ import annotations

import uuid

from magi_ray.errors import StoreError
from magi_ray.storage.store import Store


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
