from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clips import decoded_yuv, grey, waves, write_lossless

from magi_ray.errors import MediaError
from magi_ray.media.encoder import encode_segment
from magi_ray.media.joiner import verify
from magi_ray.media.preview import frames_at, write_png
from magi_ray.media.reader import count_frames, read_image, read_video
from magi_ray.settings import EncoderSettings


def _values(path: Path, **changes: object) -> list[int]:
    arguments = {"width": 16, "height": 16, "fps": 10, "max_frames": 100, "part": "start", "fit": "crop"} | changes
    frames = read_video(path, **arguments)
    assert (frames == frames[:, :1, :1, :1]).all()
    return [int(frame[0, 0, 0]) for frame in frames]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """10 frames a second: frame i is the grey 10 · i."""
    path = tmp_path / "clip.mov"
    write_lossless(path, grey(range(0, 100, 10)), range(0, 1000, 100))
    return path


def test_an_image_of_the_wanted_size_is_read_pixel_for_pixel(tmp_path: Path) -> None:
    picture = waves(1)[0]
    write_png(tmp_path / "a.png", picture)
    assert (read_image(tmp_path / "a.png", width=96, height=64, fit="crop") == picture).all()


@pytest.mark.parametrize("name", ["a%02d.png", "x:y.png", "-y.png", "no-suffix", "bild über.png"])
def test_a_file_name_means_nothing_but_itself(tmp_path: Path, name: str) -> None:
    picture = waves(1)[0]
    write_png(tmp_path / name, picture)
    assert (read_image(tmp_path / name, width=96, height=64, fit="crop") == picture).all()


def test_crop_covers_the_frame_and_cuts_both_sides_alike(tmp_path: Path) -> None:
    picture = np.zeros((32, 96, 3), np.uint8)
    picture[:, 32:64] = 200
    write_png(tmp_path / "wide.png", picture)
    write_png(tmp_path / "high.png", picture.transpose(1, 0, 2))
    for name in ("wide.png", "high.png"):
        assert (read_image(tmp_path / name, width=32, height=32, fit="crop") == 200).all()
        assert np.abs(read_image(tmp_path / name, width=64, height=64, fit="crop").astype(int) - 200).max() <= 1


def test_pad_shows_everything_between_black_bars(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.full((32, 96, 3), 200, np.uint8))
    wide = read_image(tmp_path / "a.png", width=48, height=48, fit="pad")
    assert (wide[:16] == 0).all()
    assert (np.abs(wide[16:32].astype(int) - 200) <= 1).all()
    assert (wide[32:] == 0).all()


def test_fit_stretches_the_whole_picture(tmp_path: Path) -> None:
    picture = np.zeros((32, 96, 3), np.uint8)
    picture[:, 48:] = 200
    write_png(tmp_path / "a.png", picture)
    stretched = read_image(tmp_path / "a.png", width=32, height=32, fit="fit").astype(int)
    assert np.abs(stretched[:, :12]).max() <= 1
    assert np.abs(stretched[:, 20:] - 200).max() <= 1


def test_scaling_down_averages_instead_of_skipping(tmp_path: Path) -> None:
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 200
    write_png(tmp_path / "a.png", stripes)
    small = read_image(tmp_path / "a.png", width=16, height=16, fit="crop").astype(int)
    assert np.abs(small[:, 1:-1] - 100).max() <= 4


def test_colours_of_a_tagged_video_come_back(tmp_path: Path, ffmpeg: Path) -> None:
    colours = np.array([[220, 40, 40], [40, 200, 60], [30, 60, 210], [240, 240, 240], [10, 10, 10]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (5, 32, 32, 3))
    path = tmp_path / "a.mp4"
    encode_segment(frames, ffmpeg=ffmpeg, fps=24, frame_offset=0, settings=EncoderSettings(crf=1), out=path)
    found = read_video(path, width=32, height=32, fps=24, max_frames=5, part="start", fit="crop")
    assert np.abs(found.astype(int) - frames).max() <= 4


def test_a_clip_at_its_own_rate_is_every_frame_once(clip: Path) -> None:
    assert _values(clip) == list(range(0, 100, 10))


def test_half_the_rate_is_every_second_frame(clip: Path) -> None:
    assert _values(clip, fps=5) == [0, 20, 40, 60, 80]


def test_a_higher_rate_repeats_the_nearest_frame_and_the_earlier_of_two_equally_near(clip: Path) -> None:
    assert _values(clip, fps=20) == [0, 0, 10, 10, 20, 20, 30, 30, 40, 40, 50, 50, 60, 60, 70, 70, 80, 80, 90, 90]


def test_uneven_times_are_honoured(tmp_path: Path) -> None:
    write_lossless(tmp_path / "a.mov", grey([0, 50, 100, 150]), [40, 60, 640, 840])
    # Counted from the first frame they stand at 0, 20, 600 and 800 ms, and the last one stays for 200 ms.
    assert _values(tmp_path / "a.mov") == [0, 50, 50, 50, 100, 100, 100, 100, 150, 150]


def test_the_start_or_the_end_of_a_clip_is_read(clip: Path) -> None:
    assert _values(clip, max_frames=3) == [0, 10, 20]
    assert _values(clip, max_frames=3, part="end") == [70, 80, 90]
    assert _values(clip, max_frames=100, part="end") == list(range(0, 100, 10))


@pytest.mark.parametrize("fps", [1, 5, 7, 10, 24, 60])
@pytest.mark.parametrize("part", ["start", "end"])
def test_the_number_of_frames_is_known_without_reading_their_pixels(clip: Path, fps: int, part: str) -> None:
    for max_frames in (1, 4, 1000):
        counted = count_frames(clip, fps=fps, max_frames=max_frames)
        assert counted == len(_values(clip, fps=fps, max_frames=max_frames, part=part)) == min(fps, max_frames)


def test_a_picture_in_place_of_a_clip_is_told_from_one(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", grey([77])[0])
    with pytest.raises(MediaError, match=r"a.png cannot be read: it is a picture \(PNG\), not a clip"):
        count_frames(tmp_path / "a.png", fps=24, max_frames=1)


def test_memory_does_not_grow_with_the_length_of_the_clip(tmp_path: Path, ffmpeg: Path) -> None:
    """4000 decoded frames of 128 × 128 would take 98 MB as they are and 197 MB as RGB."""
    settings = EncoderSettings(preset="ultrafast", crf=40)
    for count in (100, 4000):
        frames = np.broadcast_to(waves(1, height=128, width=128), (count, 128, 128, 3))
        out = tmp_path / f"{count}.mp4"
        encode_segment(frames, ffmpeg=ffmpeg, fps=24, frame_offset=0, settings=settings, out=out)
    code = (
        "import resource, sys; from pathlib import Path; from magi_ray.media.reader import read_video\n"
        "read_video(Path(sys.argv[1]), width=64, height=64, fps=24, max_frames=32, part='end', fit='crop')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    short, long = (
        int(subprocess.check_output([sys.executable, "-c", code, tmp_path / f"{count}.mp4"])) for count in (100, 4000)
    )
    assert long - short < 8_000, f"{short} KiB for 100 frames, {long} KiB for 4000"


def test_what_cannot_be_read_is_named_with_what_was_found(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture, but a letter\n" * 10)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.mp4").write_text("<!DOCTYPE html>\n<title>404</title>")
    (tmp_path / "folder.png").mkdir()
    for name, found in {
        "text.png": "Invalid data",
        "empty.png": "it is empty",
        "page.mp4": "it is a web page",
        "folder.png": "directory",
        "missing.png": "No such file",
    }.items():
        with pytest.raises(MediaError, match=f"{name} cannot be read: .*({found})"):
            read_image(tmp_path / name, width=16, height=16, fit="crop")
        with pytest.raises(MediaError, match=name):
            count_frames(tmp_path / name, fps=24, max_frames=1)


def test_a_damaged_clip_is_an_error_and_not_a_shorter_clip(tmp_path: Path, clip: Path) -> None:
    data = bytearray(clip.read_bytes())
    last = data.rindex(b"\x89PNG")
    data[last : last + 8] = bytes(8)
    (tmp_path / "damaged.mov").write_bytes(data)
    with pytest.raises(MediaError, match=r"damaged.mov cannot be read: it is damaged after 9 frames"):
        count_frames(tmp_path / "damaged.mov", fps=10, max_frames=100)


def test_frames_can_be_looked_at_by_number(clip: Path) -> None:
    assert [int(frame[0, 0, 0]) for frame in frames_at(clip, [7, 2])] == [20, 70]
    with pytest.raises(MediaError, match="no frame 10"):
        frames_at(clip, [10])


def test_the_image_and_clip_that_ship_are_whole() -> None:
    manifests = Path(__file__).parents[2] / "manifests"
    assert [frame.shape[:2] for frame in decoded_yuv(manifests / "quickstart-image.png")] == [(64, 96)]
    verify(manifests / "quickstart-clip.mp4", frames=48, width=64, height=64, fps=24)
