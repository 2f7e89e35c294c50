"""Videos without a manifest, called like a diffusers pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import MakeRun

import magi_ray
from magi_ray.api import Model
from magi_ray.errors import InputError, ManifestError, MediaError, SettingsError
from magi_ray.media.reader import read_image, read_video
from magi_ray.render import decode
from magi_ray.render.local import render_here
from magi_ray.settings import Settings
from magi_ray.storage.memory import MemoryStore

MANIFESTS = Path(__file__).parents[1] / "manifests"
IMAGE, CLIP = MANIFESTS / "quickstart-image.png", MANIFESTS / "quickstart-clip.mp4"


@pytest.fixture
def model(settings: Settings) -> Model:
    return Model(settings, store=None)


@pytest.fixture
def submitted(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``submitted(row)``: the very frames that rendering that row hands to the encoder."""
    encoded: list[np.ndarray] = []
    encode = decode.encode_segment

    def keep(frames: np.ndarray, **rest: Any) -> None:
        encoded.append(frames)
        encode(frames, **rest)

    monkeypatch.setattr(decode, "encode_segment", keep)

    def render(**row: Any) -> np.ndarray:
        store = MemoryStore()
        assert not render_here(store, make_run(store, [{"job_id": "row", **row}])).failed
        return np.concatenate(encoded)

    return render


def test_import_of_the_package_loads_neither_torch_nor_ray() -> None:
    watch = "import sys, magi_ray; print('torch' in sys.modules, 'ray' in sys.modules, callable(magi_ray.load))"
    ended = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.split() == ["False", "False", "True"]
    with pytest.raises(AttributeError, match="laod"):
        magi_ray.laod  # noqa: B018


def test_frames_are_those_that_a_submitted_row_encodes(model: Model, submitted: Any) -> None:
    schedule = [{"start_chunk": 0, "prompt": "sea"}, {"start_chunk": 1, "prompt": "storm"}]
    video = model(schedule=schedule, num_frames=72, height=48, width=32, seed=5, num_inference_steps=4)
    assert (video.frames.dtype, video.frames.shape, video.fps, video.seed) == (np.uint8, (72, 48, 32, 3), 24, 5)
    row = submitted(schedule=schedule, num_chunks=3, height=48, width=32, seed=5, num_steps=4)
    assert np.array_equal(video.frames, row)


def test_a_clip_is_continued_as_in_a_submitted_row(model: Model, submitted: Any) -> None:
    chunks = list(model.stream("it sails on", video=CLIP, num_frames=30))
    assert [len(chunk) for chunk in chunks] == [16, 24]
    assert np.array_equal(np.concatenate(chunks), submitted(prompt="it sails on", video=str(CLIP), num_chunks=2))


def test_a_result_can_begin_with_the_frames_of_its_clip(model: Model) -> None:
    first, *rest = model.stream("it sails on", video=CLIP, num_frames=16, include_prefix=True)
    assert np.array_equal(first, read_video(CLIP, width=32, height=32, fps=24, max_frames=32, take="start", fit="crop"))
    assert [len(chunk) for chunk in rest] == [16]


def test_pixels_in_memory_give_what_the_file_gives(model: Model) -> None:
    pixels = read_image(IMAGE, width=32, height=32, fit="crop")
    assert np.array_equal(model("x", image=pixels, num_frames=24).frames, model("x", image=IMAGE, num_frames=24).frames)
    clip = read_video(CLIP, width=32, height=32, fps=24, max_frames=32, take="start", fit="crop")
    assert np.array_equal(model("x", video=clip, num_frames=16).frames, model("x", video=CLIP, num_frames=16).frames)


def test_a_generator_stands_for_its_seed(model: Model) -> None:
    seeded = model("sea", num_frames=24, seed=9)
    assert np.array_equal(model("sea", num_frames=24, generator=torch.Generator().manual_seed(9)).frames, seeded.frames)
    assert not np.array_equal(model("sea", num_frames=24, seed=10).frames, seeded.frames)


def test_a_stream_keeps_no_stage_behind_it(model: Model) -> None:
    kept = []
    for _ in model.stream("sea", num_frames=144):
        kept.append(len([key for key in model._store.list("stages/") if key.endswith("commit.json")]))
    assert kept == [1] * 6
    assert list(model._store.list("stages/")) == []


def test_a_prompt_is_embedded_once_and_the_networks_stay_loaded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model("sea", num_frames=24)
    for network in ("embed.load_t5", "denoise.load_dit"):
        monkeypatch.setattr(f"magi_ray.render.{network}", None)
    assert np.array_equal(model("sea", num_frames=24).frames, first.frames)


def test_with_a_store_a_stopped_stream_goes_on_where_it_stopped(
    settings: Settings, tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole = tmp_path / "store", model("sea", num_frames=72).frames
    weights = settings.weights.dit.parent
    runtime = {"video_size_h": 32, "video_size_w": 32, "num_steps": 8}
    kept = magi_ray.load("magi-tiny", weights=weights, store=folder, runtime=runtime)
    stream = kept.stream("sea", num_frames=72)
    assert np.array_equal(next(stream), whole[:24])
    stream.close()  # type: ignore[attr-defined]
    again = magi_ray.load("magi-tiny", weights=weights, store=folder, runtime=runtime)
    assert np.array_equal(again("sea", num_frames=72).frames, whole)
    monkeypatch.setattr("magi_ray.render.denoise.load_dit", None)
    assert np.array_equal(
        magi_ray.load("magi-tiny", weights=weights, store=folder, runtime=runtime)("sea", num_frames=72).frames, whole
    )


def test_the_callers_number_of_threads_is_back_between_chunks(model: Model) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert [torch.get_num_threads() for _ in model.stream("sea", num_frames=48)] == [2, 2]
    finally:
        torch.set_num_threads(before)


def test_the_negative_prompt_changes_the_result(model: Model) -> None:
    other = Model(model.settings.model_copy(update={"negative_prompt": True}), store=None)
    assert not np.array_equal(other("sea", num_frames=24).frames, model("sea", num_frames=24).frames)


def test_a_folder_with_a_published_config_is_all_that_load_needs(
    settings: Settings, tmp_path: Path, model: Model
) -> None:
    for path in settings.weights.dit.parent.iterdir():
        (tmp_path / path.name).symlink_to(path)
    sections = {"model_config": settings.model, "runtime_config": settings.runtime, "engine_config": settings.engine}
    with pytest.raises(SettingsError, match="holds no published config, but must hold exactly one"):
        magi_ray.load(tmp_path)
    (tmp_path / "tiny_config.json").write_text(json.dumps({k: v.model_dump(mode="json") for k, v in sections.items()}))
    assert np.array_equal(magi_ray.load(tmp_path)("sea", num_frames=24).frames, model("sea", num_frames=24).frames)
    with pytest.raises(SettingsError, match="There is no nowhere"):
        magi_ray.load("nowhere")


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"prompt": "sea", "width": 100}, ManifestError, "100 is not a multiple of 16; use 96 or 112"),
        ({"prompt": "sea", "num_inference_steps": 9}, ManifestError, "divisible by window_size 4"),
        ({"prompt": "sea", "seed": 1, "generator": torch.Generator()}, InputError, "Both seed 1 and a generator"),
        ({"prompt": "sea", "image": np.zeros((8, 8, 4), np.uint8)}, MediaError, r"\[8, 8, 4\], but must be uint8"),
        ({"prompt": "sea", "image": "missing.png"}, ManifestError, "missing.png"),
        ({}, ManifestError, "prompt"),
    ],
)
def test_a_call_that_cannot_work_is_refused_before_a_network_is_loaded(
    arguments: dict[str, Any], kind: type[Exception], message: str, model: Model
) -> None:
    with pytest.raises(kind, match=message):
        model.stream(**arguments)
    assert model._denoiser is None
