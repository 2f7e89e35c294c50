"""The store and the run that a command means: ``--store URI`` and ``RUN``."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from magi_ray.commands.console import say
from magi_ray.errors import InputError, MagiRayError, RunNotFound, magi_ray_command
from magi_ray.settings import chosen_store
from magi_ray.storage import keys
from magi_ray.storage.local import LocalStore
from magi_ray.storage.opening import open_store
from magi_ray.storage.store import Store

if TYPE_CHECKING:
    from magi_ray.render.runs.record import Run

_STORE_HERE = "magi-ray-store"
# How long a command keeps trying to reach a bucket: somebody waits for it, and can type it again.
COMMAND_PATIENCE_S = 15.0
# How many of the runs that a name may mean are listed.
CANDIDATES_SHOWN = 5
# What may stand behind a manifest's name, or alone: the newest of its runs, the one before it, …
_COUNTED_BACK = re.compile(r"(?P<of>.*)@(?P<which>latest|-\d+)")


def default_store() -> str:
    """The store that is meant where none is named."""
    return chosen_store() or _STORE_HERE


def store_to_read(uri: str, *, patience_s: float | None = COMMAND_PATIENCE_S) -> Store:
    """The store at ``uri``, which must exist. Nothing is written.

    patience_s: how long to keep trying to reach a bucket; None: as long as a driver does.
    """
    store = open_store(uri) if patience_s is None else open_store(uri, patience_s=patience_s)
    if isinstance(store, LocalStore):
        _require_folder(store.root)
        if not store.root.exists():
            others = [other for other in (default_store(), _STORE_HERE) if other != uri and Path(other).is_dir()]
            raise InputError(
                f"There is no store at {store.root}.",
                remedy="Name it with --store or MAGI_RAY_STORE, or change to the folder that you submitted from.",
                next_command=f"magi-ray list{store_flag(others[0])}" if others else "",
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
    return "" if uri == default_store() else f" --store {shlex.quote(uri)}"


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
        return run_command(words, self.run_id, self.store, self.store_uri)

    def all_published(self) -> bool:
        return not self.unpublished()

    def unpublished(self) -> list[str]:
        """The job_ids of the rows whose videos are not done."""
        from magi_ray.render.artifacts.videos import published

        plans = self.run.plans.values()
        return [plan.job_id for plan in plans if published(self.store, self.run_id, plan) is None]


def run_command(words: str, run_id: str, store: Store, store_uri: str) -> str:
    """What to type to do ``words`` ("watch", "retry --failed") with a run: a command that renders gets the options
    that this machine rendered it with last."""
    from magi_ray.drivers.status_file import last_options

    verb, *options = shlex.split(words)
    if verb in ("resume", "retry"):
        options += last_options(store, run_id)
    return magi_ray_command(verb, run_id, *options) + store_flag(store_uri)


def open_named_run(
    name: str | None,
    store_uri: str,
    *,
    verb: str,
    weights: Path | None = None,
    patience_s: float | None = COMMAND_PATIENCE_S,
) -> StoredRun:
    """The run that ``name`` means, see ``find_run``. Raises RunNotFound with what may have been meant.

    verb: the command, for suggestions.  weights: their folder on this machine, if not the one at submission.
    patience_s: as for ``store_to_read``.
    """
    from magi_ray.render.runs.record import open_run

    store = store_to_read(store_uri, patience_s=patience_s)
    run_id = find_run(store, name, store_uri, verb=verb)
    if name is None or _COUNTED_BACK.fullmatch(name):
        say(f"Run {run_id}:")
    return StoredRun(store=store, store_uri=store_uri, run=open_run(store, run_id, weights=weights))


def find_run(store: Store, name: str | None, store_uri: str, *, verb: str) -> str:
    """The id of the run that ``name`` means, even of a damaged one. A name is

    - an id or its beginning, or a path that ends in it;
    - the name of a manifest, with or without its suffix: the one run that was submitted under it, or if there are
      several, the one with the rows that the file of that name has now;
    - ``@latest``, the newest run of all; ``@-1``, the one before it; ``NAME@latest`` and ``NAME@-1`` among those
      submitted under NAME;
    - None: as ``@latest``; but for "cancel" and "pause" the only run that is being rendered.

    Raises RunNotFound with what may have been meant.
    """
    from magi_ray.render.runs.record import all_runs

    # A path, as the shell completes it, names the run by its last part.
    wanted = "" if name is None else Path(name).name
    # A whole id takes one call: listing all runs may take longer than cancelling one may.
    with suppress(ValueError):
        if store.exists(keys.run_record(wanted)):
            return wanted
    known, damaged = all_runs(store)
    if name is None and verb in ("cancel", "pause"):
        return _only_rendered(store, known, store_uri, verb=verb)
    if counted_back := _COUNTED_BACK.fullmatch("@latest" if name is None else name):
        of, which = counted_back.groups()
        among = _submitted_as(store, known, of) if of else known
        place = 1 if which == "latest" else 1 - int(which)
        if place <= len(among):
            return among[-place]
        what = f"{len(among) or 'no'} run{'s' * (len(among) != 1)}{of and f' of {of!r}'}"
        raise _not_found(store, f"{store.uri} holds {what}.", known, store_uri)
    fitting = _submitted_as(store, known, wanted)
    if len(fitting) > 1:
        fitting = _with_rows_of(store, fitting, Path(name or "")) or fitting
    fitting = fitting or [run_id for run_id in known if wanted and run_id.startswith(wanted)]
    if len(fitting) == 1:
        return fitting[0]
    if wanted in damaged:
        return wanted
    begun = [run_id for run_id in damaged if wanted and run_id.startswith(wanted)]
    if not fitting and len(begun) == 1:
        return begun[0]
    if fitting:
        fault = f"{len(fitting)} runs in {store.uri} are called {name!r}"
        raise _ambiguous(store, fault, fitting, _instead(name, fitting[-1], store_uri, verb=verb))
    close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.4)
    fault = f"There is no run {name!r} in {store.uri}."
    if not close:
        raise _not_found(store, fault, known, store_uri)
    following = _instead(name, close[0], store_uri, verb=verb)
    raise RunNotFound(fault, remedy=f"Did you mean {close[0]}?", next_command=following)


def _only_rendered(store: Store, known: Sequence[str], store_uri: str, *, verb: str) -> str:
    """The only one of the runs ``known`` that is being rendered. Raises RunNotFound."""
    from magi_ray.drivers.driver_monitor import find_driver

    rendered = [run_id for run_id in known if find_driver(store, run_id) is not None]
    if len(rendered) == 1:
        return rendered[0]
    if rendered:
        fault = f"{len(rendered)} runs in {store.uri} are being rendered"
        raise _ambiguous(store, fault, rendered, f"magi-ray list{store_flag(store_uri)}")
    raise _not_found(store, f"No run in {store.uri} is being rendered, so name the one to {verb}.", known, store_uri)


def _submitted_as(store: Store, known: Sequence[str], name: str) -> list[str]:
    """Those of ``known`` whose manifest had that name; a name without a suffix fits any."""
    from magi_ray.render.runs.record import run_stem
    from magi_ray.storage.records import read_record

    file = Path(name).name
    fitting = [run_id for run_id in known if run_id.rpartition("-")[0] in (file, run_stem(file))]
    if file in (run_id.rpartition("-")[0] for run_id in fitting):
        return fitting
    names = {run_id: Path(read_record(store.get(keys.run_record(run_id)))["name"]) for run_id in fitting}
    return [run_id for run_id, name_then in names.items() if file in (name_then.name, name_then.stem)]


def _with_rows_of(store: Store, run_ids: Sequence[str], manifest: Path) -> list[str]:
    """Those of the runs that have the rows of the file ``manifest``, with or without its suffix; none if it is no
    manifest."""
    from magi_ray.manifest import Defaults, read_manifest
    from magi_ray.manifest.sources import SUFFIXES
    from magi_ray.render.runs.record import read_run

    files = [file for suffix in ("", *SUFFIXES) if (file := Path(f"{manifest}{suffix}")).is_file()]
    same = []
    for run_id in run_ids if files else ():
        with suppress(MagiRayError, OSError):
            record, _ = read_run(store, run_id)
            defaults = Defaults.of(record.settings)
            if any(read_manifest(file, defaults).digest == record.manifest_digest for file in files):
                same.append(run_id)
    return same


def _ambiguous(store: Store, fault: str, run_ids: Sequence[str], next_command: str) -> RunNotFound:
    """The error for a name that may mean any of ``run_ids``, with when they were submitted, and their states."""
    from magi_ray.drivers.run_status import run_summary

    lines = []
    for run_id in run_ids[-CANDIDATES_SHOWN:]:
        with suppress(MagiRayError):
            summary = run_summary(store, run_id)
            lines.append(f"  {run_id}  submitted {summary['submitted']}, {summary['state']}")
    more = [f"  … and {len(run_ids) - CANDIDATES_SHOWN} older"] if len(run_ids) > CANDIDATES_SHOWN else []
    remedy = "Name one of them; the last is the newest."
    return RunNotFound("\n".join([f"{fault}:", *more, *lines]), remedy=remedy, next_command=next_command)


def _instead(name: str | None, run_id: str, store_uri: str, *, verb: str) -> str:
    """The typed command with the run that it may mean; `list` where it would stop that run: nothing is stopped on a
    guess."""
    context = click.get_current_context(silent=True)
    typed = [] if context is None or context.obj is None else list(context.obj)
    if verb in ("cancel", "pause"):
        return f"magi-ray list{store_flag(store_uri)}"
    if name in typed:
        typed[typed.index(name)] = run_id
        return magi_ray_command(*typed)
    return f"magi-ray {verb} {run_id}{store_flag(store_uri)}"


def _not_found(store: Store, fault: str, known: Sequence[str], store_uri: str) -> RunNotFound:
    holds = (
        f"It holds {', '.join(known[-CANDIDATES_SHOWN:])}."
        if known
        else "No run there can be read: name another store with --store."
    )
    return RunNotFound(fault, remedy=holds, next_command=f"magi-ray list{store_flag(store_uri)}")
