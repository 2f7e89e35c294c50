"""A damaged object is never used: what it held is made again, and the video is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import MakeRun, by_progress, contents, flip

from magi_ray.errors import DeviceOutOfMemory
from magi_ray.manifest import Defaults, manifest_of
from magi_ray.media.encoder import encoder_identity, find_ffmpeg
from magi_ray.render.artifacts.latents import convert_out_of_memory
from magi_ray.render.artifacts.videos import published
from magi_ray.render.driving.inventory import stages_done
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.progress import RunProgress
from magi_ray.render.driving.session import DriveOptions
from magi_ray.render.plans.takes import add_take
from magi_ray.render.runs.record import Run, open_run
from magi_ray.render.runs.submission import create, prepare
from magi_ray.render.tasks.finish import load_finisher
from magi_ray.settings import Settings
from magi_ray.storage import keys
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.records import verified_commit

ROW = {"job_id": "a", "prompt": "sea", "num_chunks": 3}


@pytest.mark.parametrize("payload", ["state", "chunk"])
@pytest.mark.parametrize("stage", [3, 5])
def test_a_stage_whose_payload_is_damaged_is_rendered_again(stage: int, payload: str, make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW])
    render_locally(store, run)
    video = store.get(keys.video(run.run_id, "a"))
    plan = run.plans["a"]
    # As if the run had been killed before decoding: the latents are needed once more.
    for key in [*store.list("segments/"), *store.list(keys.videos(run.run_id))]:
        store.delete(key)
    folder = keys.commit_folder("stage", plan.stage_keys[stage])
    [damaged] = list(store.list(folder + payload))
    data = bytearray(store.get(damaged))
    data[-1] ^= 1
    store.put(damaged, bytes(data))
    assert render_locally(store, run).published == ("a",)
    assert store.get(keys.video(run.run_id, "a")) == video
    if payload == "chunk" or stage == plan.timeline.num_stages - 1:
        assert stages_done(store, plan) == plan.timeline.num_stages


FAR: dict[str, Any] = {
    "job_id": "far", "video": str(Path(__file__).parents[3] / "manifests" / "quickstart-clip.mp4"),
    "prefix_frames": 32, "include_prefix": True, "num_chunks": 6,
    "schedule": [{"start_chunk": 0, "prompt": "sea"}, {"start_chunk": 4, "prompt": "storm", "kv_range": [1, 6]}],
}  # fmt: skip


PLACES = (0.0, 0.6, 1.0)


class Death(BaseException):
    pass


@pytest.fixture(scope="module")
def disturbed(settings: Settings) -> tuple[Run, dict[str, bytes], dict[str, bytes]]:
    """A run whose fifth chunk looks far back: what it renders undisturbed, and the store when it died at stage 6."""
    manifest = manifest_of([FAR], Defaults.of(settings), base=Path("/"))
    run, files = prepare(manifest, name="far.parquet", settings=settings)
    store, dead = MemoryStore(), MemoryStore()
    create(store, run, files)
    create(dead, run, files)
    render_locally(store, run)

    def die(progress: RunProgress) -> None:
        if progress.videos["far"].stages_done == 6:
            raise Death

    with pytest.raises(Death):
        render_locally(dead, run, observers=by_progress(die))
    return run, contents(store, run), {key: dead.get(key) for key in dead.list("")}


@pytest.mark.parametrize("folder", ["stages", "segments", "texts", "prefixes"])
def test_whatever_is_damaged_in_mid_chain_is_made_again_and_the_video_is_the_same(
    folder: str, disturbed: tuple[Run, dict[str, bytes], dict[str, bytes]]
) -> None:
    run, expected, dead = disturbed
    damaged = [key for key in dead if key.startswith(f"{folder}/")]
    assert damaged
    if folder == "stages":  # of three objects a stage, every one of each kind somewhere
        damaged = damaged[::2]
    for number, key in enumerate(damaged):
        store = MemoryStore()
        for name, data in dead.items():
            store.put(name, data)
        flip(store, key, PLACES[number % 3])
        assert render_locally(store, run).published == ("far",), key
        assert contents(store, run) == expected, key


def test_a_clean_chunk_that_is_looked_back_to_is_rendered_again_though_its_segment_is_whole(
    disturbed: tuple[Run, dict[str, bytes], dict[str, bytes]],
) -> None:
    run, expected, dead = disturbed
    plan = run.plans["far"]
    store = MemoryStore()
    for name, data in dead.items():
        store.put(name, data)
    first = plan.timeline.finishing_stage(0)
    # Its chunk, and the window of the stage before, from which it would be rendered again.
    for stage, payload in ((first, "chunk"), (first - 1, "state")):
        [key] = store.list(keys.commit_folder("stage", plan.stage_keys[stage]) + payload)
        flip(store, key)
    assert stages_done(store, plan) == first - 1
    assert render_locally(store, run).published == ("far",)
    assert contents(store, run) == expected


def test_a_row_that_is_read_again_has_everything_damaged_made_again(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW | {"num_chunks": 2, "image": FAR["video"].replace("clip.mp4", "image.png")}])
    render_locally(store, run)
    whole = {key: store.get(key) for key in store.list("") if not key.endswith("commit.json")}
    videos = [keys.video(run.run_id, "a"), keys.video_record(run.run_id, "a")]
    committed = [key for key in store.list("") if not key.startswith(("runs/", "media/"))]
    for number, key in enumerate([*videos, *committed]):
        flip(store, key, PLACES[number % 3])
        assert render_locally(store, run, DriveOptions(retry=frozenset({"a"}))).published == ("a",)
        assert all(verified_commit(store, kind, name.split("/")[-2]) for kind, name in commits(store)), key
        assert store.get(videos[0]) == whole[videos[0]]
        assert published(store, run.run_id, run.plans["a"], reread=True), key
    assert render_locally(store, run, DriveOptions(retry=frozenset({"a"}))).already_published == 1


def commits(store: MemoryStore) -> list[tuple[keys.CommitKind, str]]:
    kinds: tuple[keys.CommitKind, ...] = ("stage", "segment", "text", "prefix")
    return [(kind, key) for kind in kinds for key in store.list(keys.commits(kind)) if key.endswith("commit.json")]


@pytest.mark.parametrize("damage", ["cut", "gone", "record"])
def test_a_published_video_that_is_cut_or_gone_is_joined_again_by_the_next_resume(
    damage: str, make_run: MakeRun
) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW])
    render_locally(store, run)
    key = keys.video(run.run_id, "a")
    video = store.get(key)
    match damage:
        case "cut":
            store.put(key, video[:-1])
        case "gone":
            store.delete(key)
        case "record":
            flip(store, keys.video_record(run.run_id, "a"))
    outcome = render_locally(store, run)
    assert (outcome.already_published, outcome.stages_rendered) == (0, 0)
    assert store.get(key) == video
    assert published(store, run.run_id, run.plans["a"], reread=True)


def test_a_late_finisher_changes_nothing_whether_of_this_take_or_of_an_older_one(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW])
    render_locally(store, run)
    ffmpeg = find_ffmpeg()
    encoder = encoder_identity(ffmpeg)
    add_take(store, run.run_id, "a", 1, num_chunks=3)
    take = open_run(store, run.run_id)
    for late in ([run], [run, take]):
        before = {key: store.get(key) for key in store.list(keys.videos(run.run_id))}
        for each in late:
            finisher = load_finisher(store, run.run_id, ffmpeg=ffmpeg, encoder=encoder)
            assert list(finisher.carry_out(each.plans["a"])) == []
        assert {key: store.get(key) for key in store.list(keys.videos(run.run_id))} == before
        # A newer take is published in the place of the older one.
        assert render_locally(store, take).failed == ()
        assert published(store, run.run_id, take.plans["a"])


def test_a_missing_segment_is_encoded_again_and_joined_to_the_same_video(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW])
    render_locally(store, run)
    video = store.get(keys.video(run.run_id, "a"))
    [first, *_] = [key for key in store.list("segments/") if key.endswith("commit.json")]
    for key in [first, keys.video_record(run.run_id, "a")]:
        store.delete(key)
    outcome = render_locally(store, run)
    assert outcome.stages_rendered == 0
    assert store.get(keys.video(run.run_id, "a")) == video


def test_a_device_that_runs_out_of_memory_is_told_as_such() -> None:
    with (
        pytest.raises(DeviceOutOfMemory, match=r"Stage 3 of job a: CUDA out of memory"),
        convert_out_of_memory("Stage 3 of job a"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")
