"""Verify: reads every committed object again and compares it with its digest. Changes nothing; holds one object at a
time, in memory or on disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Literal

from magi_ray.errors import (
    InputError,
    MediaError,
    ObjectDamaged,
    ObjectMissing,
    RunDamaged,
    RunNotFound,
    StoreError,
    magi_ray_command,
)
from magi_ray.media.encoder import encoder_identity, find_ffmpeg
from magi_ray.render.artifacts.commits import segment_pre_image
from magi_ray.render.artifacts.videos import published, read_video_record
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.runs.record import Run, all_runs, open_run, read_content, read_run
from magi_ray.storage import keys
from magi_ray.storage.keys import CommitKind
from magi_ray.storage.records import Payload, digest, measure, read_commit, read_record, unseal
from magi_ray.storage.store import Store, delete_command


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One object that is not as it was committed. what: is wrong with it, with both numbers.

    needed_by: the rows that need it, as (run_id, job_id); job_id is '' if the whole run does.
    remedy, next_command: how to repair it. For a run that is to be submitted again see ``submit_command``.
    """

    key: str
    what: str
    needed_by: tuple[tuple[str, str], ...] = ()
    remedy: str = ""
    next_command: str = ""


@dataclass(kw_only=True)
class Report:
    """objects, bytes: read.  loose: payloads that no commit names, which is no error.
    notes: what could not be checked, and why."""

    objects: int = 0
    bytes: int = 0
    loose: int = 0
    damages: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(
    store: Store, run_ids: Collection[str] | None = None, *, on_progress: Callable[[int, int], None] | None = None
) -> Report:
    """Read all that ``run_ids`` need of the store, or (None) the whole store, and report what is damaged.

    on_progress: called with the objects and bytes read so far.
    Raises RunNotFound; StoreError if the store itself fails.
    """
    verifier = _Verifier(store, on_progress)
    if run_ids is None:
        verifier.everything()
    for run_id in run_ids or ():
        verifier.run_and_its_needs(run_id)
    report = verifier.report
    if report.damages:
        report.damages = list(_with_remedies(store, report.damages))
    return report


def needs(store: Store, run: Run) -> Iterator[tuple[CommitKind | Literal["media"], str, str]]:
    """(kind, key, job_id) of everything that the rows of ``run`` have or will have in the store.

    Segments: of stored chunks, as encoded by this machine's ffmpeg and by the one that made the video.
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

    def everything(self) -> None:
        for kind in keys.COMMITS:
            self._all_commits(kind)
        for key in self._store.list(keys.MEDIA):
            if keys.kind_of(key) == "media":
                self._check_twice(key, self._media)
        for runs in all_runs(self._store):
            for run_id in runs:
                with suppress(RunNotFound):  # deleted meanwhile
                    self._run(run_id)

    def run_and_its_needs(self, run_id: str) -> None:
        if (run := self._run(run_id)) is not None:
            for kind, key in dict.fromkeys((kind, key) for kind, key, _ in needs(self._store, run)):
                if kind == "media":
                    self._check_twice(keys.media(key), self._media)
                else:
                    self._check_twice(keys.commit(kind, key), partial(self._commit, kind, key, set()))

    def _all_commits(self, kind: CommitKind) -> None:
        for key, found in groupby(filter(keys.commit_of, self._store.list(keys.commits(kind))), keys.commit_of):
            payloads = set(found) - {keys.commit(kind, key)}
            named: set[str] = set()
            self._check_twice(keys.commit(kind, key), partial(self._commit, kind, key, named))
            self.report.loose += len(payloads - named)

    def _run(self, run_id: str) -> Run | None:
        """The record, manifest, takes and videos of a run, and whether what it needs is there. The run, if it can be
        read."""
        self._check_twice(keys.run_record(run_id), partial(self._record, run_id))
        for key in self._store.list(keys.takes(run_id)):
            if keys.kind_of(key) == "take":
                self._check_twice(key, self._take)
        run = None
        try:
            run = open_run(self._store, run_id)
        except ObjectDamaged:
            pass  # reported above
        except RunNotFound:
            raise
        except InputError as exc:
            self._note(f"Run {run_id} was not checked: {exc.message}")
        for key in self._store.list(keys.videos(run_id)):
            if keys.kind_of(key) == "video record" and (run is None or keys.job_of(key) in run.plans):
                self._check_twice(key, self._video)
        if run is not None:
            self._check_twice("", partial(self._gone, run))
        return run

    def _gone(self, run: Run, where: str) -> Iterator[Damage]:
        """What rows of ``run`` need and had, but is not there any more. A row that is done needs nothing to be done:
        for such rows there is a note, since `gc --forget` takes what they were made from."""
        missed: dict[str, list[str]] = {}
        unneeded: list[str] = []
        for job_id, plan in run.plans.items():
            done = published(self._store, run.run_id, plan) is not None
            for key in self._gone_of(plan, done=done):
                if done:
                    unneeded.append(key)
                else:
                    missed.setdefault(key, []).append(job_id)
        for key, jobs in missed.items():
            needed_by = tuple((run.run_id, job_id) for job_id in jobs)
            yield Damage(key=key, what="is missing, though it was there", needed_by=needed_by)
        if unneeded := [key for key in dict.fromkeys(unneeded) if key not in missed]:
            self._note(
                f"Of run {run.run_id}, {len(unneeded)} objects that its finished videos were made from are gone, such "
                f"as {unneeded[0]}. The videos are whole; a new take of them makes these again, but an image or clip "
                "only comes back when the manifest is submitted again."
            )

    def _gone_of(self, plan: RowPlan, *, done: bool) -> Iterator[str]:
        """What was there when the stages of ``plan`` that are in the store were computed, and is gone."""
        if plan.media is not None and not self._store.exists(keys.media(plan.media.sha256)):
            yield keys.media(plan.media.sha256)
        last = len(plan.stage_keys) - 1
        if not done:
            there = [self._store.exists(keys.commit("stage", key)) for key in plan.stage_keys]
            last = max((stage for stage, found in enumerate(there) if found), default=-1)
            yield from (keys.commit("stage", plan.stage_keys[stage]) for stage in range(last) if not there[stage])
        if last < 0:
            return
        if plan.prefix_digest is not None and not self._store.exists(keys.commit("prefix", plan.prefix_digest)):
            yield keys.commit("prefix", plan.prefix_digest)
        for text in dict.fromkeys(plan.caption_digests[: last + 1]):
            if not self._store.exists(keys.commit("text", text)):
                yield keys.commit("text", text)

    def _check_twice(self, where: str, check: Callable[[str], Iterator[Damage]]) -> None:
        """Report only what a second check finds too: what is written or deleted meanwhile may look damaged once."""
        with suppress(ObjectMissing):
            if _damages(where, check):
                self.report.damages += _damages(where, check)

    # Checks yield damages. They may raise ObjectDamaged (the object ``where``) and ObjectMissing (nothing to check).

    def _commit(self, kind: CommitKind, key: str, named: set[str], where: str) -> Iterator[Damage]:
        """A commit and its payloads, whose keys are added to ``named``."""
        try:
            commit = read_commit(self._store, kind, key)
        except InputError as exc:
            self._note(f"{where} was not checked: {exc.message}")
            return
        if commit is None:
            unseal(self._get(where))
            yield Damage(key=where, what=f"is not the commit of {kind} {key}")
            return
        self._count(0)
        payloads = {keys.commit_folder(kind, key) + payload.name: payload for payload in commit.payloads.values()}
        named.update(payloads)
        for name, payload in payloads.items():
            yield from self._payload(name, payload)

    def _media(self, key: str) -> Iterator[Damage]:
        expected, found = key.rpartition("/")[2], measure(self._store, key)
        self._count(found.size)
        if found.sha256 != expected:
            yield Damage(key=key, what=f"has sha256 {found.sha256}, but {expected} is its name")

    def _record(self, run_id: str, where: str) -> Iterator[Damage]:
        manifest = keys.run_manifest(run_id)
        try:
            record = read_content(self._store, run_id)
            self._get(where)
        except ObjectMissing:
            yield Damage(key=where, what="is missing")
            return
        except ObjectDamaged as exc:
            what, command = exc.message, exc.next_command
            if isinstance(exc, RunDamaged):
                what = exc.what
                command = submit_command(self._store, run_id) if exc.resubmit else command
            yield Damage(key=where, what=f"is damaged: {what}", remedy=exc.remedy, next_command=command)
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

    def _take(self, where: str) -> Iterator[Damage]:
        unseal(self._get(where))
        yield from ()

    def _video(self, where: str) -> Iterator[Damage]:
        try:
            record = read_record(self._get(where))
            expected = Payload(name="", size=record["bytes"], sha256=record["sha256"])
        except (KeyError, ValueError):  # of a format without a seal, or another record in its place
            yield Damage(key=where, what="has lost the digest of its video")
            return
        if record.get("job_id") != keys.job_of(where):
            yield Damage(key=where, what=f"is the record of row {record.get('job_id')}")
            return
        if record.get("format") == 1:
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

    def _get(self, key: str) -> bytes:
        data = self._store.get(key)
        self._count(len(data))
        return data

    def _count(self, size: int) -> None:
        self.report.objects += 1
        self.report.bytes += size
        if self._on_progress is not None:
            self._on_progress(self.report.objects, self.report.bytes)

    def _note(self, note: str) -> None:
        if note not in self.report.notes:
            self.report.notes.append(note)


def _damages(where: str, check: Callable[[str], Iterator[Damage]]) -> list[Damage]:
    try:
        return list(check(where))
    except ObjectDamaged as exc:
        return [Damage(key=where, what=f"is damaged: {exc.message}")]


def _with_remedies(store: Store, damages: Collection[Damage]) -> Iterator[Damage]:
    """``damages`` with who needs each and how to repair it. Called once, since it plans every run of the store."""
    needed_by = _rows_that_need(store, {_folder(damage.key) for damage in damages})
    for damage in sorted(damages, key=lambda damage: not damage.key.startswith(keys.MEDIA)):  # needed for the rest
        rows = list(damage.needed_by)
        if rows:
            pass
        elif damage.key.startswith(keys.RUNS):
            run_id, *rest = damage.key.removeprefix(keys.RUNS).split("/")
            rows = [(run_id, rest[1].rpartition(".")[0] if rest[0] == "videos" else "")]
        else:
            rows = needed_by.get(_folder(damage.key), [])
        remedy, next_command = _repair(store, damage.key, rows)
        yield replace(
            damage,
            needed_by=tuple(rows),
            remedy=damage.remedy or remedy,
            next_command=damage.next_command or next_command,
        )


def _rows_that_need(store: Store, folders: Collection[str]) -> dict[str, list[tuple[str, str]]]:
    """The rows that need something in each of ``folders``, as (run, job_id)."""
    found: dict[str, dict[tuple[str, str], None]] = {folder: {} for folder in folders}
    for run_id in all_runs(store)[0]:
        with suppress(InputError, StoreError):
            for kind, key, job_id in needs(store, open_run(store, run_id)):
                folder = keys.media(key) if kind == "media" else keys.commit_folder(kind, key)
                if folder in found:
                    found[folder][run_id, job_id] = None
    return {folder: list(rows) for folder, rows in found.items()}


def _repair(store: Store, key: str, needed_by: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """How to repair the object, and the command that does it."""
    at = "--store", store.uri
    if not needed_by:
        remedy = "No run needs it; a run that comes to need it makes it again. Garbage collection removes it."
        return remedy, magi_ray_command("gc", *at)
    run_id, job_id = needed_by[0]
    if key.startswith(keys.takes(run_id)):
        return "Delete it; then ask for the take again, if it is still wanted.", delete_command(store, key)
    if key.startswith(keys.MEDIA) or not job_id:
        remedy = f"Submit the manifest of run {run_id} again, with the same settings and files."
        if key.startswith(keys.MEDIA):
            remedy += f" Only the file with sha256 {key.rpartition('/')[2]} can bring this one back."
        return remedy, submit_command(store, run_id)
    remedy = "Retrying the row makes it again, to the same bytes."
    return remedy, magi_ray_command("retry", run_id, "--job", job_id, *at)


def _folder(key: str) -> str:
    """The folder of a commit or payload; of anything else its key."""
    return key if key.startswith((keys.MEDIA, keys.RUNS)) else key.rpartition("/")[0] + "/"


def submit_command(store: Store, run_id: str) -> str:
    """The command that submits the run again, as far as the store knows it: without its place and options."""
    name = "MANIFEST"
    with suppress(InputError, StoreError):
        name = read_run(store, run_id)[0].name
    return magi_ray_command("submit", name, "--store", store.uri)
