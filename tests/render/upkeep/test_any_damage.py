"""Whatever happens to one object: looking at the store never fails, and submitting and retrying give the same bytes.

The cases come from the layout (``keys.KINDS``): a new kind of object is tried here as soon as it is written.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from runs import contents, flip

from magi_ray.drivers.driver_monitor import find_driver
from magi_ray.drivers.run_status import run_status, run_summary
from magi_ray.errors import MagiRayError, ObjectDamaged
from magi_ray.manifest import Defaults, manifest_of
from magi_ray.media.encoder import encoder_identity, find_ffmpeg
from magi_ray.render.driving import requests
from magi_ray.render.driving.local import LocalWorkers
from magi_ray.render.driving.loop import render
from magi_ray.render.driving.scheduler import ONE_OF_EACH
from magi_ray.render.driving.session import DriveOptions
from magi_ray.render.plans.takes import add_take
from magi_ray.render.runs.record import Run, all_runs, open_run
from magi_ray.render.runs.submission import create, prepare
from magi_ray.render.tasks.loading import load_task
from magi_ray.render.upkeep.forecast import forecast
from magi_ray.render.upkeep.gc import collect, garbage
from magi_ray.render.upkeep.verify import verify
from magi_ray.settings import Settings, override
from magi_ray.storage import keys
from magi_ray.storage.memory import MemoryStore

ROOT = Path(__file__).parents[3]
IMAGES = [ROOT / "manifests" / "quickstart-image.png", ROOT / "docs" / "quickstart.png"]
KINDS = [kind for kind in keys.KINDS if kind != "probe"]
# Written for people or for who comes next, without a digest: `verify` does not look at them.
UNSEALED = {"epoch", "run lease", "row lease", "request", "progress", "results", "errors"}


def empty(store: MemoryStore, key: str, other: str) -> None:
    store.put(key, b"")


def truncate(store: MemoryStore, key: str, other: str) -> None:
    store.put(key, store.get(key)[:-3])


def swap(store: MemoryStore, key: str, other: str) -> None:
    """With another object of its kind."""
    one, two = store.get(key), store.get(other)
    store.put(key, two)
    store.put(other, one)


DAMAGES: dict[str, Callable[[MemoryStore, str, str], None]] = {
    "flipped": lambda store, key, other: flip(store, key),
    "truncated": truncate,
    "deleted": lambda store, key, other: store.delete(key),
    "swapped": swap,
    "emptied": empty,
}


@dataclass(frozen=True, kw_only=True)
class World:
    """Two finished runs, each with a row, an image and a take; what is in their store, and what they became."""

    store: MemoryStore
    runs: list[tuple[Run, dict[str, Path]]]
    objects: dict[str, bytes]
    of_runs: list[list[str]]
    videos: list[dict[str, bytes]]
    encoder: str

    def restore(self) -> MemoryStore:
        for key in list(self.store.list("")):
            self.store.delete(key)
        for key, data in self.objects.items():
            self.store.put(key, data)
        return self.store

    def render(self, run: Run) -> None:
        options = DriveOptions(take_over=True, retry=frozenset(run.plans))
        ended = render(
            self.store, run, LocalWorkers, counts=ONE_OF_EACH, encoder=self.encoder, options=options, observers=()
        )
        assert not ended.failed

    def mend(self, *run_ids: str) -> None:
        """As somebody does who types `submit` and then `retry`, and does what messages say."""
        store = self.store
        for run, files in self.runs:
            if run.run_id not in run_ids:
                continue
            requests.clear(store, run.run_id)
            create(store, run, files)
            try:
                again = open_run(store, run.run_id)
            except ObjectDamaged as exc:
                verb, address = shlex.split(exc.next_command)
                assert verb == "rm"
                store.delete(address.removeprefix("memory:/"))
                again = open_run(store, run.run_id)
            if not again.plans["a"].takes:
                add_take(store, run.run_id, "a", 1, num_chunks=2)
                again = open_run(store, run.run_id)
            self.render(again)


@pytest.fixture(scope="module")
def world(settings: Settings) -> Iterator[World]:
    quick = override(settings, {"runtime": {"num_steps": 4}})
    store = MemoryStore()
    world = World(store=store, runs=[], objects={}, of_runs=[], videos=[], encoder=encoder_identity(find_ffmpeg()))
    # All cases have one store, so the networks are loaded once.
    once: dict[str, Any] = {"settings": quick, "store": store, "encoder": world.encoder}
    patch, loaded = pytest.MonkeyPatch(), cache(lambda kind, run_id: load_task(kind, run_id=run_id, **once))
    patch.setattr("magi_ray.render.driving.local.load_task", lambda kind, *, run_id, **_: loaded(kind, run_id))
    for number, image in enumerate(IMAGES):
        rows = [
            {"job_id": "a", "prompt": f"sea {number}", "seed": number, "num_chunks": 2},
            {"job_id": "b", "prompt": f"hills {number}", "image": str(image), "num_chunks": 1},
        ]
        run, files = prepare(manifest_of(rows, Defaults.of(quick), base=Path("/")), name="m.parquet", settings=quick)
        create(store, run, files)
        add_take(store, run.run_id, "a", 1, num_chunks=2)
        world.runs.append((run, dict(files)))
        world.render(open_run(store, run.run_id))
        requests.request(store, run.run_id, "pause")
        before = {key for objects in world.of_runs for key in objects}
        world.of_runs.append([key for key in store.list("") if key not in before])
        world.videos.append(contents(store, open_run(store, run.run_id)))
    world.objects.update({key: store.get(key) for key in store.list("")})
    yield world
    patch.undo()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGI_RAY_CACHE", str(tmp_path))


def look_at_everything(world: World, store: MemoryStore) -> None:
    """Every command that looks: what it raises is one of our errors, and says what to type."""
    readable, damaged = all_runs(store)
    assert {*readable, *damaged} >= {run.run_id for run, _ in world.runs}
    for run_id in readable:
        with suppress(ObjectDamaged):
            assert run_summary(store, run_id)["videos"] == 2
    for run, _ in world.runs[:1]:
        looks: list[Callable[[], object]] = [
            lambda run=run: run_status(store, open_run(store, run.run_id), find_driver(store, run.run_id)),  # type: ignore[misc]
            lambda run=run: forecast(store, run, world.encoder),  # type: ignore[misc]
        ]
        for look in looks:
            caught: MagiRayError | None = None
            try:
                look()
            except MagiRayError as exc:
                caught = exc
            assert caught is None or (caught.remedy and caught.next_command)


def test_every_kind_of_object_is_tried(world: World) -> None:
    found = [keys.kind_of(key) for key in world.objects]
    assert "" not in found, "an object is written that keys.KINDS does not know"
    assert {kind: found.count(kind) >= 2 for kind in KINDS} == dict.fromkeys(KINDS, True)


CASES = [(kind, damage) for kind in KINDS for damage in DAMAGES if (damage != "truncated" or kind not in UNSEALED)]


@pytest.mark.parametrize(("kind", "damage"), CASES)
def test_whatever_is_damaged_looking_never_fails_and_submit_and_retry_give_the_same_bytes(
    kind: str, damage: str, world: World
) -> None:
    store = world.restore()
    key, other = (next(key for key in objects if keys.kind_of(key) == kind) for objects in world.of_runs)
    DAMAGES[damage](store, key, other)
    look_at_everything(world, store)
    report = verify(store)
    assert all(found.remedy for found in report.damages)
    if damage != "deleted" and kind not in UNSEALED and (kind, damage) != ("take", "swapped"):  # both say the same
        # A record that tells of another video is whole; the video is not the one that it tells of.
        told = {key, key.replace(".json", ".mp4")} if kind == "video record" else {key}
        assert told & {found.key for found in report.damages}
    with suppress(ObjectDamaged):  # a run that cannot be read stops it
        collect(store, garbage(store, min_age_s=0, watch_s=0))
    world.mend(*[run.run_id for run, _ in world.runs][: 2 if damage == "swapped" else 1])
    for (run, _), videos in zip(world.runs, world.videos, strict=True):
        assert contents(store, open_run(store, run.run_id)) == videos
    if damage in ("flipped", "swapped"):
        assert verify(store).damages == []
