"""A damaged object is never used: what it held is made again, and the video is the same."""

from __future__ import annotations

import pytest
import torch
from runs import MakeRun

from magi_ray.errors import DeviceOutOfMemory
from magi_ray.render.inventory import stages_done
from magi_ray.render.latents import telling_out_of_memory
from magi_ray.render.local import render_here
from magi_ray.storage import keys
from magi_ray.storage.memory import MemoryStore

ROW = {"job_id": "a", "prompt": "sea", "num_chunks": 3}


@pytest.mark.parametrize("payload", ["state", "chunk"])
@pytest.mark.parametrize("stage", [3, 5])
def test_a_stage_whose_payload_is_damaged_is_rendered_again(stage: int, payload: str, make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW])
    render_here(store, run)
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
    assert render_here(store, run).published == ("a",)
    assert store.get(keys.video(run.run_id, "a")) == video
    if payload == "chunk" or stage == plan.timeline.num_stages - 1:
        assert stages_done(store, plan) == plan.timeline.num_stages


def test_a_missing_segment_is_encoded_again_and_joined_to_the_same_video(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW])
    render_here(store, run)
    video = store.get(keys.video(run.run_id, "a"))
    [first, *_] = [key for key in store.list("segments/") if key.endswith("commit.json")]
    for key in [first, keys.video_record(run.run_id, "a")]:
        store.delete(key)
    outcome = render_here(store, run)
    assert outcome.stages_rendered == 0
    assert store.get(keys.video(run.run_id, "a")) == video


def test_a_device_that_runs_out_of_memory_is_told_as_such() -> None:
    with (
        pytest.raises(DeviceOutOfMemory, match=r"Stage 3 of job a: CUDA out of memory"),
        telling_out_of_memory("Stage 3 of job a"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")
