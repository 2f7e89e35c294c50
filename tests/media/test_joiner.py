from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import decoded_yuv, waves

from magi_ray.errors import OutputError
from magi_ray.media.encoder import encode_segment
from magi_ray.media.joiner import join, verify
from magi_ray.settings import EncoderSettings


def _segments(
    ffmpeg: Path, folder: Path, sizes: list[int], *, fps: int = 24, first: int = 0, **size: int
) -> list[Path]:
    frames = waves(sum(sizes), **size)
    paths = []
    for number, count in enumerate(sizes):
        offset = sum(sizes[:number])
        paths.append(folder / f"{number:04d}.mp4")
        encode_segment(
            frames[offset : offset + count],
            ffmpeg=ffmpeg,
            fps=fps,
            frame_offset=first + offset,
            settings=EncoderSettings(preset="veryfast"),
            out=paths[-1],
        )
    return paths


@pytest.fixture
def joined(tmp_path: Path, ffmpeg: Path) -> Path:
    join(_segments(ffmpeg, tmp_path, [16, 24]), out=tmp_path / "video.mp4", ffmpeg=ffmpeg)
    return tmp_path / "video.mp4"


@pytest.mark.parametrize("fps", [24, 30, 25, 1])
@pytest.mark.parametrize("sizes", [[16, 24, 24, 24], [24, 24], [4], [8, 24, 1, 24]])
def test_the_joined_video_is_the_segments_frame_by_frame(
    tmp_path: Path, ffmpeg: Path, sizes: list[int], fps: int
) -> None:
    segments = _segments(ffmpeg, tmp_path, sizes, fps=fps)
    join(segments, out=tmp_path / "video.mp4", ffmpeg=ffmpeg)
    verify(tmp_path / "video.mp4", frames=sum(sizes), width=96, height=64, fps=fps)
    expected = [frame for segment in segments for frame in decoded_yuv(segment)]
    found = decoded_yuv(tmp_path / "video.mp4")
    assert len(found) == len(expected) == sum(sizes)
    assert all((one == other).all() for one, other in zip(found, expected, strict=True))


def test_the_same_segments_give_the_same_bytes(tmp_path: Path, ffmpeg: Path, joined: Path) -> None:
    again = tmp_path / "elsewhere" / "another.mp4"
    again.parent.mkdir()
    join(_segments(ffmpeg, again.parent, [16, 24]), out=again, ffmpeg=ffmpeg)
    assert again.read_bytes() == joined.read_bytes()


def test_segments_from_the_middle_of_a_video_join_to_one_that_begins_at_0(tmp_path: Path, ffmpeg: Path) -> None:
    join(_segments(ffmpeg, tmp_path, [24, 24], first=1000), out=tmp_path / "video.mp4", ffmpeg=ffmpeg)
    verify(tmp_path / "video.mp4", frames=48, width=96, height=64, fps=24)


def test_header_and_segments_one_after_the_other_are_a_playable_stream(tmp_path: Path, ffmpeg: Path) -> None:
    segments = _segments(ffmpeg, tmp_path, [16, 24, 24])
    data = [segment.read_bytes() for segment in segments]
    start = data[0].index(b"moof") - 4
    (tmp_path / "stream.mp4").write_bytes(data[0] + data[1][start:] + data[2][start:])
    expected = [frame for segment in segments for frame in decoded_yuv(segment)]
    assert np.array_equal(decoded_yuv(tmp_path / "stream.mp4"), expected)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"frames": 41}, "number of frames: planned 41, found 40"),
        ({"frames": 39}, "number of frames: planned 39, found 40"),
        ({"width": 64}, r"size of frame 0: planned \(64, 64\), found \(96, 64\)"),
        ({"fps": 30}, "time of frame 1: planned 0.033333, found 0.041667"),
    ],
)
def test_a_video_other_than_planned_is_refused_with_both_numbers(
    joined: Path, changes: dict[str, int], says: str
) -> None:
    planned: dict[str, Any] = {"frames": 40, "width": 96, "height": 64, "fps": 24}
    verify(joined, **planned)
    with pytest.raises(OutputError, match=says):
        verify(joined, **planned | changes)


def test_a_missing_or_repeated_segment_is_found(tmp_path: Path, ffmpeg: Path) -> None:
    segments = _segments(ffmpeg, tmp_path, [24, 24, 24])
    join([segments[0], segments[2]], out=tmp_path / "gap.mp4", ffmpeg=ffmpeg)
    with pytest.raises(OutputError, match=r"time of frame 24: planned 1.0, found 2.0"):
        verify(tmp_path / "gap.mp4", frames=48, width=96, height=64, fps=24)
    join([segments[0], segments[0], segments[1]], out=tmp_path / "twice.mp4", ffmpeg=ffmpeg)
    with pytest.raises(OutputError, match="time of frame"):
        verify(tmp_path / "twice.mp4", frames=72, width=96, height=64, fps=24)


def test_an_index_behind_the_frames_is_refused(tmp_path: Path, ffmpeg: Path, joined: Path) -> None:
    slow = tmp_path / "slow.mp4"
    subprocess.run([ffmpeg, "-v", "error", "-i", joined, "-c", "copy", slow], check=True)
    with pytest.raises(OutputError, match="order of index and frames"):
        verify(slow, frames=40, width=96, height=64, fps=24)


def test_a_damaged_video_is_refused(joined: Path) -> None:
    data = bytearray(joined.read_bytes())
    frames = data.index(b"mdat") + 4
    for cut in (data[: len(data) // 2], data[: frames + 100], b"", bytes(1000)):
        joined.write_bytes(cut)
        with pytest.raises(OutputError):
            verify(joined, frames=40, width=96, height=64, fps=24)
    data[frames + 1000 : frames + 3000] = bytes(2000)
    joined.write_bytes(data)
    with pytest.raises(OutputError):
        verify(joined, frames=40, width=96, height=64, fps=24)


def test_segments_of_different_videos_are_not_joined(tmp_path: Path, ffmpeg: Path) -> None:
    (tmp_path / "other").mkdir()
    ours = _segments(ffmpeg, tmp_path, [24])
    theirs = _segments(ffmpeg, tmp_path / "other", [24], height=48, width=80)
    with pytest.raises(OutputError, match=r"0000.mp4 has another header than 0000.mp4"):
        join(ours + theirs, out=tmp_path / "video.mp4", ffmpeg=ffmpeg)


def test_a_cut_segment_is_not_joined(tmp_path: Path, ffmpeg: Path) -> None:
    segments = _segments(ffmpeg, tmp_path, [24, 24])
    segments[1].write_bytes(segments[1].read_bytes()[:-100])
    with pytest.raises(OutputError, match=r"0001.mp4 is not a whole MP4"):
        join(segments, out=tmp_path / "video.mp4", ffmpeg=ffmpeg)


def test_memory_does_not_grow_with_the_number_of_segments(tmp_path: Path, ffmpeg: Path) -> None:
    """Our part of the joining: the stream is never held, only a block of it."""
    import tracemalloc

    segment = _segments(ffmpeg, tmp_path, [24], height=256, width=256)[0]
    tracemalloc.start()
    peaks = []
    for count in (4, 400):
        tracemalloc.reset_peak()
        join([segment] * count, out=tmp_path / "video.mp4", ffmpeg=ffmpeg)
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1 << 20
    assert segment.stat().st_size * 400 > 4 << 20
