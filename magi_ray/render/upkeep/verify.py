"""Verify: every committed object read again and compared with its digest. Changes nothing; one object at a time is in
memory or on the disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

from magi_ray.errors import InputError, MagiRayError, MediaError, ObjectDamaged, ObjectMissing, StoreError
from magi_ray.media.encoder import encoder_identity, find_ffmpeg
from magi_ray.render.artifacts.commits import segment_pre_image
from magi_ray.render.artifacts.videos import read_video_record
from magi_ray.render.runs.record import Run, all_runs, list_runs, open_run
from magi_ray.storage import keys
from magi_ray.storage.keys import CommitKind
from magi_ray.storage.records import Payload, digest, measure, read_commit, read_record, unseal
from magi_ray.storage.store import Store

KINDS: tuple[CommitKind, ...] = ("stage", "segment", "text", "prefix")


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One object that is not what was committed. ``what``: is wrong, with both numbers.  needed_by: the rows that need
    it, as (run, job_id); job_id is '' where the whole run does.  remedy, next_command: what mends it."""

    key: str
    what: str
    needed_by: tuple[tuple[str, str], ...] = ()
    remedy: str = ""
    next_command: str = ""


@dataclass(kw_only=True)
class Report:
    """objects, bytes: read and compared.  loose: payloads that no commit names, which are nobody's and no error.
    notes: what could not be checked, and why."""

    objects: int = 0
    bytes: int = 0
    loose: int = 0
    damages: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(
    store: Store, run_ids: Collection[str] | None = None, *, on_progress: Callable[[int, int], None] | None = None
) -> Report:
    """Read everything that ``run_ids`` need of the store, or (None) everything there is, and say what is damaged.

    on_progress: called with the objects and bytes read so far.
    Raises RunNotFound, StoreError when the store itself fails.
    """
    work = _Verifier(store, on_progress)
    if run_ids is None:
        for kind in KINDS:
            work.all_commits(kind)
        for key in store.list("media/"):
            work.media(key)
        for runs in all_runs(store):
            for run_id in runs:
                work.run(run_id)
    else:
        for run_id in run_ids:
            work.run(run_id)
            with suppress(ObjectDamaged):
                run = open_run(store, run_id)
                for needed, key in dict.fromkeys((kind, key) for kind, key, _ in needs(store, run)):
                    if needed == "media":
                        work.media(keys.media(key))
                    else:
                        work.commit(needed, key)
    if work.report.damages:
        work.report.damages = list(_explained(store, work.report.damages))
    return work.report


def needs(store: Store, run: Run) -> Iterator[tuple[CommitKind | Literal["media"], str, str]]:
    """(kind, key, job_id) of everything that the rows of ``run`` have or will have in the store.

    Of segments, those whose chunk is there: encoded by this machine's ffmpeg, or by the one that the video names.
    """
    try:
        here = encoder_identity(find_ffmpeg())
    except MediaError:
        here = None
    for job_id, plan in run.plans.items():
        for key in plan.stage_keys:
            yield "stage", key, job_id
        for key in dict.fromkeys(plan.caption_digests):
            yield "text", key, job_id
        if plan.media is not None and plan.prefix_digest is not None:
            yield "prefix", plan.prefix_digest, job_id
            yield "media", plan.media.sha256, job_id
        with suppress(InputError):
            record = read_video_record(store, run.run_id, job_id)
            for encoder in filter(None, dict.fromkeys((here, str(record["encoder"]) if record else None))):
                for chunk in range(plan.timeline.num_chunks):
                    with suppress(ObjectMissing):
                        yield "segment", digest(segment_pre_image(store, plan, chunk, encoder)), job_id


class _Verifier:
    def __init__(self, store: Store, on_progress: Callable[[int, int], None] | None) -> None:
        self._store, self._on_progress = store, on_progress
        self.report = Report()

    def all_commits(self, kind: CommitKind) -> None:
        for key, found in groupby(self._store.list(keys.commits(kind)), keys.commit_of):
            if not key:
                continue
            folder = keys.commit_folder(kind, key)
            names = {name.removeprefix(folder) for name in found} - {"commit.json"}
            self.report.loose += len(names - self.commit(kind, key))

    def commit(self, kind: CommitKind, key: str) -> set[str]:
        """Check a commit and its payloads, if it is there; the names of its payloads."""
        where = keys.commit(kind, key)
        named: set[str] = set()

        def look() -> Iterator[Damage]:
            try:
                commit = read_commit(self._store, kind, key)
            except InputError as exc:
                self._note(f"{where} was not checked: {exc.message}")
                return
            if commit is None:
                with suppress(ObjectMissing):
                    data = self._store.get(where)
                    self._count(len(data))
                    yield Damage(key=where, what=_sealed(data) or f"is not the commit of {kind} {key}")
                return
            self._count(0)
            named.update(payload.name for payload in commit.payloads.values())
            for payload in commit.payloads.values():
                yield from self._payload(keys.commit_folder(kind, key) + payload.name, payload)

        self._twice(look)
        return named

    def media(self, key: str) -> None:
        sha256 = key.rpartition("/")[2]

        def look() -> Iterator[Damage]:
            with suppress(ObjectMissing):
                found = measure(self._store, key)
                self._count(found.size)
                if found.sha256 != sha256:
                    yield Damage(key=key, what=f"has sha256 {found.sha256}, but {sha256} is its name")

        self._twice(look)

    def run(self, run_id: str) -> None:
        """The record, manifest, takes and videos of a run."""
        self._twice(lambda: self._record(run_id))
        for key in self._store.list(keys.takes(run_id)):
            self._twice(lambda key=key: self._take(key))  # type: ignore[misc]
        for key in self._store.list(keys.videos(run_id)):
            if key.endswith(".json"):
                self._twice(lambda key=key: self._video(run_id, key))  # type: ignore[misc]

    def _record(self, run_id: str) -> Iterator[Damage]:
        where, manifest = keys.run_record(run_id), keys.run_manifest(run_id)
        try:
            data = self._store.get(where)
            self._count(len(data))
            record = read_record(data)
        except ObjectMissing:
            yield Damage(key=where, what="is missing")
            return
        except ObjectDamaged as exc:
            yield Damage(key=where, what=_sentence(exc))
            return
        try:
            found = measure(self._store, manifest)
        except ObjectMissing:
            yield Damage(key=manifest, what="is missing")
            return
        self._count(found.size)
        recorded = record.get("manifest_sha256")
        if recorded is None:
            self._note(f"{where} and {manifest} were written before records held digests: they could not be checked.")
        elif recorded != found.sha256:
            yield Damage(key=manifest, what=f"has sha256 {found.sha256}, but {recorded} was submitted")

    def _take(self, key: str) -> Iterator[Damage]:
        data = self._store.get(key)
        self._count(len(data))
        if wrong := _sealed(data):
            yield Damage(key=key, what=wrong)

    def _video(self, run_id: str, where: str) -> Iterator[Damage]:
        data = self._store.get(where)
        self._count(len(data))
        try:
            record = read_record(data)
            expected = Payload(name="", size=record["bytes"], sha256=record["sha256"])
        except ObjectDamaged as exc:
            yield Damage(key=where, what=_sentence(exc))
            return
        except (KeyError, ValueError):  # of a format without a seal
            yield Damage(key=where, what="has lost the digest of its video")
            return
        if record["format"] == 1:
            self._note(f"{where} was written before records held digests: only its video could be checked.")
        yield from self._payload(where.removesuffix(".json") + ".mp4", expected)

    def _payload(self, key: str, expected: Payload) -> Iterator[Damage]:
        try:
            found = measure(self._store, key)
        except ObjectMissing:
            yield Damage(key=key, what=f"is missing; {expected.size} bytes were committed")
            return
        self._count(found.size)
        if unlike := expected.unlike(found):
            yield Damage(key=key, what=unlike)

    def _twice(self, look: Callable[[], Iterator[Damage]]) -> None:
        """Only what is wrong at a second look too: meanwhile it may have been mended, replaced or collected."""
        with suppress(ObjectMissing):
            if list(look()):
                self.report.damages += list(look())

    def _count(self, size: int) -> None:
        self.report.objects += 1
        self.report.bytes += size
        if self._on_progress is not None:
            self._on_progress(self.report.objects, self.report.bytes)

    def _note(self, note: str) -> None:
        if note not in self.report.notes:
            self.report.notes.append(note)


def _sealed(data: bytes) -> str:
    """What is wrong with a sealed record; '' when nothing is."""
    try:
        unseal(data)
    except ObjectDamaged as exc:
        return _sentence(exc)
    return ""


def _sentence(exc: MagiRayError) -> str:
    return f"is damaged: {exc.message}"


def _explained(store: Store, damages: list[Damage]) -> Iterator[Damage]:
    """``damages`` with who needs each, and what mends it. Only now: it takes planning every run of the store."""
    folders = {_folder(damage.key) for damage in damages}
    needed: dict[str, list[tuple[str, str]]] = {}
    for run_id in list_runs(store):
        with suppress(InputError, StoreError):
            for kind, key, job_id in needs(store, open_run(store, run_id)):
                folder = keys.media(key) if kind == "media" else keys.commit_folder(kind, key)
                if folder in folders and (run_id, job_id) not in needed.setdefault(folder, []):
                    needed[folder].append((run_id, job_id))
    for damage in damages:
        top, run_id, *rest = damage.key.split("/")
        if top != "runs":
            by = tuple(needed.get(_folder(damage.key), ()))
        else:
            by = ((run_id, rest[1].rpartition(".")[0] if rest[0] == "videos" else ""),)
        yield replace(damage, needed_by=by, **_mending(store, damage.key, by))


def _mending(store: Store, key: str, by: tuple[tuple[str, str], ...]) -> dict[str, str]:
    top = key.split("/")[0]
    at = f" --store {store.uri}"
    if not by:
        return {
            "remedy": "No run needs it; whoever comes to need it makes it again. Garbage collection removes it.",
            "next_command": f"magi-ray gc{at}",
        }
    run_id, job_id = by[0]
    if key.startswith(keys.takes(run_id)):
        return {"remedy": f"Delete {key} and ask for that take again.", "next_command": ""}
    if top == "media" or not job_id:
        return {
            "remedy": f"Submit the manifest of run {run_id} again, with the same settings and files.",
            "next_command": f"magi-ray submit MANIFEST{at}",
        }
    return {
        "remedy": "Retrying the row makes it again, to the same bytes.",
        "next_command": f"magi-ray retry {run_id} --job {job_id}{at}",
    }


def _folder(key: str) -> str:
    """Of a payload or commit, the folder that its key names; else the key."""
    return key if key.startswith(("media/", "runs/")) else key.rpartition("/")[0] + "/"
