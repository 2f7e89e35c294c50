"""Garbage collection. ``garbage`` finds what no run in the store needs and says why, ``collect`` deletes it.

A run needs the stages, captions, prefixes and media of its plans, and the segments of its chunks. Everything under
``runs/`` stays.

``commit.json`` is deleted before its payloads. So readers find a whole commit or none at every moment, even if
collection is killed between the two: payloads without a commit do not count, and the next collection deletes them. The
other order would leave commits that look damaged. A late writer does no harm, since it writes the same bytes under the
same key: it finds its payloads once it has committed, or writes them again (``records.write_commit``). ``garbage``
looks for new runs as it goes, but not after every object: what one of them has just come to need may be deleted, and is
then rendered again; nothing is ever wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from magi_ray.errors import InputError, ObjectDamaged, RunNotFound, magi_ray_command
from magi_ray.render.runs.record import open_run
from magi_ray.storage import keys
from magi_ray.storage.keys import CommitKind
from magi_ray.storage.leases import TTL_S, holding
from magi_ray.storage.records import Commit, read_commit
from magi_ray.storage.store import Entry, Store

MIN_AGE_S = 7 * 86400.0
REFRESH_S = 10.0  # how often new runs and takes are looked for while the store is listed


@dataclass(frozen=True, kw_only=True)
class Item:
    """One object that nobody needs. size: bytes.  reason: why it goes.  leftover: ``key`` is a name for
    ``Store.sweep``."""

    key: str
    size: int
    age_s: float
    reason: str
    leftover: bool = False


def garbage(
    store: Store,
    *,
    min_age_s: float = MIN_AGE_S,
    forget: Collection[str] = (),
    watch_s: float = TTL_S,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Item]:
    """What no run needs and nobody has written for ``min_age_s``, each commit before its payloads.

    min_age_s: longer than any writer takes from its first payload to its commit.
    forget: runs that count as needing nothing; their records and videos stay.
    watch_s: for how long the lease of a forgotten run is watched for a beat.  clock: seconds.

    Raises ObjectDamaged if a run cannot be read; RunNotFound; InputError if a newer magi-ray wrote a run, take or
    commit, if a forgotten run is being rendered, or if listing takes longer than ``min_age_s``.
    """
    began = clock()
    needed = _Needed(store, frozenset(forget), clock)
    for run_id in forget:
        _require_resting(store, run_id, watch_s)
    for kind in keys.COMMITS:
        for item in _commits(store, kind, needed, min_age_s):
            if item.age_s >= min_age_s:
                _require_in_time(clock() - began, min_age_s)
                yield item
    yield from (item for item in _others(store, needed) if item.age_s >= min_age_s)


def collect(store: Store, items: Iterable[Item]) -> tuple[int, int]:
    """Delete ``items``, but not those written again since they were listed. Returns (objects, bytes) deleted."""
    objects = size = 0
    for item in items:
        if item.leftover:
            store.sweep(item.key)
        else:
            now = next((entry for entry in store.entries(item.key) if entry.key == item.key), None)
            if now is None or now.age_s < item.age_s:
                continue
            store.delete(item.key)
        objects, size = objects + 1, size + item.size
    return objects, size


class _Needed:
    """What the runs of the store need. Looks for new runs and takes every REFRESH_S."""

    def __init__(self, store: Store, forget: Collection[str], clock: Callable[[], float]) -> None:
        self._store, self._forget, self._clock = store, forget, clock
        self._planned: dict[str, int] = {}  # run_id: number of its takes
        self._keys: dict[str, set[str]] = {kind: set() for kind in ("stage", "text", "prefix", "media")}
        self._chunks: set[str] = set()
        self._unreadable_stage = False
        self._refresh()

    def commit(self, kind: CommitKind, key: str, found: Commit | None) -> bool:
        """Whether the commit under ``key`` is needed. ``found``: it, None if it is missing or unreadable."""
        self._refresh_if_due()
        if kind == "segment":
            # An unreadable stage does not say which segment belongs to it.
            return found is not None and (self._unreadable_stage or found.pre_image.get("chunk") in self._chunks)
        return key in self._keys[kind]

    def media(self, sha256: str) -> bool:
        """Whether an image or clip is needed."""
        self._refresh_if_due()
        return sha256 in self._keys["media"]

    def add_chunk_of(self, stage: Commit | None) -> None:
        """The segment of a needed stage's chunk is needed too. ``stage``: None if it is there, but unreadable."""
        if stage is None:
            self._unreadable_stage = True
        elif "chunk" in stage.payloads:
            self._chunks.add(stage.payloads["chunk"].sha256)

    def _refresh_if_due(self) -> None:
        if self._clock() - self._refreshed >= REFRESH_S:
            before = frozenset(self._keys["stage"])
            self._refresh()
            for key in sorted(self._keys["stage"] - before):  # the listing may be past them
                if self._store.exists(keys.commit("stage", key)):
                    self.add_chunk_of(read_commit(self._store, "stage", key))

    def _refresh(self) -> None:
        self._refreshed = self._clock()
        takes: dict[str, int] = {}
        for key in self._store.list(keys.RUNS):
            if run_id := keys.run_of(key):
                takes[run_id] = takes.get(run_id, 0) + (keys.kind_of(key) == "take")
        for run_id in self._forget:
            if run_id not in takes:
                raise RunNotFound(f"There is no run {run_id!r} in {self._store.uri}, so it cannot be forgotten.")
        for run_id in sorted(takes.keys() - self._forget):
            if self._planned.get(run_id) != takes[run_id]:
                self._plan(run_id)
                self._planned[run_id] = takes[run_id]

    def _plan(self, run_id: str) -> None:
        try:
            plans = open_run(self._store, run_id, copied=True).plans.values()
        except (ObjectDamaged, RunNotFound) as exc:
            raise ObjectDamaged(
                f"Run {run_id} cannot be read, so what it needs is not known, and nothing is deleted: {exc.message}",
                remedy=f"{exc.remedy} Or give the run up with --forget {run_id}.",
                next_command=exc.next_command,
            ) from exc
        for plan in plans:
            self._keys["stage"].update(plan.stage_keys)
            self._keys["text"].update(plan.caption_digests)
            if plan.media is not None and plan.prefix_digest is not None:
                self._keys["prefix"].add(plan.prefix_digest)
                self._keys["media"].add(plan.media.sha256)


def _commits(store: Store, kind: CommitKind, needed: _Needed, min_age_s: float) -> Iterator[Item]:
    """What is garbage among the commits of one kind and the objects beside them."""
    # Others' files first: one that lies among the objects of a commit would split its group.
    ours = (entry for entry in store.entries(keys.commits(kind)) if keys.commit_of(entry.key))
    for key, found in groupby(ours, lambda entry: keys.commit_of(entry.key)):
        entries = sorted(found, key=lambda entry: (entry.key != keys.commit(kind, key), entry.key))
        has_commit = entries[0].key == keys.commit(kind, key)
        commit = read_commit(store, kind, key) if has_commit else None
        if needed.commit(kind, key, commit):
            if has_commit and kind == "stage":
                needed.add_chunk_of(commit)
            if has_commit and commit is None:
                continue  # damaged: a resume makes it again
            named = {keys.commit(kind, key)}
            if commit is not None:
                named |= {keys.commit_folder(kind, key) + payload.name for payload in commit.payloads.values()}
            for entry in entries:
                if entry.key not in named:
                    yield _item(entry, "no commit names it: its writer died, or another was quicker")
        # A writer that was here lately may not be done.
        elif min(entry.age_s for entry in entries) >= min_age_s:
            if not has_commit:
                reason = "its commit was never written"
            elif kind == "segment" and commit is None:
                reason = "its commit is damaged, so nobody can use it"
            else:
                reason = f"no run needs this {kind}"
            yield from (_item(entry, reason) for entry in entries)


def _others(store: Store, needed: _Needed) -> Iterator[Item]:
    """What is garbage beside the commits, of any age."""
    for entry in store.entries(keys.MEDIA):
        if keys.kind_of(entry.key) == "media" and not needed.media(entry.key.rpartition("/")[2]):
            yield _item(entry, "no run begins from this image or clip")
    for entry in store.entries(keys.PROBES):
        if keys.kind_of(entry.key) == "probe":
            yield _item(entry, "left behind by a check of the store")
    for entry in store.leftovers():
        yield _item(entry, "half written by a process that died", leftover=True)


def _require_in_time(taken_s: float, min_age_s: float) -> None:
    # Whatever was written after the stages were read may belong to one of them, so it must still be too young to go.
    if 0 < min_age_s <= taken_s:
        raise InputError(
            f"Collecting has taken {taken_s:.0f} s, but what is {min_age_s:.0f} s old may be deleted.",
            remedy="Collect again, with a longer minimum age: --min-age.",
        )


def _require_resting(store: Store, run_id: str, watch_s: float) -> None:
    held = holding(store, keys.run_lease(run_id), watch_s=watch_s)
    if held is not None and held.beating is not False:
        raise InputError(
            f"Run {run_id} is being rendered by {held.owner}, so it cannot be forgotten.",
            remedy="Pause or cancel it first.",
            next_command=magi_ray_command("cancel", run_id, "--store", store.uri),
        )


def _item(entry: Entry, reason: str, *, leftover: bool = False) -> Item:
    return Item(key=entry.key, size=entry.size, age_s=entry.age_s, reason=reason, leftover=leftover)
