"""Runs in tests: the type of the fixture ``make_run``, and what a rendered run holds.

A module of its own, since several conftest.py bear one name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from magi_ray.manifest import Defaults, read_manifest
from magi_ray.render.artifacts.latents import load_clean_chunk
from magi_ray.render.driving.progress import RunProgress
from magi_ray.render.driving.reports import Observer
from magi_ray.render.runs.record import Run
from magi_ray.render.runs.submission import prepare
from magi_ray.settings import Settings
from magi_ray.storage import keys
from magi_ray.storage.store import Store

MakeRun = Callable[..., Run]


def prepared(path: Path, settings: Settings) -> tuple[Run, Mapping[str, Path]]:
    """What submitting the manifest at ``path`` prepares: the run, and the media it needs."""
    return prepare(read_manifest(path, Defaults.of(settings)), name=path.name, settings=settings)


def contents(store: Store, run: Run) -> dict[str, bytes]:
    """Every clean latent and every mp4 of ``run``, by name."""
    found = {}
    for job_id, plan in run.plans.items():
        found[f"{job_id}.mp4"] = store.get(keys.video(run.run_id, job_id))
        for chunk in range(plan.timeline.num_chunks):
            found[f"{job_id}/{chunk}"] = load_clean_chunk(store, plan, chunk).numpy().tobytes()
    return found


def flip(store: Store, key: str, place: float = 0.5) -> None:
    """Alter one byte of an object. ``place``: where, from 0 (the first byte) to 1 (the last)."""
    data = bytearray(store.get(key))
    data[round(place * (len(data) - 1))] ^= 1
    store.put(key, bytes(data))


def stage_commits(store: Store) -> dict[str, bytes]:
    """The commit object of every stage in ``store``."""
    return {key: store.get(key) for key in store.list("stages/") if key.endswith("/commit.json")}


def by_progress(call: Callable[[RunProgress], None]) -> list[Observer]:
    """As ``observers``: one that looks only at how far a run is."""
    return [lambda _, progress: call(progress)]
