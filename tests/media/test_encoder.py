from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from clips import waves

from magi_ray.errors import MediaError, OutputError, WorkerLost
from magi_ray.media import encoder
from magi_ray.media.encoder import encode_segment, encoder_identity, find_ffmpeg, run_ffmpeg
from magi_ray.settings import EncoderSettings


def _encode(ffmpeg: Path, out: Path, frames: np.ndarray, **changes: Any) -> bytes:
    arguments: dict[str, Any] = {"ffmpeg": ffmpeg, "fps": 24, "frame_offset": 0, "settings": EncoderSettings()}
    encode_segment(frames, out=out, **arguments | changes)
    return out.read_bytes()


def test_the_same_frames_give_the_same_bytes(tmp_path: Path, ffmpeg: Path) -> None:
    frames = waves(24)
    first = _encode(ffmpeg, tmp_path / "a.mp4", frames)
    flipped_twice = np.asfortranarray(frames[:, ::-1])[:, ::-1]
    assert _encode(ffmpeg, tmp_path / "other name.mp4", flipped_twice) == first
    assert _encode(ffmpeg, tmp_path / "b.mp4", frames, settings=EncoderSettings(threads=1)) == first


def test_no_version_or_date_stands_in_a_segment(tmp_path: Path, ffmpeg: Path) -> None:
    data = _encode(ffmpeg, tmp_path / "a.mp4", waves(24))
    version, x264 = encoder_identity(ffmpeg).removeprefix("ffmpeg ").split(", x264 ")
    assert version.encode() not in data
    assert b"x264 - core " + x264.encode() not in data
    times = data.index(b"mvhd") + 8
    assert data[times : times + 8] == bytes(8)


@pytest.mark.parametrize("count", [1, 4, 16, 24])
@pytest.mark.parametrize("fps", [24, 30])
def test_a_segment_stands_at_its_place_in_the_video(tmp_path: Path, ffmpeg: Path, count: int, fps: int) -> None:
    # The last one lies after 10 hours.
    for offset in (0, 16, 40, 24 * fps * 1500 + 16):
        _encode(ffmpeg, tmp_path / "a.mp4", waves(count), fps=fps, frame_offset=offset)
        with av.open(tmp_path / "a.mp4") as container:
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.size]
            assert [packet.pts * stream.time_base * fps for packet in packets] == list(range(offset, offset + count))
            assert [packet.is_keyframe for packet in packets] == [True] + [False] * (count - 1)
            assert [packet.dts for packet in packets] == [packet.pts for packet in packets]


def test_a_segment_is_h264_yuv420p_bt709_of_the_given_size(tmp_path: Path, ffmpeg: Path) -> None:
    _encode(ffmpeg, tmp_path / "a.mp4", waves(4, height=48, width=80))
    with av.open(tmp_path / "a.mp4") as container:
        assert len(container.streams) == 1
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.width, context.height) == ("h264", "yuv420p", 80, 48)
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)


def test_all_segments_of_a_video_have_one_header(tmp_path: Path, ffmpeg: Path) -> None:
    frames = waves(41)
    parts = [frames[:16], frames[16:40], frames[40:]]
    data = [_encode(ffmpeg, tmp_path / "a.mp4", part, frame_offset=16 * n) for n, part in enumerate(parts)]
    assert len({one[: one.index(b"moof") - 4] for one in data}) == 1


def test_what_ffmpeg_says_stands_in_the_error(tmp_path: Path, ffmpeg: Path) -> None:
    with pytest.raises(OutputError, match=r"(?s)failed encoding 4 frames of 96×64.*No such file or directory"):
        _encode(ffmpeg, tmp_path / "no folder" / "a.mp4", waves(4))


def _program(path: Path, script: str) -> Path:
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return path


def test_a_hanging_ffmpeg_is_killed_at_its_deadline(tmp_path: Path) -> None:
    hanging = _program(tmp_path / "ffmpeg", f'echo $$ > {tmp_path}/pid\necho "thinking" >&2\nexec sleep 60\n')
    begun = time.monotonic()
    # More than a pipe holds, so that we hang in writing.
    with pytest.raises(WorkerLost, match=r"not done with .* after 0.5 s: thinking"):
        _encode(hanging, tmp_path / "a.mp4", waves(24), deadline_s=0.5)
    assert time.monotonic() - begun < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_ffmpeg_does_not_outlive_an_interrupted_caller(tmp_path: Path) -> None:
    hanging = _program(tmp_path / "ffmpeg", f"echo $$ > {tmp_path}/pid\nexec sleep 60\n")

    def interrupted() -> Any:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt
        yield b""

    with pytest.raises(KeyboardInterrupt):
        run_ffmpeg([str(hanging)], feed=interrupted(), deadline_s=60, purpose="nothing")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_killed_ffmpeg_is_a_lost_worker(tmp_path: Path) -> None:
    with pytest.raises(WorkerLost, match="signal 9"):
        _encode(_program(tmp_path / "ffmpeg", "kill -9 $$\n"), tmp_path / "a.mp4", waves(4))


def test_a_system_ffmpeg_without_libx264_is_passed_over(
    tmp_path: Path, ffmpeg: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor = _program(tmp_path / "ffmpeg", "echo ' V..... mpeg4'\n")
    monkeypatch.setattr(encoder.shutil, "which", lambda name: str(poor))
    monkeypatch.setattr(encoder.imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(ffmpeg))
    assert find_ffmpeg() == ffmpeg


def test_no_ffmpeg_at_all_is_an_error_that_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(encoder.shutil, "which", lambda name: None)
    monkeypatch.setattr(encoder.imageio_ffmpeg, "get_ffmpeg_exe", none)
    with pytest.raises(MediaError, match=r"looked at: nothing.*\n.*pip install imageio-ffmpeg"):
        find_ffmpeg()


def test_the_identity_names_ffmpeg_and_x264(ffmpeg: Path, tmp_path: Path) -> None:
    assert encoder_identity(ffmpeg) == encoder_identity(ffmpeg)
    version, x264 = encoder_identity(ffmpeg).split(", ")
    assert version.startswith("ffmpeg ")
    assert x264.startswith("x264 ")
    assert any(letter.isdigit() for letter in x264[4:])
    with pytest.raises(MediaError, match="does not run"):
        encoder_identity(tmp_path / "nothing")
    with pytest.raises(MediaError, match="does not answer"):
        encoder_identity(_program(tmp_path / "other", "echo something else\n"))
