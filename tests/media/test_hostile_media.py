"""Media are data: a file cannot make us read another one, open a port, or take much time or memory."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
from clips import waves
from PIL import Image

from magi_ray.errors import MediaError
from magi_ray.media import frames
from magi_ray.media.preview import write_png
from magi_ray.media.reader import count_frames, inspect_clip, inspect_image, read_image, read_video, shown_size

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
SDP = (
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)
SCRIPTS = {
    "ffconcat": "ffconcat version 1.0\nfile other.mp4\n",
    "absolute ffconcat": "ffconcat version 1.0\nfile file:{folder}/other.mp4\n",
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n",
    "m3u8 by address": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:{port}/other.mp4\n",
    "SDP": SDP,
    "subtitles": "1\n00:00:00,000 --> 00:00:02,000\nnothing to see\n\n2\n00:00:02,000 --> 00:00:03,000\nnothing\n",
    "metadata": ";FFMETADATA1\ntitle=nothing\n",
    "DASH": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><BaseURL>'
    "{folder}/other.mp4</BaseURL></Period></MPD>",
}


def _write_clip(path: Path, times_ms: Sequence[int], *, form: str = "mp4") -> Path:
    with av.open(path, "w", format=form) as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0", "tune": "zerolatency"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, when in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 9 * number % 256, np.uint8), format="rgb24")
            frame.pts, frame.time_base = when, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return _write_clip(tmp_path / "other.mp4", range(0, 1000, 100))


EVERY_WAY: list[Callable[[Path], object]] = [
    inspect_clip,
    inspect_image,
    shown_size,
    lambda path: count_frames(path, fps=24, max_frames=10),
    lambda path: read_image(path, width=16, height=16, fit="crop"),
    lambda path: read_video(path, width=16, height=16, fps=24, max_frames=10, part="end", fit="crop"),
]


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_script_in_place_of_a_clip_reads_nothing_and_opens_nothing(tmp_path: Path, clip: Path, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        path = tmp_path / "clip.mp4"
        path.write_text(SCRIPTS[kind].format(folder=tmp_path, port=port))
        begun = time.monotonic()
        for read in EVERY_WAY:
            with pytest.raises(MediaError, match=r"clip.mp4 cannot be read"):
                read(path)
        assert time.monotonic() - begun < 5
        with pytest.raises(BlockingIOError):
            server.accept()
        with socket.socket(type=socket.SOCK_DGRAM) as udp:  # an RTP port that SDP opened would be in use
            udp.bind(("127.0.0.1", port))


@pytest.mark.parametrize("kind", ["ffconcat", "absolute ffconcat", "SDP"])
def test_even_a_format_that_names_other_files_would_open_none(
    tmp_path: Path, clip: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clip.mp4").write_text(SCRIPTS[kind].format(folder=tmp_path, port=5004))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(frames, "_FORMATS", f"{frames._FORMATS},concat,sdp,rtp,udp")
    with pytest.raises(MediaError):
        count_frames(tmp_path / "clip.mp4", fps=24, max_frames=10)


def _patched(clip: Path, table: bytes, entry: bytes) -> bytes:
    """The MP4 ``clip`` with another beginning of a table of its index."""
    data = clip.read_bytes()
    at = data.index(table) + 8
    return data[:at] + entry + data[at + len(entry) :]


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(3 * width + 1) * 64, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _gif(side: int) -> bytes:
    head = b"GIF89a" + struct.pack("<HH", side, side) + b"\xf0\0\0" + b"\0\0\0\xff\xff\xff"
    return head + b"\x2c" + struct.pack("<HHHH", 0, 0, side, side) + b"\0\x02\x02\x4c\x01\0\x3b"


def _bmp(side: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)


def _huge_clip(path: Path) -> bytes:
    source = ["-f", "lavfi", "-i", "color=s=8192x4400:d=0.1:r=10", "-c:v", "libx264", "-preset", "ultrafast"]
    subprocess.run([FFMPEG, "-v", "error", "-y", *source, "-f", "mpegts", path], check=True)
    return path.read_bytes()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tmp_path = tmp_path_factory.mktemp("hostile")
    clip = _write_clip(tmp_path / "clip", range(0, 1000, 100))
    late, long = tmp_path / "late", tmp_path / "long"
    _write_clip(late, [0, 100, 200, 300, 400, 10**11], form="matroska")
    _write_clip(tmp_path / "gap", [0, 100, 200, 36_000_000, 36_000_100], form="matroska")
    _write_clip(long, range(0, 44_000_000, 500_000), form="matroska")
    small = _write_clip(tmp_path / "small", range(0, 1000, 100), form="mpegts").read_bytes()
    files = {
        "huge.png": _png(36_000, 30_000),
        "large.png": _png(9500, 9500),
        "huge.gif": _gif(65535),
        "large.bmp": _bmp(9000),
        "late.mkv": late.read_bytes(),
        "gap.mkv": (tmp_path / "gap").read_bytes(),
        "long.mkv": long.read_bytes(),
        "slow.mp4": _patched(clip, b"stts", struct.pack(">III", 1, 10, 2**31 - 1)),
        "many.mp4": _patched(clip, b"stsz", struct.pack(">II", 1, 10**9)),
        "huge.ts": _huge_clip(tmp_path / "huge"),
        "grows.ts": small + (tmp_path / "huge").read_bytes(),
        "empty.mp4": b"",
        "zeros.mp4": bytes(10_000),
        "cut.mp4": clip.read_bytes()[:2000],
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return {name: tmp_path / name for name in files}


SAYS = {
    "huge.png": "has 1,080,000,000 pixels, but at most 75,000,000 are read",
    "large.png": "has 9500 × 9500 = 90,250,000 pixels, but at most 75,000,000 are read",
    "huge.gif": "has 4,294,836,225 pixels, but at most 75,000,000 are read",
    "large.bmp": "has 9000 × 9000 = 81,000,000 pixels, but at most 75,000,000 are read",
    "late.mkv": "lasts 27,777.8 h, but at most 12 h are read",
    "gap.mkv": "shows one frame for 36,000 s, from 0.2 s on, but at most 600 s are read",
    "long.mkv": "lasts 12.1 h, but at most 12 h are read",
    "slow.mp4": "but at most 600 s are read",
    "huge.ts": "has 8192 × 4400 = 36,044,800 pixels, but at most 35,651,584 are read",
}


def test_what_is_too_large_or_too_long_is_told_with_both_numbers_and_a_remedy(hostile: dict[str, Path]) -> None:
    for name, says in SAYS.items():
        picture = name.endswith(("png", "bmp"))
        with pytest.raises(MediaError) as found:
            inspect_image(hostile[name]) if picture else inspect_clip(hostile[name])
        assert says in found.value.message
        assert str(hostile[name]) in found.value.message
        assert found.value.remedy


def test_no_file_takes_more_than_seconds_and_1_gb(hostile: dict[str, Path]) -> None:
    code = (
        "import re, sys, time; from pathlib import Path\n"
        "from magi_ray.errors import MediaError\n"
        "from magi_ray.media.reader import *\n"
        "for path in map(Path, sys.argv[1:]):\n"
        "    for read in (inspect_clip, inspect_image, shown_size,\n"
        "        lambda path: count_frames(path, fps=24, max_frames=10**6),\n"
        "        lambda path: read_video(path, width=16, height=16, fps=24, max_frames=9, part='end', fit='crop')):\n"
        "        begun = time.monotonic()\n"
        "        try: read(path)\n"
        "        except MediaError: pass\n"
        "        assert time.monotonic() - begun < 20, path\n"
    )
    # Not ru_maxrss: that begins with what the parent had when it forked.
    code += "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    taken = subprocess.check_output([sys.executable, "-c", code, *map(str, hostile.values())], timeout=300)
    assert int(taken) < 1_000_000


def test_the_largest_picture_that_is_read_takes_less_than_1_gb(tmp_path: Path) -> None:
    Image.new("RGB", (8660, 8660)).save(tmp_path / "a.png", compress_level=1)
    code = (
        "import re, sys; from pathlib import Path; from magi_ray.media.reader import read_image\n"
        "read_image(Path(sys.argv[1]), width=64, height=64, fit='crop')\n"
        # Not ru_maxrss: that begins with what the parent had when it forked.
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    taken = int(subprocess.check_output([sys.executable, "-c", code, tmp_path / "a.png"]))
    assert 300_000 < taken < 1_000_000


@pytest.mark.parametrize("form", ["mp4", "matroska", "mpegts", "avi"])
def test_a_damaged_clip_is_read_or_refused_and_nothing_else(tmp_path: Path, form: str) -> None:
    data = _write_clip(tmp_path / "clip", range(0, 1000, 100), form=form).read_bytes()
    random = np.random.default_rng(7)
    outcomes = set()
    for _ in range(25):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 4):
            damaged[place] ^= 1 << int(random.integers(8))
        path = tmp_path / "damaged"
        path.write_bytes(damaged if random.integers(2) else damaged[: random.integers(len(data))])
        begun = time.monotonic()
        for read in (inspect_clip, EVERY_WAY[-1]):
            try:
                read(path)
                outcomes.add("read")
            except MediaError:
                outcomes.add("refused")
        assert time.monotonic() - begun < 10
    assert outcomes == {"read", "refused"}


def test_a_clip_whose_size_changes_on_the_way_is_read(tmp_path: Path) -> None:
    for side, name in ((64, "a"), (96, "b")):
        source = ["-f", "lavfi", "-i", f"color=red:s={side}x{side}:d=0.5:r=10", "-c:v", "libx264", "-f", "mpegts"]
        subprocess.run([FFMPEG, "-v", "error", "-y", *source, tmp_path / name], check=True)
    (tmp_path / "both.ts").write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes())
    found = read_video(tmp_path / "both.ts", width=32, height=32, fps=10, max_frames=10, part="start", fit="crop")
    assert np.abs(found.astype(int) - [255, 0, 0]).max() < 6


def test_a_picture_is_not_a_script_either(tmp_path: Path) -> None:
    """Pillow gives PostScript to Ghostscript."""
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(MediaError, match=r"a.png cannot be read"):
        inspect_image(tmp_path / "a.png")
    write_png(tmp_path / "b.png", waves(1)[0])
    assert inspect_image(tmp_path / "b.png").notes == ()
