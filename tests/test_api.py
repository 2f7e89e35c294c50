"""MAGI-1 from Python: the same frames as a run, chunk by chunk."""

from __future__ import annotations

import gc
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
from magi_ray.errors import ManifestError, MediaError, SettingsError
from magi_ray.media.reader import read_image
from magi_ray.models.vae.model import load_vae
from magi_ray.render.artifacts.latents import load_clean_chunk
from magi_ray.render.driving.local import render_locally
from magi_ray.render.tasks.decode_network import decode_chunk
from magi_ray.settings import Settings
from magi_ray.storage.memory import MemoryStore

MANIFESTS = Path(__file__).parents[1] / "manifests"
IMAGE, CLIP = MANIFESTS / "quickstart-image.png", MANIFESTS / "quickstart-clip.mp4"


@pytest.fixture(scope="module")
def model(settings: Settings) -> Model:
    return Model(settings)


@pytest.mark.parametrize("start", [{}, {"image": str(IMAGE)}, {"video": str(CLIP)}], ids=["text", "image", "video"])
def test_a_call_gives_the_very_frames_that_a_run_encodes(
    start: dict[str, str], model: Model, settings: Settings, make_run: MakeRun
) -> None:
    store = MemoryStore()
    run = make_run(store, [{"job_id": "a", "prompt": "sea", "num_chunks": 2, "seed": 5} | start])
    assert not render_locally(store, run).failed
    plan = run.plans["a"]
    vae = load_vae(settings.weights.vae, device="cpu", attention=settings.numeric.attention)
    encoded = np.concatenate([decode_chunk(vae, load_clean_chunk(store, plan, i), plan, i) for i in range(2)])
    video = model(prompt="sea", num_chunks=2, seed=5, **start)
    assert video.fps == 24
    assert video.frames.dtype == np.uint8
    assert video.frames.shape == (plan.timeline.num_frames, 32, 32, 3)
    assert np.array_equal(video.frames, encoded)


def test_chunks_are_streamed_and_are_the_video(model: Model) -> None:
    options: dict[str, Any] = {"prompt": "sea", "num_frames": 60, "generator": torch.Generator().manual_seed(11)}
    chunks = list(model.stream(**options))
    assert [len(chunk) for chunk in chunks] == [24, 24, 24]
    assert np.array_equal(np.concatenate(chunks), model(prompt="sea", num_frames=60, seed=11).frames)


def test_a_stream_keeps_nothing_of_what_it_has_shown(settings: Settings) -> None:
    model = Model(settings)
    sizes = []
    for _ in model.stream(prompt="sea", num_chunks=6):
        gc.collect()
        sizes.append(sum(len(model._store.get(key)) for key in model._store.list("stages/")))
    assert len(sizes) == 6
    # The window of at most three chunks in flight and the chunk just shown, twice: the next stage may be written.
    assert max(sizes[1:]) <= 2 * max(sizes[:1])
    assert not list(model._store.list("stages/"))


def test_a_mistake_is_told_before_the_first_chunk_is_asked_for(model: Model) -> None:
    with pytest.raises(ManifestError, match="100 is not a multiple of 16; use 96 or 112"):
        model.stream(prompt="sea", width=100)
    with pytest.raises(ManifestError, match="prompt"):
        model.stream()
    with pytest.raises(SettingsError, match="num_frames stands beside num_chunks"):
        model.stream(prompt="sea", num_frames=24, num_chunks=1)
    with pytest.raises(SettingsError, match="seed stands beside generator"):
        model.stream(prompt="sea", seed=1, generator=torch.Generator())


def test_a_stream_leaves_the_callers_threads_alone(model: Model) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert [torch.get_num_threads() for _ in model.stream(prompt="sea", num_chunks=2)] == [2, 2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_frames_of_new_video_are_counted_after_a_clip_and_the_clip_may_be_included(model: Model) -> None:
    options: dict[str, Any] = {"prompt": "on", "video": CLIP, "num_frames": 20, "seed": 3}
    # 32 frames of the clip leave 16 new ones in the first chunk: 20 take a second.
    alone = model(**options).frames
    assert len(alone) == 16 + 24
    both = model(**options, include_prefix=True).frames
    assert len(both) == 32 + 16 + 24
    assert np.array_equal(both[32:], alone)


@pytest.mark.parametrize(
    "pixels", [np.zeros((32, 32, 4), np.uint8), np.zeros((32, 32, 3)), np.zeros((32, 32), np.uint8)]
)
def test_other_pixels_than_rgb_bytes_are_refused(model: Model, pixels: np.ndarray) -> None:
    with pytest.raises(MediaError, match=r"must be uint8 \[height, width, 3\]"):
        model.stream(prompt="sea", image=pixels)


def test_an_image_may_be_an_array_of_pixels(model: Model) -> None:
    pixels = read_image(IMAGE, width=32, height=32, fit="crop")
    from_array = model(prompt="sea", image=pixels, num_chunks=1).frames
    assert from_array.shape == (24, 32, 32, 3)
    assert not np.array_equal(from_array, model(prompt="sea", num_chunks=1).frames)


def test_a_schedule_reaches_the_chunks(model: Model) -> None:
    schedule = [{"start_chunk": 0, "prompt": "sea"}, {"start_chunk": 1, "prompt": "a red desert"}]
    told, plain = (
        model(num_chunks=2, seed=1, **options).frames for options in ({"schedule": schedule}, {"prompt": "sea"})
    )
    assert not np.array_equal(told[24:], plain[24:])


def test_load_takes_a_preset_a_job_and_settings_of_its_own(tiny_weights: Path, tmp_path: Path) -> None:
    small = {"runtime": {"video_size_h": 32, "video_size_w": 32, "num_steps": 8}}
    model = magi_ray.load("magi-tiny", weights=tiny_weights, settings=small, device="cpu")
    assert model(prompt="sea", num_chunks=1).frames.shape == (24, 32, 32, 3)
    (tmp_path / "mine.toml").write_text('preset = "magi-tiny"\n[runtime]\nnum_steps = 8\n')
    assert magi_ray.load(tmp_path / "mine.toml", weights=tiny_weights).settings.runtime.num_steps == 8


def test_load_of_an_unknown_name_or_folder_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no preset 'magi-tny'"):
        magi_ray.load("magi-tny")
    with pytest.raises(SettingsError, match="holds no whole variant"):
        magi_ray.load(tmp_path)


def test_load_takes_the_folder_of_a_download(tiny_weights: Path, tmp_path: Path) -> None:
    release = tmp_path / "ckpt" / "magi" / "4.5B_distill"
    release.mkdir(parents=True)
    (release / "inference_weight.distill").symlink_to(tiny_weights / "magi" / "inference_weight")
    for network in ("vae", "t5"):
        (tmp_path / "ckpt" / network).symlink_to(tiny_weights / network)
    (tmp_path / "special_tokens.npz").symlink_to(tiny_weights / "special_tokens.npz")
    assert magi_ray.load(tmp_path).settings.name == "4.5B-distill"
    with pytest.raises(SettingsError, match=r"holds 24B, 4.5B, but load needs to know which one"):
        magi_ray.load(tiny_weights)


def test_importing_magi_ray_costs_nothing() -> None:
    code = "import sys, magi_ray; sys.exit(bool({'torch', 'ray', 'numpy', 'pyarrow', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
