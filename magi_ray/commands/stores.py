"""From what ``--store`` says to a store that can be read or written."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from magi_ray.errors import InputError

if TYPE_CHECKING:
    from magi_ray.storage.store import Store

DEFAULT_STORE = "magi-ray-store"
# How long a command tries to reach a bucket: somebody waits for its answer, and may type it again.
COMMAND_PATIENCE_S = 15.0


def store_to_read(uri: str, *, patience_s: float | None = COMMAND_PATIENCE_S) -> Store:
    """The store at ``uri``, which must exist. Nothing is written.

    patience_s: how long a bucket out of reach is tried again; None: as long as a driver does.
    """
    from magi_ray.storage.local import LocalStore
    from magi_ray.storage.opening import open_store

    store = open_store(uri) if patience_s is None else open_store(uri, patience_s=patience_s)
    if isinstance(store, LocalStore):
        _require_folder(store.root)
        if not store.root.exists():
            raise InputError(
                f"There is no store at {store.root}.",
                remedy="Name the folder that the run was submitted to with --store, or change to where it was typed.",
                next_command="magi-ray list" if uri != DEFAULT_STORE and Path(DEFAULT_STORE).is_dir() else "",
            )
        if not os.access(store.root, os.R_OK | os.X_OK):
            raise InputError(f"The store at {store.root} cannot be read.", remedy="Allow this user to read it.")
    return store


def store_to_write(uri: str) -> Store:
    """The store at ``uri``, as far as one can tell without writing; ``check_store`` does the rest."""
    from magi_ray.storage.local import LocalStore
    from magi_ray.storage.opening import open_store

    store = open_store(uri)
    if isinstance(store, LocalStore):
        _require_folder(store.root)
        above = next(folder for folder in (store.root, *store.root.parents) if folder.exists())
        if not os.access(above, os.W_OK | os.X_OK):
            raise InputError(
                f"The store at {store.root} cannot be written: this user may not write to {above}.",
                remedy="Choose another folder with --store.",
            )
    return store


def store_flag(uri: str) -> str:
    """The end of a command that uses the store at ``uri``: nothing for the default store."""
    return "" if uri == DEFAULT_STORE else f" --store {shlex.quote(uri)}"


def _require_folder(root: Path) -> None:
    for part in (root, *root.parents):
        if part.exists() and not part.is_dir():
            raise InputError(
                f"{root} cannot be a store: {part} is a file, not a folder.",
                remedy="Choose another folder with --store.",
            )
