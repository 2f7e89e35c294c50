"""Runs by the name that people type."""

from __future__ import annotations

import difflib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from magi_ray.commands.stores import store_flag
from magi_ray.errors import RunNotFound

if TYPE_CHECKING:
    from magi_ray.render.runs.record import Run
    from magi_ray.storage.store import Store


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run, the store that holds it, and the store's address as it was typed."""

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


def open_named_run(store: Store, name: str, store_uri: str, *, verb: str, weights: Path | None = None) -> StoredRun:
    """The run with that id, or the only one whose id begins so. Raises RunNotFound with what it could have meant.

    verb: of the command that proposals are made for.  weights: the folder of its weights on this machine, if not where
    they lay at submission.
    """
    from magi_ray.render.runs.record import open_run

    run = open_run(store, find_run(store, name, store_uri, verb=verb), weights=weights)
    return StoredRun(store=store, store_uri=store_uri, run=run)


def find_run(store: Store, name: str, store_uri: str, *, verb: str) -> str:
    """The id that ``name`` is or begins; it may be that of a damaged run. Raises RunNotFound."""
    from magi_ray.render.runs.record import all_runs
    from magi_ray.storage import keys

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
