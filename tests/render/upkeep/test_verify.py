"""Verify finds every flipped byte, says who needs the object and what mends it, and finds nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import MakeRun, flip

from magi_ray.errors import RunNotFound
from magi_ray.manifest import Defaults, manifest_of
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.session import DriveOptions
from magi_ray.render.plans.takes import add_take
from magi_ray.render.runs.record import Run
from magi_ray.render.runs.submission import create, prepare
from magi_ray.render.upkeep.verify import Damage, verify
from magi_ray.settings import Settings
from magi_ray.storage import keys
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.records import read_record

IMAGE = Path(__file__).parents[3] / "manifests" / "quickstart-image.png"
ROWS = [
    {"job_id": "a", "prompt": "sea", "num_chunks": 2},
    {"job_id": "b", "prompt": "sea", "image": str(IMAGE), "num_chunks": 1},
]
UNSEALED = ("progress.json", "results.parquet", "errors.parquet", "lease.json")


@pytest.fixture(scope="module")
def rendered(settings: Settings) -> tuple[Run, dict[str, bytes]]:
    """A rendered run, and all objects of its store."""
    store = MemoryStore()
    manifest = manifest_of(ROWS, Defaults.of(settings), base=Path("/"))
    run, files = prepare(manifest, name="m.parquet", settings=settings)
    create(store, run, files)
    render_locally(store, run)
    return run, {key: store.get(key) for key in store.list("")}


@pytest.fixture
def store(rendered: tuple[Run, dict[str, bytes]]) -> MemoryStore:
    store = MemoryStore()
    for key, data in rendered[1].items():
        store.put(key, data)
    return store


def committed(store: MemoryStore) -> list[str]:
    return [key for key in store.list("") if not key.endswith(UNSEALED) and "/epoch/" not in key]


def test_an_undamaged_store_has_no_damage_and_every_object_is_read(
    store: MemoryStore, rendered: tuple[Run, dict[str, bytes]]
) -> None:
    seen: list[tuple[int, int]] = []
    for run_ids in (None, [rendered[0].run_id]):
        report = verify(store, run_ids, on_progress=lambda *now: seen.append(now))
        assert (report.damages, report.notes, report.loose) == ([], [], 0)
        assert seen[-1] == (report.objects, report.bytes)
        assert report.objects == len(committed(store))


def test_one_flipped_byte_of_any_committed_object_is_found_and_nothing_else(
    store: MemoryStore, rendered: tuple[Run, dict[str, bytes]]
) -> None:
    run, _ = rendered
    kinds = set()
    for key in committed(store):
        good = store.get(key)
        # Of what two runs could share, one kind is tried at more places.
        for place in (0.0, 0.3, 0.7, 1.0) if key.split("/")[0] not in kinds else (0.5,):
            flip(store, key, place)
            [damage] = verify(store).damages
            assert damage.key == key
            assert {run_id for run_id, _ in damage.needed_by} == {run.run_id}, key
            assert damage.next_command
            store.put(key, good)
        kinds.add(key.split("/")[0])
    assert kinds == {"stages", "segments", "texts", "prefixes", "media", "runs"}


def test_every_byte_of_a_runs_record_counts(store: MemoryStore, rendered: tuple[Run, dict[str, bytes]]) -> None:
    run, _ = rendered
    key = keys.run_record(run.run_id)
    size = len(store.get(key))
    good = store.get(key)
    for place in range(0, size, 7):
        flip(store, key, place / (size - 1))
        assert [damage.key for damage in verify(store, [run.run_id]).damages] == [key]
        store.put(key, good)


def test_damage_names_the_rows_both_numbers_and_what_mends_it(
    store: MemoryStore, rendered: tuple[Run, dict[str, bytes]]
) -> None:
    run, _ = rendered
    at = " --store memory:"
    video = keys.video(run.run_id, "a")
    store.put(video, store.get(video)[:-3])
    [damage] = verify(store).damages
    size = read_record(store.get(keys.video_record(run.run_id, "a")))["bytes"]
    assert damage.what == f"has {size - 3} bytes, but {size} were committed"
    assert damage.needed_by == ((run.run_id, "a"),)
    assert damage.next_command == f"magi-ray retry {run.run_id} --job a{at}"
    [text] = [key for key in store.list("texts/") if "/text-" in key]
    store.delete(text)
    damage = verify(store).damages[0]
    assert damage.what.startswith("is missing; ")
    assert damage.needed_by == ((run.run_id, "a"), (run.run_id, "b"))
    [media] = store.list("media/")
    flip(store, media)
    damages = {damage.key: damage for damage in verify(store, [run.run_id]).damages}
    assert damages.keys() == {video, text, media}
    assert damages[media].needed_by == ((run.run_id, "b"),)
    assert damages[media].next_command == f"magi-ray submit m.parquet{at}"
    assert "magi-ray submit" in _only(store, keys.run_manifest(run.run_id)).next_command
    add_take(store, run.run_id, "a", 1, num_chunks=2)
    assert _only(store, keys.take(run.run_id, 1)).next_command == f"rm memory:/{keys.take(run.run_id, 1)}"


def _only(store: MemoryStore, key: str) -> Damage:
    good = store.get(key)
    flip(store, key)
    [damage] = [damage for damage in verify(store).damages if damage.key == key]
    store.put(key, good)
    return damage


def test_what_retry_mends_verify_finds_no_more(store: MemoryStore, make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, ROWS)
    render_locally(store, run)
    [state, *_] = [key for key in store.list("stages/") if "/state-" in key]
    flip(store, state)
    flip(store, keys.video(run.run_id, "b"))
    jobs = {job for damage in verify(store).damages for _, job in damage.needed_by}
    render_locally(store, run, DriveOptions(retry=frozenset(jobs)))
    assert verify(store).damages == []


def test_payloads_that_no_commit_names_are_counted_and_are_no_damage(store: MemoryStore) -> None:
    [commit, *_] = [key for key in store.list("stages/") if key.endswith("commit.json")]
    store.put(commit.replace("commit.json", "state-dead.safetensors"), b"half")
    store.put(keys.commit_folder("text", "0" * 64) + "text-dead.safetensors", b"half")
    report = verify(store)
    assert (report.damages, report.loose) == ([], 2)


def test_what_no_run_needs_is_said_to_be_needed_by_nobody(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, ROWS[:1])
    render_locally(store, run)
    for key in list(store.list(keys.run(run.run_id))):
        store.delete(key)
    [segment, *_] = [key for key in store.list("segments/") if "/segment-" in key]
    flip(store, segment)
    [damage] = verify(store).damages
    assert (damage.needed_by, damage.next_command) == ((), "magi-ray gc --store memory:")


def test_records_without_a_digest_of_their_own_are_named_as_not_checked(
    store: MemoryStore, rendered: tuple[Run, dict[str, bytes]]
) -> None:
    run, _ = rendered
    for key in (keys.run_record(run.run_id), keys.video_record(run.run_id, "a")):
        body = read_record(store.get(key)) | {"format": 1}
        body.pop("manifest_sha256", None)
        store.put(key, json.dumps(body, indent=1).encode())
    report = verify(store)
    assert report.damages == []
    assert len(report.notes) == 2
    flip(store, keys.video(run.run_id, "a"))
    assert [damage.key for damage in verify(store).damages] == [keys.video(run.run_id, "a")]


def test_what_goes_away_while_it_is_read_is_no_damage(store: MemoryStore) -> None:
    class Collected(MemoryStore):
        """Garbage collection takes a commit and its payloads between our reading of the two."""

        def get(self, key: str) -> bytes:
            data = super().get(key)
            if key.startswith("segments/"):
                for other in list(self.list(key.removesuffix("commit.json"))):
                    self.delete(other)
            return data

    collected = Collected()
    for key in store.list(""):
        collected.put(key, store.get(key))
    assert verify(collected).damages == []


def test_an_unknown_run_is_not_taken_for_a_whole_one(store: MemoryStore) -> None:
    with pytest.raises(RunNotFound):
        verify(store, ["nobody"])
