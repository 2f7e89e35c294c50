"""MAGI-1 from Python: the same frames as a run, chunk by chunk."""

from __future__ import annotations

import contextlib
import gc
import io
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import MakeRun

import magi_ray
from magi_ray.api import Model
from magi_ray.errors import InputError, ManifestError, MediaError, SettingsError
from magi_ray.media.arrays import Frames, clip_pixels, write_clip, write_picture
from magi_ray.media.reader import read_image, read_video
from magi_ray.models.text.t5 import TextEncoder
from magi_ray.models.vae.model import load_vae
from magi_ray.render.artifacts.latents import load_clean_chunk
from magi_ray.render.driving.local import render_locally
from magi_ray.render.runs.shape import size_like
from magi_ray.render.tasks.decode_network import decode_chunk
from magi_ray.settings import Settings, override
from magi_ray.storage import keys
from magi_ray.storage.memory import MemoryStore

MANIFESTS = Path(__file__).parents[1] / "manifests"
IMAGE, CLIP = MANIFESTS / "quickstart-image.png", MANIFESTS / "quickstart-clip.mp4"


@pytest.fixture(scope="module")
def model(settings: Settings) -> Model:
    model = Model(settings)
    model.set_progress_bar_config(disable=True)
    return model


@pytest.mark.parametrize("start", [{}, {"image": str(IMAGE)}, {"video": str(CLIP)}], ids=["text", "image", "video"])
def test_a_call_gives_the_very_frames_that_a_run_encodes(
    start: dict[str, str], model: Model, settings: Settings, make_run: MakeRun
) -> None:
    store = MemoryStore()
    run = make_run(store, [{"job_id": "a", "prompt": "sea", "num_chunks": 2, "seed": 5} | start])
    assert not render_locally(store, run).failed
    plan = run.plans["a"]
    vae = load_vae(settings.weights.vae, device="cpu", attention=settings.numeric.attention)
    encoded = np.concatenate(
        [decode_chunk(vae, load_clean_chunk(store, plan, i), plan, i) for i in range(plan.timeline.num_chunks)]
    )
    video = model(prompt="sea", num_chunks=2, seed=5, height=32, width=32, **start)
    assert video.fps == 24
    assert video.frames.dtype == np.uint8
    assert video.frames.shape == (plan.timeline.num_frames, 32, 32, 3)
    assert np.array_equal(video.frames, encoded)


def test_chunks_are_streamed_and_are_the_video(model: Model) -> None:
    options: dict[str, Any] = {"prompt": "sea", "num_frames": 60, "generator": torch.Generator().manual_seed(11)}
    chunks = list(model.stream(**options))
    assert [len(chunk) for chunk in chunks] == [24, 24, 24]
    assert np.array_equal(np.concatenate(chunks), model(prompt="sea", num_frames=60, seed=11).frames)


def test_a_model_that_is_called_again_and_again_does_not_grow(settings: Settings) -> None:
    model, small = Model(settings), {"num_chunks": 1, "height": 16, "width": 16}
    model.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).integers(0, 255, (4, 256, 256, 3), dtype=np.uint8)  # some 200 kB a picture

    def stores() -> int:
        gc.collect()
        return sum(type(thing) is MemoryStore for thing in gc.get_objects())

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def use_it() -> None:
        """Once to the end, once left early, once wrongly, once ended by a callback."""
        model(prompt="sea", image=noise[0], **small)
        stream = model.stream("sea", video=noise, **{**small, "num_chunks": 3})
        next(stream)
        stream.close()
        with pytest.raises(ManifestError):
            model("sea", **{**small, "height": 17})
        with pytest.raises(KeyboardInterrupt):
            model("sea", callback_on_step_end=stop, **small)
        gc.collect()

    others = stores()
    use_it()
    tracemalloc.start()
    use_it()
    before, _ = tracemalloc.get_traced_memory()
    use_it()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < noise[0].nbytes
    assert stores() == others


def test_embeddings_are_kept_for_the_next_call_up_to_a_limit(
    model: Model, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode = TextEncoder.encode
    monkeypatch.setattr(
        TextEncoder, "encode", lambda self, captions: encoded.extend(captions) or encode(self, captions)
    )
    model("one", num_chunks=1, height=16, width=16)
    [one] = [sum(map(len, objects.values())) for objects in list(model._texts._kept.values())[-1:]]
    encoded.clear()
    monkeypatch.setattr("magi_ray.api.model.KEPT_TEXT_BYTES", 2.5 * one)
    model = Model(settings)
    model.set_progress_bar_config(disable=True)
    for prompt in ("one", "two", "one", "three", "one", "two"):
        model(prompt, num_chunks=1, height=16, width=16)
    assert encoded == ["one", "two", "three", "two"]


def test_a_stream_keeps_nothing_of_what_it_has_shown(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    store, sizes = MemoryStore(), []
    monkeypatch.setattr("magi_ray.storage.memory.MemoryStore", lambda: store)
    for _ in Model(settings).stream(prompt="sea", num_chunks=6):
        gc.collect()
        sizes.append(sum(len(store.get(key)) for key in store.list("stages/")))
    assert len(sizes) == 6
    # The window of at most three chunks in flight and the chunk just shown, twice: the next stage may be written.
    assert max(sizes[1:]) <= 2 * max(sizes[:1])
    assert not list(store.list("stages/"))


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
    # 32 frames of the clip leave 16 new ones in the first chunk: 20 take a second, whose end is not shown.
    alone = model(**options).frames
    assert len(alone) == 20
    both = model(**options, include_prefix=True).frames
    assert len(both) == 32 + 20
    assert np.array_equal(both[32:], alone)


def gradient() -> np.ndarray:
    """uint8 RGB [32, 32, 3], every row and column another."""
    ramp = np.arange(32, dtype=np.uint8) * 8
    return np.stack([*np.meshgrid(ramp, ramp), np.full((32, 32), 90, np.uint8)], axis=-1)


def turned(pixels: np.ndarray) -> Image.Image:
    """A phone's picture: lying on its side, with the note that it does."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.rot90(pixels)).save(buffer, "PNG", exif=exif)
    return Image.open(buffer)


GREY = gradient()[..., 0]
SAME_PICTURE: dict[str, Any] = {
    "PIL": Image.fromarray(gradient()),
    "PIL with EXIF orientation": turned(gradient()),
    "PIL palette": Image.fromarray(gradient()).convert("RGBA"),
    "bytes": gradient(),
    "float32": gradient().astype(np.float32) / 255,
    "float64, a batch of one": gradient()[None] / 255.0,
    "channels first": np.moveaxis(gradient(), 2, 0),
    "int64": gradient().astype(np.int64),
    "uint16": gradient().astype(np.uint16) * 257,
    "with alpha": np.dstack([gradient(), np.full((32, 32), 255, np.uint8)]),
    "tensor as torchvision has it": torch.from_numpy(gradient()).permute(2, 0, 1).float() / 255,
    "tensor, a batch of one in bfloat16": (torch.from_numpy(gradient()).permute(2, 0, 1).float() / 255)[None],
    "tensor of bytes that wants a gradient": torch.from_numpy(gradient() / 255.0).requires_grad_(),
}


@pytest.mark.parametrize("image", SAME_PICTURE.values(), ids=SAME_PICTURE.keys())
def test_a_picture_may_be_given_in_any_form(image: object, tmp_path: Path) -> None:
    path = write_picture(image, tmp_path / "image")
    assert np.array_equal(read_image(path, width=32, height=32, fit="crop"), gradient())


SAME_GREY = {
    "array": GREY,
    "one channel": GREY[..., None],
    "tensor": torch.from_numpy(GREY),
    "L": Image.fromarray(GREY),
    "I;16": Image.fromarray(GREY.astype(np.uint16) * 257),
    "F": Image.fromarray(GREY.astype(np.float32) / 255),
    "P": Image.fromarray(GREY).convert("P"),
    "LA": Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (32, 32), 255)]),
    "CMYK": Image.fromarray(np.stack([*[np.zeros_like(GREY)] * 3, 255 - GREY], axis=-1), "CMYK"),
    "HSV": Image.fromarray(np.stack([*[np.zeros_like(GREY)] * 2, GREY], axis=-1), "HSV"),
}


@pytest.mark.parametrize("image", SAME_GREY.values(), ids=SAME_GREY.keys())
def test_a_grey_picture_too(image: object, tmp_path: Path) -> None:
    found = read_image(write_picture(image, tmp_path / "image"), width=32, height=32, fit="crop")
    assert np.array_equal(found, np.stack([GREY] * 3, axis=-1))


def test_a_picture_of_one_bit_is_black_and_white(tmp_path: Path) -> None:
    path = write_picture(Image.fromarray(GREY > 99), tmp_path / "image")
    assert np.array_equal(read_image(path, width=32, height=32, fit="crop")[..., 1], (GREY > 99) * np.uint8(255))


CLIP_PIXELS = np.stack([np.roll(gradient(), 3 * number, axis=0) for number in range(9)])
SAME_CLIP: dict[str, Any] = {
    "Frames": Frames(CLIP_PIXELS),
    "bytes": CLIP_PIXELS,
    "float, a batch of one": CLIP_PIXELS[None] / 255.0,
    "list of PIL": [Image.fromarray(frame) for frame in CLIP_PIXELS],
    "list of arrays": list(CLIP_PIXELS / 255.0),
    "tensor as diffusers has it": (torch.from_numpy(CLIP_PIXELS).permute(0, 3, 1, 2).float() / 255)[None],
}


@pytest.mark.parametrize("clip", SAME_CLIP.values(), ids=SAME_CLIP.keys())
def test_a_clip_may_be_given_as_its_frames(clip: object, tmp_path: Path) -> None:
    path = write_clip(clip, tmp_path / "clip", fps=24)
    found = read_video(path, width=32, height=32, fps=24, max_frames=99, part="start", fit="crop")
    assert np.array_equal(found, CLIP_PIXELS)


@pytest.mark.parametrize(
    ("option", "pixels", "says"),
    [
        ("image", np.zeros((32, 32, 5)), r"image: float64 \[32, 32, 5\] must be \[H, W\], \[H, W, 3\] or \[3, H, W\]"),
        ("image", gradient() / 127.5 - 1, r"(?s)values from -1 to .*\(x \+ 1\) / 2"),
        ("image", gradient() * 1.0, "Divide 0 … 255 by 255"),
        ("image", np.full((32, 32, 3), np.nan), "not finite"),
        ("image", gradient().astype(np.int32) * 9, "from 0 to 2232"),
        ("image", [Image.new("RGB", (8, 8))] * 2, r"(?s)\[2, 8, 8, 3\].*call once for each"),
        ("image", object(), "image: object"),
        ("video", gradient(), r"video: uint8 \[32, 32, 3\] must be \[T, H, W\]"),
        ("video", [np.zeros((8, 8, 3)), np.zeros((9, 8, 3))], "have different sizes"),
    ],
)
def test_pixels_that_mean_nothing_are_refused(model: Model, option: str, pixels: Any, says: str) -> None:
    with pytest.raises(MediaError, match=says):
        model.stream(prompt="sea", **{option: pixels})


def test_a_video_is_continued_as_its_frames_are(model: Model) -> None:
    first = model("sea", num_chunks=1)
    size = {"width": 32, "height": 32, "num_chunks": 1, "seed": 3}
    again, frames = (model("sea goes on", video=clip, **size).frames for clip in (first, first.frames))
    assert np.array_equal(again, frames)


def test_a_video_begins_from_the_pixels_it_is_given(model: Model) -> None:
    plain = np.asarray(model(prompt="sea", num_chunks=1, height=32, width=32).frames)
    pixels = read_image(IMAGE, width=32, height=32, fit="crop")
    assert not np.array_equal(np.asarray(model(prompt="sea", image=pixels, num_chunks=1).frames), plain)
    clip = model(prompt="sea", video=CLIP_PIXELS, num_frames=24, include_prefix=True).frames
    assert np.array_equal(np.asarray(clip[:8]), CLIP_PIXELS[-8:]) or np.array_equal(
        np.asarray(clip[:8]), CLIP_PIXELS[:8]
    )


def test_a_video_has_the_shape_of_what_it_begins_from(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide = Image.new("RGB", (640, 360), "teal")
    assert model("sea", image=wide, num_chunks=1).frames.shape == (24, 32, 48, 3)
    assert "48×32, after the image's shape" in caplog.text
    assert model("sea", image=wide, num_chunks=1, width=64).frames.shape == (24, 32, 64, 3)
    assert model("sea", image=wide, num_chunks=1, width=32, height=32).frames.shape == (24, 32, 32, 3)
    tall = np.zeros((8, 64, 32, 3), np.uint8)
    assert model("sea", video=tall, num_chunks=1).frames.shape[1:] == (32, 16, 3)


@pytest.mark.parametrize(
    ("shown", "pixels", "given", "size"),
    [
        ((1920, 1080), 720 * 720, {}, (960, 544)),
        ((1080, 1920), 720 * 720, {}, (544, 960)),
        ((4032, 3024), 1280 * 720, {}, (1104, 832)),
        ((1000, 1000), 720 * 720, {}, (720, 720)),
        ((1920, 1080), 720 * 720, {"width": 1280}, (1280, 720)),
        ((1080, 1920), 720 * 720, {"width": 720}, (720, 1280)),
        ((9999, 1), 64 * 64, {}, (272, 16)),
        ((1, 9999), 64 * 64, {}, (16, 272)),
    ],
)
def test_a_shape_becomes_the_nearest_size_there_is(
    shown: tuple[int, int], pixels: int, given: dict[str, int], size: tuple[int, int]
) -> None:
    assert size_like(shown, pixels, **given) == size


# What diffusers' users type -------------------------------------------------------------------------------------


def test_frames_are_pictures_and_an_array(model: Model) -> None:
    frames = model("sea", num_chunks=1).frames
    pixels = np.asarray(frames)
    assert (frames.shape, frames.dtype, len(frames)) == ((24, 32, 32, 3), np.uint8, 24)
    assert np.shares_memory(pixels, np.asarray(frames)), "nothing is copied"
    assert isinstance(frames[-1], Image.Image)
    assert np.array_equal(np.asarray(frames[-1]), pixels[-1])
    assert np.array_equal(frames[3:9], pixels[3:9])
    assert np.array_equal(np.stack([np.asarray(frame) for frame in frames]), pixels)
    assert torch.equal(torch.from_numpy(np.asarray(frames)), torch.from_numpy(pixels))
    assert (frames == pixels).all()
    assert np.array_equal(pickle.loads(pickle.dumps(frames)), pixels)
    with pytest.raises(TypeError, match="their pixels are"):
        frames[:, 0]  # type: ignore[call-overload]


def test_diffusers_writes_the_frames_with_the_right_pixels(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import imageio
    from diffusers.utils import export_to_video

    written: list[np.ndarray] = []

    class Writer(contextlib.nullcontext[Any]):
        def __enter__(self) -> Any:
            return self

        def append_data(self, frame: np.ndarray) -> None:
            written.append(frame)

    monkeypatch.setattr(imageio, "get_writer", lambda *_, **__: Writer())
    for output_type in ("pil", "np"):
        video = model("sea", num_chunks=1, output_type=output_type)
        written.clear()
        export_to_video(video.frames, str(tmp_path / "x.mp4"), fps=video.fps)
        close = np.abs(np.stack(written).astype(int) - np.asarray(model("sea", num_chunks=1).frames))
        assert close.max() <= (output_type == "np")  # which diffusers rounds down


def test_frames_may_be_floats_or_a_tensor(model: Model) -> None:
    pixels = np.asarray(model("sea", num_chunks=1).frames)
    floats = model("sea", num_chunks=1, output_type="np").frames
    assert (floats.dtype, floats.shape) == (np.float32, pixels.shape)
    assert np.array_equal(np.round(floats * 255), pixels)
    tensor = model("sea", num_chunks=1, output_type="pt")
    assert (tensor.frames.dtype, tensor.frames.shape) == (torch.float32, (24, 3, 32, 32))
    assert np.array_equal(clip_pixels(tensor.frames), pixels)
    with pytest.raises(SettingsError, match="none of pil, np, pt"):
        model("sea", output_type="latent")  # type: ignore[call-overload]


def test_a_saved_video_has_the_bytes_that_a_run_gives_it(model: Model, make_run: MakeRun, tmp_path: Path) -> None:
    row = {"prompt": "sea", "video": str(CLIP), "num_chunks": 2, "seed": 5, "include_prefix": True}
    store, size = MemoryStore(), {"width": 32, "height": 32}
    run = make_run(store, [{"job_id": "a"} | row | size])
    assert not render_locally(store, run).failed
    path = model(**row, **size).save(tmp_path / "a.mp4")
    assert path == tmp_path / "a.mp4"
    assert path.read_bytes() == store.get(keys.video(run.run_id, "a"))
    assert [found.name for found in tmp_path.iterdir()] == ["a.mp4"]


def test_a_video_is_saved_only_where_and_as_it_can_be(model: Model, tmp_path: Path) -> None:
    video = model("sea", num_chunks=1, height=16, width=16)
    with pytest.raises(InputError, match="no folder"):
        video.save(tmp_path / "no" / "a.mp4")
    with pytest.raises(InputError, match="does not end in"):
        video.save(str(tmp_path / "a.avi"))


def test_lists_of_prompts_and_generators_give_lists_of_videos(model: Model) -> None:
    options: dict[str, Any] = {"num_chunks": 1, "height": 16, "width": 16}
    four = model(["sea", "hills"], num_videos_per_prompt=2, seed=5, **options)
    assert [video.seed for video in four] == [5, 6, 5, 6]
    assert np.array_equal(four[3].frames, model("hills", seed=6, **options).frames)
    generators = [torch.Generator().manual_seed(seed) for seed in (8, 9)]
    two = model("sea", num_videos_per_prompt=2, generator=generators, **options)
    assert [video.seed for video in two] == [8, 9]
    assert np.array_equal(two[1].frames, model("sea", seed=9, **options).frames)
    assert isinstance(model(["sea"], **options), list)
    with pytest.raises(SettingsError, match="2 for 1 videos"):
        model("sea", generator=generators, **options)
    with pytest.raises(SettingsError, match="stream renders one video"):
        model.stream(["sea"])  # type: ignore[arg-type]


def test_a_callback_hears_of_every_step(model: Model) -> None:
    heard: list[tuple[int, float]] = []

    def listen(pipe: Model, step: int, timestep: float, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        assert pipe is model
        heard.append((step, timestep))
        return callback_kwargs

    model("sea", num_chunks=2, callback_on_step_end=listen)
    # 2 chunks, a window of 4 stages, 2 steps each.
    assert [step for step, _ in heard] == list(range(10))
    times = [time for _, time in heard]
    assert times[:8] == sorted(times[:8])
    assert times[0] == 0
    assert times[6:8] == times[8:], "the second chunk's last stage"


def test_progress_is_shown_unless_it_is_switched_off(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(settings)
    model("sea", num_chunks=1, height=16, width=16)
    assert "8/8" in capsys.readouterr().err
    model.set_progress_bar_config(disable=True)
    model("sea", num_chunks=1, height=16, width=16)
    assert capsys.readouterr().err == ""


def test_guidance_by_its_name_in_diffusers(model: Model, settings: Settings) -> None:
    options: dict[str, Any] = {"num_chunks": 1, "seed": 3}
    usual = np.asarray(model("sea", **options).frames)
    highest = max(settings.runtime.text_scales)
    assert np.array_equal(model("sea", guidance_scale=highest, **options).frames, usual)
    assert not np.array_equal(model("sea", guidance_scale=1.5, **options).frames, usual)
    assert not np.array_equal(model("sea", negative_prompt=True, **options).frames, usual)
    with pytest.raises(SettingsError, match="cannot be guided away from a text"):
        model("sea", negative_prompt="blurry", **options)  # type: ignore[call-overload]
    distilled = Model(override(settings, {"engine": {"distill": True}, "runtime": {"cfg_number": 1}}, source="test"))
    with pytest.raises(SettingsError, match="has no guidance"):
        distilled("sea", guidance_scale=5.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_frame": 24}, r"no argument num_frame\.\nDid you mean num_frames"),
        ({"strength": 0.8}, r"no argument strength"),
        ({"num_inference_steps": 9}, r"^num_inference_steps: 9 must be divisible by window_size 4"),
        ({"num_frames": 0}, r"^num_frames: 0 is not a length\.\nGive a whole number"),
        ({"prompt": 5}, "^prompt: 5 is no text"),
        ({"prompt": None}, "^prompt: is missing"),
        ({"num_frames": 24, "fps": 0}, r"^fps: 0 is not between 1 and 120"),
        ({"num_frames": 2.5}, r"^num_frames: 2.5 is not a whole number"),
        ({"height": 17, "width": np.int64(33)}, r"^width: 33 .*\nheight: 17"),
        ({"seed": -1}, r"^seed: -1 is not between"),
        ({"seed": "x"}, r"^seed: 'x' is not a whole number"),
        ({"image": "none.png"}, r'^image: "none.png" does not exist'),
        ({"video": np.zeros((3, 16, 16, 3))}, r"^video: what was given has 3 frames"),
        ({"image": IMAGE, "video": CLIP}, "image stands beside video"),
        ({"generator": 5}, "generator: 5 is not a torch.Generator"),
        ({"num_videos_per_prompt": 0}, "nothing to render"),
    ],
)
def test_a_wrong_argument_is_named(model: Model, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        model(**{"prompt": "sea"} | options)


def test_a_model_goes_to_a_device(settings: Settings) -> None:
    model = Model(settings)
    assert model.to("cpu") is model
    assert model.to(torch.device("cuda:0")).settings.numeric.device == "cuda"
    for wrong in ("cuda:1", torch.float16, "mps"):
        with pytest.raises(SettingsError, match=f"to: {wrong} is neither"):
            model.to(wrong)


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
    with pytest.raises(SettingsError, match=r'needs the folder .*\n.*weights = "DIR" in Python'):
        magi_ray.load("24B")
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


def test_what_the_readme_names_is_there_after_the_import() -> None:
    code = "import magi_ray; magi_ray.api.CallOptions, magi_ray.load, magi_ray.submit, magi_ray.__version__"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
