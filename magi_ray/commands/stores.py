"""The store and the run that a command names: ``--store URI`` and ``RUN``."""

from __future__ import annotations

import difflib
import os
import shlex
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from magi_ray.errors import InputError, RunNotFound
from magi_ray.storage import keys
from magi_ray.storage.local import LocalStore
from magi_ray.storage.opening import open_store
from magi_ray.storage.store import Store

if TYPE_CHECKING:
    from magi_ray.render.runs.record import Run

DEFAULT_STORE = "magi-ray-store"
# How long a command keeps trying to reach a bucket: somebody waits for it, and can type it again.
COMMAND_PATIENCE_S = 15.0


def store_to_read(uri: str, *, patience_s: float | None = COMMAND_PATIENCE_S) -> Store:
    """The store at ``uri``, which must exist. Nothing is written.

    patience_s: how long to keep trying to reach a bucket; None: as long as a driver does.
    """
    store = open_store(uri) if patience_s is None else open_store(uri, patience_s=patience_s)
    if isinstance(store, LocalStore):
        _require_folder(store.root)
        if not store.root.exists():
            raise InputError(
                f"There is no store at {store.root}.",
                remedy="Name the store with --store, or change to the folder that you submitted from.",
                next_command="magi-ray list" if uri != DEFAULT_STORE and Path(DEFAULT_STORE).is_dir() else "",
            )
        if not os.access(store.root, os.R_OK | os.X_OK):
            raise InputError(f"The store at {store.root} cannot be read.", remedy="Allow this user to read it.")
    return store


def store_to_write(uri: str) -> Store:
    """The store at ``uri``, checked as far as is possible without writing; ``check_store`` does the rest."""
    store = open_store(uri)
    if isinstance(store, LocalStore):
        _require_folder(store.root)
        above = next(folder for folder in (store.root, *store.root.parents) if folder.exists())
        if not os.access(above, os.W_OK | os.X_OK):
            read_only = os.statvfs(above).f_flag & os.ST_RDONLY
            why = f"{above} is mounted read-only" if read_only else f"this user may not write to {above}"
            remedy = "Mount it writable, or choose another folder with --store."
            raise InputError(
                f"The store at {store.root} cannot be written: {why}.",
                remedy=remedy if read_only else "Choose another folder with --store.",
            )
    return store


def free_bytes(store: Store) -> int | None:
    """What the disk of a local store has left; None for a bucket, and where it cannot be told."""
    if not isinstance(store, LocalStore):
        return None
    above = next(folder for folder in (store.root, *store.root.parents) if folder.exists())
    with suppress(OSError):
        return shutil.disk_usage(above).free
    return None


def _require_folder(root: Path) -> None:
    for part in (root, *root.parents):
        if part.exists() and not part.is_dir():
            raise InputError(
                f"{root} cannot be a store: {part} is a file, not a folder.",
                remedy="Choose another folder with --store.",
            )


def store_flag(uri: str) -> str:
    """The end of a command that uses the store at ``uri``: nothing for the default store."""
    return "" if uri == DEFAULT_STORE else f" --store {shlex.quote(uri)}"


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run, its store, and the store's address as it was typed."""

    store: Store
    store_uri: str
    run: Run

    @property
    def run_id(self) -> str:
        return self.run.run_id

    def command(self, words: str) -> str:
        """What to type to do ``words`` ("watch", "retry --failed") with this run."""
        return run_command(words, self.run_id, self.store_uri)

    def all_published(self) -> bool:
        from magi_ray.render.artifacts.videos import published

        return all(published(self.store, self.run_id, plan) is not None for plan in self.run.plans.values())


def run_command(words: str, run_id: str, store_uri: str) -> str:
    """What to type to do ``words`` ("watch", "retry --failed") with a run."""
    verb, _, options = words.partition(" ")
    return f"magi-ray {verb} {run_id}{options and f' {options}'}{store_flag(store_uri)}"


def open_named_run(
    name: str, store_uri: str, *, verb: str, weights: Path | None = None, patience_s: float | None = COMMAND_PATIENCE_S
) -> StoredRun:
    """The run with that id, or the only one whose id begins so. Raises RunNotFound with what may have been meant.

    verb: the command, for suggestions.  weights: their folder on this machine, if not the one at submission.
    patience_s: as for ``store_to_read``.
    """
    from magi_ray.render.runs.record import open_run

    store = store_to_read(store_uri, patience_s=patience_s)
    run = open_run(store, find_run(store, name, store_uri, verb=verb), weights=weights)
    return StoredRun(store=store, store_uri=store_uri, run=run)


def find_run(store: Store, name: str, store_uri: str, *, verb: str) -> str:
    """The id that ``name`` is or begins, even of a damaged run. Raises RunNotFound."""
    from magi_ray.render.runs.record import all_runs

    # A path, as the shell completes it, names the run by its last part.
    wanted = Path(name).name
    # A whole id takes one call: listing all runs may take longer than cancelling one may.
    with suppress(ValueError):
        if store.exists(keys.run_record(wanted)):
            return wanted
    known, damaged = all_runs(store)
    fitting = [known_id for known_id in known if wanted and known_id.startswith(wanted)]
    if len(fitting) == 1:
        return fitting[0]
    if wanted in damaged:
        return wanted
    count = f"{len(fitting)} runs begin with" if fitting else "There is no run"
    proposed = fitting[-5:] or difflib.get_close_matches(wanted, known, n=1, cutoff=0.4)
    if proposed:
        remedy = f"Did you mean {' or '.join(proposed)}?"
        following = f"magi-ray {verb} {proposed[-1]}{store_flag(store_uri)}"
    else:
        remedy = f"It holds {', '.join(known[-5:])}." if known else "It holds no runs."
        following = f"magi-ray list{store_flag(store_uri)}"
    raise RunNotFound(f"{count} {name!r} in {store.uri}.", remedy=remedy, next_command=following)
