"""A submitted manifest, as the store remembers it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import MakeRun, flip, prepared

from magi_ray.errors import InputError, ObjectDamaged, RunNotFound, WeightsError
from magi_ray.manifest import write_manifest
from magi_ray.render.artifacts.latents import load_clean_chunk
from magi_ray.render.driving.local import render_locally
from magi_ray.render.runs.record import FORMAT, all_runs, open_run
from magi_ray.render.runs.submission import create
from magi_ray.render.runs.weights import require_same_weights
from magi_ray.settings import Settings, WeightPaths, override
from magi_ray.storage import keys
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.records import read_record, record_bytes

MANIFESTS = Path(__file__).parents[3] / "manifests"
CLIP = {"job_id": "clip", "video": str(MANIFESTS / "quickstart-clip.mp4")}
TEXT = {"job_id": "text", "prompt": "sea", "num_chunks": 1}


def test_a_run_is_opened_again_as_it_was_submitted(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [TEXT, CLIP | {"prompt": "on", "num_chunks": 2}])
    again = open_run(store, run.run_id)
    assert again.record == run.record
    assert again.plans == run.plans


def test_the_same_submission_is_the_same_run_and_another_seed_is_another(make_run: MakeRun) -> None:
    ids = [make_run(MemoryStore(), rows).run_id for rows in ([TEXT], [TEXT], [TEXT | {"seed": 9}])]
    assert ids[0] == ids[1] != ids[2]


def test_rows_and_the_file_they_are_written_to_are_one_run_and_the_run_keeps_what_it_has_the_digest_of(
    settings: Settings, make_run: MakeRun, tmp_path: Path
) -> None:
    write_manifest([TEXT], tmp_path / "test.parquet")
    of_file, _ = prepared(tmp_path / "test.parquet", settings)
    store = MemoryStore()
    run = make_run(store, [TEXT])
    assert run.run_id == of_file.run_id
    kept = store.get(keys.run_manifest(run.run_id))
    assert hashlib.sha256(kept).hexdigest() == run.record.manifest_sha256


def test_where_the_weights_lie_does_not_make_another_run(settings: Settings, tmp_path: Path, make_run: MakeRun) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(settings.weights.dit.parent)
    elsewhere = override(settings, {"weights": {"dit": moved / "magi", "vae": moved / "vae"}})
    assert make_run(MemoryStore(), [TEXT]).run_id == make_run(MemoryStore(), [TEXT], settings=elsewhere).run_id


def test_a_run_needs_its_media_no_more_once_it_is_submitted(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes((MANIFESTS / "quickstart-clip.mp4").read_bytes())
    store = MemoryStore()
    run = make_run(store, [CLIP | {"prompt": "on", "num_chunks": 1, "video": "clip.mp4"}], base=tmp_path)
    path.unlink()
    assert render_locally(store, open_run(store, run.run_id)).published == ("clip",)


def test_a_shot_transition_of_a_manifest_reaches_the_latents_from_its_chunk_on(make_run: MakeRun) -> None:
    store = MemoryStore()
    chunks = []
    for kv_range in (None, [1, 1, 3, 2]):
        entries = [{"start_chunk": 0, "prompt": "a"}, {"start_chunk": 1, "prompt": "b", "kv_range": kv_range}]
        run = make_run(store, [{"job_id": "cut", "schedule": entries, "num_chunks": 2}])
        assert render_locally(store, run).published == ("cut",)
        chunks.append([load_clean_chunk(store, run.plans["cut"], chunk) for chunk in range(2)])
    assert torch.equal(chunks[0][0], chunks[1][0])
    assert not torch.equal(chunks[0][1], chunks[1][1])


@pytest.mark.parametrize("stage", [3, 5, 7])
def test_a_video_whose_last_chunk_looks_far_back_is_resumed_to_the_same_bits(make_run: MakeRun, stage: int) -> None:
    store = MemoryStore()
    entries = [{"start_chunk": 0, "prompt": "a"}, {"start_chunk": 5, "prompt": "b", "kv_range": [1, 6]}]
    run = make_run(store, [{"job_id": "far", "schedule": entries, "num_chunks": 6}])
    render_locally(store, run)
    plan = run.plans["far"]
    expected = [load_clean_chunk(store, plan, chunk) for chunk in range(6)]
    for key in [key for key in store.list("") if "videos/" in key or any(k in key for k in plan.stage_keys[stage:])]:
        store.delete(key)
    assert render_locally(store, run).published == ("far",)
    for chunk in range(6):
        assert torch.equal(load_clean_chunk(store, plan, chunk), expected[chunk])


def test_a_run_that_does_not_exist_is_an_error_that_names_those_that_do(make_run: MakeRun) -> None:
    store = MemoryStore()
    with pytest.raises(RunNotFound, match="no run 'x'"):
        open_run(store, "x")
    run = make_run(store, [TEXT])
    with pytest.raises(RunNotFound) as caught:
        open_run(store, "x")
    assert run.run_id in caught.value.remedy
    assert all_runs(store) == ([run.run_id], {})


def test_a_run_of_a_newer_format_is_refused(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [TEXT])
    key = keys.run_record(run.run_id)
    store.put(key, record_bytes(read_record(store.get(key)) | {"format": FORMAT + 1}))
    with pytest.raises(InputError, match=r"has format .*, but this magi-ray reads up to"):
        open_run(store, run.run_id)


def old_format(store: MemoryStore, key: str) -> None:
    """Rewrite a record as the first format had it: no seal, no digest of the manifest."""
    body = read_record(store.get(key)) | {"format": 1}
    body.pop("manifest_sha256", None)
    store.put(key, json.dumps(body, indent=1).encode())


def test_a_run_of_the_first_format_is_opened_and_its_videos_stay_published(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [TEXT])
    render_locally(store, run)
    old_format(store, keys.run_record(run.run_id))
    old_format(store, keys.video_record(run.run_id, "text"))
    again = open_run(store, run.run_id)
    assert (again.plans, again.record.format) == (run.plans, 1)
    assert render_locally(store, again).already_published == 1


@pytest.mark.parametrize("damaged", [keys.run_record, keys.run_manifest])
@pytest.mark.parametrize("missing", [False, True])
def test_a_damaged_run_says_so_and_submitting_it_again_mends_it(
    damaged: Callable[[str], str], missing: bool, make_run: MakeRun
) -> None:
    store = MemoryStore()
    run = make_run(store, [TEXT])
    store.put(keys.run_progress(run.run_id), b"{}")  # a driver was there
    key = damaged(run.run_id)
    if missing:
        store.delete(key)
    else:
        flip(store, key)
    with pytest.raises(ObjectDamaged) as caught:
        open_run(store, run.run_id)
    assert caught.value.next_command == f"magi-ray verify {run.run_id} --store memory:"
    if damaged is keys.run_record:
        assert [*all_runs(store)[1]] == [run.run_id]
    make_run(store, [TEXT])
    assert open_run(store, run.run_id).plans == run.plans
    assert all_runs(store) == ([run.run_id], {})


def test_an_intact_run_is_not_written_again(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [TEXT])
    before = {key: store.get(key) for key in store.list("")}
    assert not create(store, replace(run, record=run.record.model_copy(update={"created_unix": 0.0})), {})
    assert {key: store.get(key) for key in store.list("")} == before


def test_one_damaged_run_does_not_hide_the_others(make_run: MakeRun) -> None:
    store = MemoryStore()
    one, two = (make_run(store, [TEXT | {"seed": seed}]).run_id for seed in (1, 2))
    flip(store, keys.run_record(one))
    assert all_runs(store)[0] == [two]
    assert [*all_runs(store)[1]] == [one]


def test_a_run_that_is_being_submitted_is_no_damaged_run(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [TEXT])
    store.delete(keys.run_record(run.run_id))
    assert all_runs(store) == ([], {})


@pytest.mark.parametrize("run_id", ["", "..", "a b", "ü", "x/../y"])
def test_an_id_that_no_run_can_have_is_a_run_that_does_not_exist(run_id: str) -> None:
    with pytest.raises(RunNotFound):
        open_run(MemoryStore(), run_id)


def test_a_run_is_opened_with_weights_that_lie_elsewhere_on_this_machine(
    settings: Settings, make_run: MakeRun, tiny_weights: Path, tmp_path: Path
) -> None:
    store = MemoryStore()
    run = make_run(store, [TEXT])
    (tmp_path / "moved").symlink_to(tiny_weights)
    there = open_run(store, run.run_id, weights=tmp_path / "moved")
    assert there.settings.weights.dit == tmp_path / "moved" / "magi"
    assert there.plans["text"].stage_keys == run.plans["text"].stage_keys
    assert render_locally(store, there).published == ("text",)
    with pytest.raises(WeightsError, match="lacks 4 of the 4 networks"):
        open_run(store, run.run_id, weights=tmp_path)


def test_made_weights_of_another_machine_are_made_in_this_ones_cache(
    settings: Settings, make_run: MakeRun, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAGI_RAY_CACHE", str(tmp_path))
    store = MemoryStore()
    elsewhere = tmp_path / "elsewhere" / "magi-tiny"
    elsewhere.parent.mkdir()
    elsewhere.symlink_to(tiny_weights)
    weights = WeightPaths.under(elsewhere, made=True)
    run = make_run(store, [TEXT], settings=override(settings, {"weights": weights.model_dump()}))
    assert open_run(store, run.run_id).settings.weights == weights
    elsewhere.unlink()
    here = open_run(store, run.run_id)
    assert here.settings.weights == WeightPaths.under(tmp_path / "magi-tiny", made=True)
    require_same_weights(here)
    assert (tmp_path / "magi-tiny" / "special_tokens.npz").is_file()


def test_a_run_is_not_rendered_with_other_weights(
    settings: Settings, make_run: MakeRun, tmp_path: Path, tiny_weights: Path
) -> None:
    other = tmp_path / "special_tokens.npz"
    other.write_bytes((tiny_weights / "special_tokens.npz").read_bytes())
    store = MemoryStore()
    run = make_run(store, [TEXT], settings=override(settings, {"weights": {"special_tokens": other}}))
    data = bytearray(other.read_bytes())
    data[len(data) // 2] ^= 1
    other.write_bytes(data)
    with pytest.raises(WeightsError, match="files of special_tokens have digest"):
        render_locally(store, run)
