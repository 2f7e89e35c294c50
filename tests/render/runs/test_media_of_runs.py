"""What a run takes from the images and clips that its rows begin from: which frames, how much follows, what is heard;
and what happens when a copy in the store is lost."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from runs import MakeRun, flip

from magi_ray.commands.stores import StoredRun
from magi_ray.commands.submit import rows_to_mend
from magi_ray.errors import ManifestError
from magi_ray.media.encoder import find_ffmpeg
from magi_ray.media.reader import read_clip, read_video
from magi_ray.media.sound import read_sound
from magi_ray.render.artifacts.prefix import prefix_pixels
from magi_ray.render.driving.inventory import take_inventory
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.session import DriveOptions
from magi_ray.render.runs.record import open_run
from magi_ray.settings import Settings, override
from magi_ray.storage import keys
from magi_ray.storage.memory import MemoryStore

MANIFESTS = Path(__file__).parents[3] / "manifests"
SILENT = MANIFESTS / "quickstart-clip.mp4"  # 48 frames, 24 a second
CLIP: dict[str, Any] = {"job_id": "clip", "prompt": "on", "video": str(SILENT), "num_chunks": 1}


def ffmpeg(*arguments: object) -> None:
    subprocess.run([find_ffmpeg(), "-v", "error", "-y", *map(str, arguments)], check=True, timeout=60)


@pytest.fixture(scope="session")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds of 24 frames each, with a tone that begins 2.5 s after the first picture."""
    path = tmp_path_factory.mktemp("clips") / "loud.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=48x32:rate=24:duration=3",
           "-f", "lavfi", "-i", "aevalsrc='if(gte(t,2.5),0.4*sin(2764*t),0)':s=48000:d=3",
           "-pix_fmt", "yuv420p", "-colorspace", "smpte170m", "-color_primaries", "smpte170m",
           "-color_trc", "smpte170m",
           path)  # fmt: skip
    return path


def video_of(store: MemoryStore, run_id: str, folder: Path) -> Path:
    path = folder / f"{run_id}.mp4"
    path.write_bytes(store.get(keys.video(run_id, "clip")))
    return path


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# Which frames


def test_a_clip_is_continued_from_its_end_unless_the_row_or_the_run_says_otherwise(
    settings: Settings, make_run: MakeRun
) -> None:
    ends = read_video(SILENT, width=32, height=32, fps=24, max_frames=32, part="end", fit="crop")
    begins = read_video(SILENT, width=32, height=32, fps=24, max_frames=32, part="start", fit="crop")
    start = override(settings, {"prefix": {"take": "start"}})
    for run_settings, row, expected, told in (
        (settings, CLIP, ends, "frames 16–47 of 48, ends at 2.00 s"),
        (settings, CLIP | {"prefix_from": "start"}, begins, "frames 0–31 of 48, ends at 1.33 s"),
        (start, CLIP, begins, "frames 0–31 of 48, ends at 1.33 s"),
        (start, CLIP | {"prefix_from": "end"}, ends, "frames 16–47 of 48, ends at 2.00 s"),
    ):
        store = MemoryStore()
        run = make_run(store, [row], settings=run_settings)
        assert np.array_equal(prefix_pixels(store, run.plans["clip"]), expected)
        assert str(run.plans["clip"].taken) == told
        assert open_run(store, run.run_id).plans == run.plans


def test_frames_that_make_no_latent_frame_are_left_out_far_from_the_join(make_run: MakeRun) -> None:
    for take, kept, first in (("start", slice(0, 28), 0), ("end", slice(2, 30), 20)):
        store = MemoryStore()
        plan = make_run(store, [CLIP | {"prefix_frames": 30, "prefix_from": take}]).plans["clip"]
        all_30 = read_video(SILENT, width=32, height=32, fps=24, max_frames=30, part=take, fit="crop")
        assert np.array_equal(prefix_pixels(store, plan), all_30[kept])
        assert plan.taken is not None
        assert (plan.taken.first, plan.taken.last, plan.taken.of) == (first, first + 27, 48)


def test_a_clip_shorter_than_asked_gives_what_it_has_and_says_so(make_run: MakeRun) -> None:
    rows = [CLIP | {"job_id": name, "prefix_frames": 5000} for name in ("clip", "again")]
    [note] = make_run(MemoryStore(), rows).manifest.notes
    assert note == "Row 1 (2 rows) begins from 48 frames: its clip has no more at 24 fps; 5000 were asked for."
    assert make_run(MemoryStore(), [CLIP]).manifest.notes == ()


def test_a_clip_shorter_than_a_latent_frame_is_refused(settings: Settings, make_run: MakeRun) -> None:
    short = override(settings, {"prefix": {"max_frames": 3}})
    with pytest.raises(ManifestError, match="has 3 frames at 24 fps, but a prefix needs at least 4"):
        make_run(MemoryStore(), [CLIP], settings=short)


# How much follows


@pytest.mark.parametrize(
    ("prefix_frames", "fps", "length", "chunks", "frames"),
    [
        (32, 24, {"num_chunks": 3}, 4, 72), (24, 24, {"num_chunks": 3}, 3, 72), (20, 24, {"num_chunks": 1}, 2, 24),
        (32, 24, {"seconds": 1.6}, 2, 39), (32, 24, {"seconds": 1.7}, 3, 41), (32, 30, {"seconds": 0.1 + 0.2}, 1, 9),
        (32, 24, {"seconds": 0.01}, 1, 1),
        # One latent frame is a part of its chunk, as an image is: whole chunks.
        (4, 24, {"num_chunks": 2}, 2, 48), (4, 24, {"seconds": 1.1}, 2, 48),
    ],
)  # fmt: skip
def test_after_a_clip_comes_exactly_as_much_new_video_as_asked_for(
    make_run: MakeRun, prefix_frames: int, fps: int, length: dict[str, float], chunks: int, frames: int
) -> None:
    row = CLIP | {"num_chunks": None, "prefix_frames": prefix_frames, "fps": fps} | length
    for include in (False, True):
        timeline = make_run(MemoryStore(), [row | {"include_prefix": include}]).plans["clip"].timeline
        included = prefix_frames if include and prefix_frames > 4 else 0
        assert (timeline.num_chunks, timeline.num_frames) == (chunks, included + frames)


def test_a_caption_beyond_the_end_of_a_continued_clip_is_named(make_run: MakeRun) -> None:
    def row(chunk: int, **length: float) -> dict[str, Any]:
        schedule = [{"start_chunk": 0, "prompt": "a"}, {"start_chunk": chunk, "prompt": "b"}]
        return CLIP | {"prompt": None, "num_chunks": None, "schedule": schedule} | length

    # Two new chunks after 32 frames lie in three, after 24 frames in two.
    assert make_run(MemoryStore(), [row(2, num_chunks=2)]).plans["clip"].captions[2] == "b"
    for wrong in (row(2, seconds=1.6), row(2, num_chunks=2, prefix_frames=24)):
        with pytest.raises(ManifestError, match=r"column schedule: 2 is beyond the video's last chunk, 1"):
            make_run(MemoryStore(), [wrong])


@pytest.mark.parametrize(("prefix_frames", "chunks"), [(48, 2), (52, 3), (32, 3)])
def test_a_clip_goes_on_with_the_very_next_frame_and_can_be_included(
    make_run: MakeRun, tmp_path: Path, prefix_frames: int, chunks: int
) -> None:
    # 52 frames are 13 latent frames: two whole chunks and one of the six of the first new chunk.
    store = MemoryStore()
    row = CLIP | {"num_chunks": None, "seconds": 46 / 48, "prefix_frames": prefix_frames, "fps": 48}
    videos = []
    for include in (False, True):
        run = make_run(store, [row | {"include_prefix": include}])
        assert render_locally(store, run).published == ("clip",)
        assert take_inventory(store, run.run_id, run.plans["clip"], None).published
        videos.append(frames_of(video_of(store, run.run_id, tmp_path)))
        record = json.loads(store.get(keys.video_record(run.run_id, "clip")))
        assert (record["frames"], record["chunks"]) == (len(videos[-1]), chunks)
        assert record["prefix_frames"] == len(videos[-1]) - len(videos[0])
    new, included = videos
    assert (len(new), len(included)) == (46, prefix_frames + 46)
    clip = read_video(SILENT, width=32, height=32, fps=48, max_frames=prefix_frames, part="end", fit="crop")
    distance = np.abs(included[:prefix_frames].astype(int) - clip).mean(axis=(1, 2, 3))
    assert distance.max() < 8
    assert np.abs(included[prefix_frames:].astype(int) - new).mean() < 1


def test_a_longer_end_of_the_same_chunk_is_only_decoded(make_run: MakeRun) -> None:
    store = MemoryStore()
    stages = [
        render_locally(store, make_run(store, [CLIP | {"num_chunks": None, "seconds": seconds}])).stages_rendered
        for seconds in (0.5, 0.6)
    ]
    assert stages == [4, 0]


# What is known by its pixels


@pytest.mark.parametrize(
    ("row", "copies"),
    [
        (CLIP, {"renamed": ["-c", "copy", "-f", "mp4"], "remuxed.mkv": ["-c", "copy"],
                "plain.mov": ["-c", "copy", "-map_metadata", "-1"]}),
        (CLIP | {"video": "loud", "include_prefix": True},
         {"remuxed.mkv": ["-c", "copy"], "plain.mov": ["-c", "copy", "-map_metadata", "-1"]}),
        (CLIP | {"video": None, "image": str(MANIFESTS / "quickstart-image.png")}, {"saved-again.png": None}),
    ],
    ids=["clip", "clip with its sound", "image"],
)  # fmt: skip
def test_a_file_that_shows_and_sounds_the_same_is_the_same_run(
    make_run: MakeRun, loud: Path, tmp_path: Path, row: dict[str, Any], copies: dict[str, list[str] | None]
) -> None:
    store = MemoryStore()
    kind = "image" if row.get("image") else "video"
    source = loud if row[kind] == "loud" else Path(row[kind])
    run = make_run(store, [row | {kind: str(source)}])
    assert render_locally(store, run).published == ("clip",)
    of_a_driver = "lease.json", "progress.json", "results.parquet"
    before = {key: store.get(key) for key in store.list("") if not key.endswith(of_a_driver)}
    for name, arguments in copies.items():
        if arguments is None:
            Image.open(source).save(tmp_path / name, compress_level=1)
        else:
            ffmpeg("-i", source, *arguments, tmp_path / name)
        assert (tmp_path / name).read_bytes() != source.read_bytes()
        again = make_run(store, [row | {kind: name}], base=tmp_path)
        assert again.run_id == run.run_id
        assert again.plans["clip"].stage_keys == run.plans["clip"].stage_keys
        assert render_locally(store, again).already_published == 1
    assert {key: store.get(key) for key in before} == before


def test_a_file_that_shows_or_sounds_otherwise_is_another_run(make_run: MakeRun, loud: Path, tmp_path: Path) -> None:
    ffmpeg("-i", loud, "-c", "copy", "-an", tmp_path / "silent.mp4")
    ffmpeg("-i", loud, "-vf", "negate", "-c:a", "copy", tmp_path / "negative.mp4")
    for include, names in ((True, ("silent.mp4", "negative.mp4")), (False, ("negative.mp4",))):
        row = CLIP | {"include_prefix": include}
        run, *others = (
            make_run(MemoryStore(), [row | {"video": str(path)}]) for path in (loud, *map(tmp_path.joinpath, names))
        )
        assert all(other.run_id != run.run_id for other in others)
        assert others[-1].plans["clip"].stage_keys[0] != run.plans["clip"].stage_keys[0]
    [silent] = [make_run(MemoryStore(), [CLIP | {"video": str(tmp_path / "silent.mp4")}])]
    assert silent.run_id == make_run(MemoryStore(), [CLIP | {"video": str(loud)}]).run_id


# What is heard


@pytest.mark.parametrize("fps", [24, 30])
def test_the_sound_of_a_clip_is_carried_over_its_own_part_and_in_sync(
    make_run: MakeRun, loud: Path, tmp_path: Path, fps: int
) -> None:
    store = MemoryStore()
    run = make_run(store, [CLIP | {"video": str(loud), "include_prefix": True, "fps": fps, "prefix_frames": 24}])
    assert run.manifest.notes == ()
    videos = []
    for _ in range(2):
        assert render_locally(store, run).published == ("clip",)
        path = video_of(store, run.run_id, tmp_path)
        videos.append(path.read_bytes())
        store.delete(keys.video(run.run_id, "clip"))
    assert videos[0] == videos[1]
    assert not any(word in videos[0] for word in (b"Lavc", b"Lavf"))
    with av.open(str(path)) as container:
        picture, sound = container.streams
        assert (picture.type, picture.start_time, sound.type, sound.codec_context.name) == ("video", 0, "audio", "aac")
        assert sound.start_time == 0
        assert abs(sound.duration * sound.time_base - Fraction(24, fps)) < Fraction(1, 1000)
    heard = read_sound(path, begin=Fraction(0), end=Fraction(10))
    assert heard is not None
    # The tone begins 2.5 s after the clip's first frame; the video begins with its last 24 frames.
    level = np.abs(heard.samples[:, 0].astype(int))
    begins = int(np.argmax(level > 2000)) / heard.rate
    assert abs(begins - (2.5 - (3 - 24 / fps))) < 0.01
    record = json.loads(store.get(keys.video_record(run.run_id, "clip")))
    assert record["media"]["sound"] == run.record.media["clip"].sound


def test_a_sound_that_is_not_carried_over_is_noted(make_run: MakeRun, loud: Path, tmp_path: Path) -> None:
    for row in ({"include_prefix": False}, {"include_prefix": True, "prefix_frames": 4}):
        run = make_run(MemoryStore(), [CLIP | {"video": str(loud)} | row])
        [note] = run.manifest.notes
        assert note == (
            "Row 1 leaves out the sound of its clip: it is heard with the clip's own frames, where include_prefix "
            "shows them."
        )
        assert run.record.media["clip"].sound is None
    broken = bytearray(loud.read_bytes())
    with av.open(str(loud)) as container:
        for packet in container.demux(audio=0):
            if packet.size:
                broken[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    (tmp_path / "broken.mp4").write_bytes(broken)
    run = make_run(MemoryStore(), [CLIP | {"video": str(tmp_path / "broken.mp4"), "include_prefix": True}])
    [note] = run.manifest.notes
    assert re.match(r"Row 1 leaves out the sound of its clip, which cannot be read", note)
    assert run.record.media["clip"].sound is None


# Copies that are lost


def damaged(store: MemoryStore, key: str) -> None:
    flip(store, key)


def undecodable(store: MemoryStore, key: str) -> None:
    store.put(key, b"no picture, but a letter")


def missing(store: MemoryStore, key: str) -> None:
    store.delete(key)


@pytest.mark.parametrize(
    ("lose", "files"),
    [(damaged, ("loud", "again.mkv")), (undecodable, ("again.mkv", "loud")), (missing, ("loud", "again.mkv"))],
)
def test_a_lost_copy_fails_its_row_and_the_manifest_submitted_again_mends_it(
    make_run: MakeRun, loud: Path, tmp_path: Path, lose: Callable[..., None], files: Sequence[str]
) -> None:
    """files: given again, first when embedding has failed, then when finishing has; another one shows the same."""
    ffmpeg("-i", loud, "-c", "copy", tmp_path / "again.mkv")
    store = MemoryStore()
    row = CLIP | {"video": str(loud), "include_prefix": True, "prefix_frames": 24}
    run = make_run(store, [row])
    video, published = keys.video(run.run_id, "clip"), []
    for task, file in zip(("embed", "finish"), files, strict=True):
        lose(store, keys.media(open_run(store, run.run_id).record.media["clip"].sha256))
        [failed] = render_locally(store, open_run(store, run.run_id)).failed
        assert (failed.kind, failed.failure) == (task, "input")
        assert failed.message.startswith("The video kept by memory: ")
        assert "Submit the manifest again" in failed.message
        again = make_run(store, [row | {"video": str(loud if file == "loud" else tmp_path / file)}])
        assert again.run_id == run.run_id
        again = open_run(store, run.run_id)
        mended = rows_to_mend(StoredRun(store=store, store_uri="memory:", run=again))
        assert render_locally(store, again, DriveOptions(retry=frozenset(mended))).published == ("clip",)
        published.append(store.get(video))
        store.delete(video)
    assert published[0] == published[1]


def test_a_copy_that_gives_other_pixels_here_than_where_it_was_submitted_is_not_rendered(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    run = make_run(store, [CLIP])

    def brighter(*arguments: Any, **options: Any) -> tuple[np.ndarray, int]:
        frames, found = read_clip(*arguments, **options)
        return frames ^ 1, found

    # As another version of FFmpeg might decode it.
    monkeypatch.setattr("magi_ray.render.artifacts.prefix.read_clip", brighter)
    [failed] = render_locally(store, run).failed
    assert "gives pixels of sha256" in failed.message
    assert "same versions of magi-ray and PyAV" in failed.message
