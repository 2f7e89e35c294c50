"""Garbage is what no run needs, and nothing else; collecting it changes no video."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import MakeRun, by_progress, contents, flip

from magi_ray.errors import InputError, ObjectDamaged, RunNotFound
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.progress import RunProgress
from magi_ray.render.plans.takes import add_take
from magi_ray.render.runs.record import all_runs, open_run
from magi_ray.render.upkeep.gc import MIN_AGE_S, Item, collect, garbage
from magi_ray.render.upkeep.verify import verify
from magi_ray.storage import keys
from magi_ray.storage.leases import Owner, acquire
from magi_ray.storage.local import LocalStore
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.records import digest, read_record, record_bytes, verified_commit, write_commit

IMAGE = str(Path(__file__).parents[3] / "manifests" / "quickstart-image.png")
ROW = {"job_id": "a", "num_chunks": 3, "schedule": [{"start_chunk": 0, "prompt": "sea"}]}
EDITED = ROW | {"schedule": [*ROW["schedule"], {"start_chunk": 2, "prompt": "storm"}]}  # type: ignore[misc]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def snapshot(store: MemoryStore) -> dict[str, bytes]:
    return {key: store.get(key) for key in store.list("")}


def all_garbage(store: MemoryStore | LocalStore, *forget: str) -> list[Item]:
    found = list(garbage(store, min_age_s=0, forget=forget, watch_s=0))
    assert not [item for item in found if item.key.startswith(keys.RUNS)]
    return found


def test_of_rendered_runs_nothing_is_garbage(make_run: MakeRun) -> None:
    store = MemoryStore()
    for row in (ROW, EDITED, {"job_id": "i", "prompt": "sea", "image": IMAGE, "num_chunks": 1}):
        render_locally(store, make_run(store, [row]))
    assert all_garbage(store) == []


@pytest.mark.parametrize("stage", [1, 3, 5])
def test_of_a_run_that_is_rendered_now_nothing_committed_is_garbage(stage: int, make_run: MakeRun) -> None:
    store, other = MemoryStore(), MemoryStore()
    run = make_run(store, [ROW])
    render_locally(other, make_run(other, [ROW]))

    def look(progress: RunProgress) -> None:
        if progress.videos["a"].stages_done >= stage:
            # What a writer is just about to commit may be there, and even be taken from under it.
            found = all_garbage(store)
            assert {item.reason for item in found} <= {"no commit names it: its writer died, or another was quicker"}
            collect(store, found)

    assert render_locally(store, run, observers=by_progress(look)).published == ("a",)
    assert contents(store, run) == contents(other, run)
    assert verify(store).damages == []


def test_a_forgotten_run_keeps_its_videos_and_what_others_share(make_run: MakeRun) -> None:
    store = MemoryStore()
    first, edited = make_run(store, [ROW]), make_run(store, [EDITED])
    for run in (first, edited):
        render_locally(store, run)
    video = store.get(keys.video(first.run_id, "a"))
    kept = set(edited.plans["a"].stage_keys)
    before = snapshot(store)
    found = all_garbage(store, first.run_id)
    stages = {item.key.split("/")[2] for item in found if item.key.startswith("stages/")}
    assert stages == set(first.plans["a"].stage_keys) - kept
    assert len({item.key.split("/")[2] for item in found if item.key.startswith("segments/")}) == 1
    # A commit before its payloads, in one order.
    assert [item.key for item in found] == [item.key for item in all_garbage(store, first.run_id)]
    for folder in {item.key.rpartition("/")[0] for item in found}:
        names = [item.key.rpartition("/")[2] for item in found if item.key.startswith(folder)]
        assert names[0] == "commit.json"
    objects, size = collect(store, found)
    assert (objects, size) == (len(found), sum(len(before[item.key]) for item in found))
    assert set(before) - set(snapshot(store)) == {item.key for item in found}
    assert store.get(keys.video(first.run_id, "a")) == video
    assert render_locally(store, edited).stages_rendered == 0
    assert render_locally(store, first).already_published == 1
    assert verify(store).damages == []
    assert all_garbage(store, first.run_id) == []


def test_a_forgotten_run_takes_its_captions_prefixes_and_media_with_it(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [{"job_id": "i", "prompt": "sea", "image": IMAGE, "num_chunks": 1}])
    render_locally(store, run)
    collect(store, all_garbage(store, run.run_id))
    assert {key.split("/")[0] for key in store.list("")} == {"runs"}
    # Submitted again it has its image again, and its video was never gone.
    make_run(store, [{"job_id": "i", "prompt": "sea", "image": IMAGE, "num_chunks": 1}])
    assert [key.split("/")[0] for key in store.list("media/")] == ["media"]
    assert verify(store).damages == []


def test_the_stages_of_an_older_take_are_garbage_once_there_is_a_newer_one(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW])
    render_locally(store, run)
    add_take(store, run.run_id, "a", 1, num_chunks=3)
    take = open_run(store, run.run_id)
    render_locally(store, take)
    gone = {item.key.split("/")[2] for item in all_garbage(store) if item.key.startswith("stages/")}
    assert gone == set(run.plans["a"].stage_keys) - set(take.plans["a"].stage_keys) != set()
    expected = contents(store, take)
    collect(store, all_garbage(store))
    assert contents(store, take) == expected
    assert verify(store).damages == []


def test_nothing_younger_than_a_week_is_garbage(make_run: MakeRun) -> None:
    clock = Clock()
    store = MemoryStore(clock)
    run = make_run(store, [ROW])
    render_locally(store, run)
    store.put("probes/x", b"")
    clock.now = MIN_AGE_S - 1
    forget = {"forget": [run.run_id], "watch_s": 0.0}
    assert list(garbage(store, **forget)) == []  # type: ignore[arg-type]
    [young, *_] = [key for key in store.list("stages/") if "/state-" in key]
    store.put(young, store.get(young))
    clock.now = MIN_AGE_S
    found = {item.key for item in garbage(store, **forget)}  # type: ignore[arg-type]
    assert "probes/x" in found
    # One young payload keeps its whole stage.
    assert set(store.list("")) - found == {
        *store.list(keys.RUNS),
        *store.list(young.rpartition("/")[0]),
    }


def test_what_no_commit_names_is_garbage_with_its_reason(make_run: MakeRun, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    run = make_run(store, [ROW])
    render_locally(store, run)
    stage = run.plans["a"].stage_keys[0]
    loose = keys.commit_folder("stage", stage) + "state-dead.safetensors"
    orphan = keys.commit_folder("segment", "0" * 64) + "segment-dead.mp4"
    media = keys.media("1" * 64)
    for key in (loose, orphan, media, "probes/old"):
        store.put(key, b"12345")
    (tmp_path / ".tmp" / "half").write_bytes(b"123")
    reasons = {item.key: item.reason for item in all_garbage(store)}
    assert reasons == {
        loose: "no commit names it: its writer died, or another was quicker",
        orphan: "its commit was never written",
        media: "no run begins from this image or clip",
        "probes/old": "left behind by a check of the store",
        "half": "half written by a process that died",
    }
    assert collect(store, all_garbage(store)) == (5, 23)
    assert all_garbage(store) == []
    assert render_locally(store, run).already_published == 1


@pytest.mark.parametrize("damage", ["flipped", "missing", "newer"])
def test_a_run_that_cannot_be_read_stops_collection_until_it_is_given_up(damage: str, make_run: MakeRun) -> None:
    store = MemoryStore()
    run, other = make_run(store, [ROW]), make_run(store, [EDITED])
    for each in (run, other):
        render_locally(store, each)
    key = keys.run_record(run.run_id)
    match damage:
        case "flipped":
            flip(store, key)
        case "missing":
            store.delete(key)
        case "newer":
            store.put(key, record_bytes(read_record(store.get(key)) | {"format": 99}))
    with pytest.raises(InputError if damage == "newer" else ObjectDamaged) as caught:
        all_garbage(store)
    assert run.run_id in caught.value.message
    assert caught.value.remedy
    collect(store, all_garbage(store, run.run_id))
    assert render_locally(store, other).already_published == 1
    assert all(verified_commit(store, "stage", key) for key in other.plans["a"].stage_keys)


def test_a_run_that_is_being_rendered_cannot_be_forgotten_nor_one_that_there_is_not(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW])
    lease = acquire(store, keys.run_lease(run.run_id), Owner.here("driver"), epoch=1)
    with pytest.raises(InputError, match=r"is being rendered by driver on .*, so it cannot be forgotten"):
        all_garbage(store, run.run_id)
    lease.release()
    assert all_garbage(store, run.run_id) == []
    with pytest.raises(RunNotFound):
        all_garbage(store, "nobody")


def test_a_zombie_that_commits_after_its_payloads_were_collected_changes_nothing_anybody_needs(
    make_run: MakeRun,
) -> None:
    class Slept(MemoryStore):
        """Its writer sleeps between payload and commit; meanwhile everything unneeded is collected."""

        asleep = False

        def put_if_absent(self, key: str, data: bytes) -> bool:
            if self.asleep:
                self.asleep = False
                collect(self, all_garbage(self))
                assert not list(self.list(keys.commit_folder("stage", zombie)))
            return super().put_if_absent(key, data)

    store = Slept()
    run = make_run(store, [ROW])
    render_locally(store, run)
    before = snapshot(store)
    pre_image = {"stage": 0, "of": "a run that was forgotten"}
    zombie = digest(pre_image)
    store.asleep = True
    commit = write_commit(
        store,
        kind="stage",
        key=zombie,
        payloads={"state": b"window"},
        pre_image=pre_image,
        provenance={},
        write_id="zombie",
    )
    assert not store.asleep
    assert verified_commit(store, "stage", zombie) == commit
    assert {key: store.get(key) for key in before} == before
    collect(store, all_garbage(store))
    assert snapshot(store) == before


def test_what_is_written_anew_after_it_was_listed_stays(make_run: MakeRun) -> None:
    clock = Clock()
    store = MemoryStore(clock)
    store.put("probes/x", b"old")
    clock.now = 10
    found = all_garbage(store)
    store.put("probes/x", b"new")
    clock.now = 11
    assert collect(store, found) == (0, 0)
    assert store.get("probes/x") == b"new"


def test_collecting_that_takes_longer_than_the_minimum_age_stops(make_run: MakeRun) -> None:
    # Found by the simulation: stages were listed, the collector slept, and segments made meanwhile looked like garbage.
    clock = Clock()
    store = MemoryStore(clock)
    first = make_run(store, [ROW])
    render_locally(store, first)
    clock.now = 1000
    second = make_run(store, [EDITED])
    found = garbage(store, min_age_s=600, forget=[first.run_id], watch_s=0, clock=clock)
    next(found)
    render_locally(store, second)
    clock.now = 5000
    with pytest.raises(InputError, match="taken 4000 s, but what is 600 s old"):
        collect(store, found)
    assert verify(store, [second.run_id]).damages == []


def test_a_run_submitted_while_garbage_is_collected_keeps_what_it_needs(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW])
    render_locally(store, run)
    for key in list(store.list(keys.run(run.run_id))):
        store.delete(key)

    def ticks() -> Iterator[float]:
        now = 0.0
        while True:
            yield (now := now + 20)

    tick = ticks()
    found = garbage(store, min_age_s=0, clock=lambda: next(tick))
    first = next(found)
    assert make_run(store, [ROW]).run_id == run.run_id
    # Of the folder it was in the middle of it has told already.
    rest = {item.key for item in found}
    assert rest <= set(store.list(first.key.rpartition("/")[0]))


def test_media_of_a_run_submitted_after_they_were_listed_as_garbage_stay(make_run: MakeRun) -> None:
    clock = Clock()
    store = MemoryStore(clock)
    rows = [{"job_id": "i", "prompt": "sea", "image": IMAGE, "num_chunks": 1}]
    first = make_run(store, rows)
    clock.now = 1000
    found = all_garbage(store, first.run_id)
    assert [item.key for item in found] == list(store.list("media/"))
    make_run(store, [rows[0] | {"seed": 2}])
    clock.now = 1001
    assert collect(store, found) == (0, 0)
    assert len(list(store.list("media/"))) == 1


def test_what_others_put_into_the_folder_is_no_run_and_no_commit(make_run: MakeRun, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    run = make_run(store, [ROW | {"num_chunks": 1}])
    render_locally(store, run)
    others = ["runs/.DS_Store", "runs/a note.txt", "stages/README", f"{keys.videos(run.run_id)}a copy.mp4"]
    for name in others:
        (tmp_path / name).write_bytes(b"theirs")
    assert all_runs(store) == ([run.run_id], {})
    assert (all_garbage(store), verify(store).damages) == ([], [])
    assert render_locally(store, run).already_published == 1
    assert all((tmp_path / name).exists() for name in others)
