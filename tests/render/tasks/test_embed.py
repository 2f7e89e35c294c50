"""Captions and prefixes: embedded once, by content."""

from __future__ import annotations

import torch
from runs import MakeRun

from magi_ray.render.artifacts.latents import load_clean_chunk, load_tensor
from magi_ray.render.driving.local import render_locally
from magi_ray.settings import Settings, override
from magi_ray.storage.memory import MemoryStore

ROW = {"job_id": "a", "prompt": "a boat on calm water", "num_chunks": 1}


def test_rows_with_one_prompt_share_its_embedding(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW, ROW | {"job_id": "b", "seed": 2}])
    render_locally(store, run)
    assert len({plan.caption_digests for plan in run.plans.values()}) == 1
    assert len([key for key in store.list("texts/") if key.endswith("commit.json")]) == 1


def test_t5_computes_in_bfloat16_by_choice(settings: Settings, make_run: MakeRun) -> None:
    found = []
    for chosen in (settings, override(settings, {"text": {"dtype": "bfloat16"}})):
        store = MemoryStore()
        run = make_run(store, [ROW], settings=chosen)
        assert not render_locally(store, run).failed
        found.append(load_tensor(store, "text", run.plans["a"].caption_digests[0]))
    exact, rounded = found
    assert exact.dtype == rounded.dtype == torch.float32
    assert torch.equal(rounded.bfloat16().float(), rounded)
    assert 0 < float((exact - rounded).abs().max() / exact.abs().max()) < 0.1


def test_a_negative_prompt_changes_the_video(settings: Settings, make_run: MakeRun) -> None:
    found = []
    for chosen in (settings, override(settings, {"negative_prompt": True})):
        store = MemoryStore()
        run = make_run(store, [ROW], settings=chosen)
        assert not render_locally(store, run).failed
        found.append(load_clean_chunk(store, run.plans["a"], 0))
    assert not torch.equal(*found)
