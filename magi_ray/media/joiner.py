"""Joins the segments of a video into one mp4 without re-encoding, and checks the result frame by frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import BinaryIO

from magi_ray.errors import MediaError, OutputError
from magi_ray.media.encoder import FRAGMENTED, run_ffmpeg
from magi_ray.media.reader import open_video

_BLOCK = 1 << 20
_SAME_BYTES = ("-map_metadata", "-1", "-flags", "+bitexact", "-fflags", "+bitexact")
_REMEDY = "Nothing was published, and the stages are kept: resume to join the video again."


def join(
    segments: Sequence[Path], *, out: Path, ffmpeg: Path, sound: Path | None = None, deadline_s: float = 3600.0
) -> None:
    """Writes the frames of ``segments`` (from ``encode_segment``, in order, at least one) to the mp4 ``out``.

    sound: a WAV file that is heard from the first frame on, as AAC.
    The first frame is at time 0. The index comes first, so that players can begin before all is loaded. The same
    segments give the same bytes. Memory does not grow with the video, except for the index.
    Raises OutputError, WorkerLost.
    """
    opening, times = segments[0], list[str]()
    if sound is not None:
        opening = out.with_name(f"opening-of-{out.name}")
        _add_sound(segments[0], sound, out=opening, ffmpeg=ffmpeg, deadline_s=deadline_s)
        times = ["-copyts"]  # the sound's first block, which only starts decoders, lies before 0
    command = [
        str(ffmpeg), "-hide_banner", "-loglevel", "error", "-y",
        *times, "-f", "mp4", "-i", "pipe:0",
        "-map", "0", "-c", "copy", *_SAME_BYTES,
        "-f", "mp4", "-movflags", "+faststart", f"file:{out}",
    ]  # fmt: skip
    feed = _stream(opening, segments)
    run_ffmpeg(command, feed=feed, deadline_s=deadline_s, purpose=f"joining {len(segments)} segments")
    if sound is not None:
        opening.unlink()


def _add_sound(segment: Path, sound: Path, *, out: Path, ffmpeg: Path, deadline_s: float) -> None:
    """Writes ``segment``, the first of a video, with all of ``sound`` to ``out``.

    What comes from one input is joined in its order. From two, ffmpeg's threads would mix it differently each time,
    unless it waited for both, as it does here: in a whole video it would wait with all of it in memory.
    """
    command = [
        str(ffmpeg), "-hide_banner", "-loglevel", "error", "-y",
        "-cpuflags", "0",  # sums with a CPU's own instructions have other last bits
        "-f", "mp4", "-i", f"file:{segment}", "-f", "wav", "-i", f"file:{sound}",
        "-map", "0:v:0", "-map", "1:a:0", "-c:v", "copy", "-c:a", "aac", "-b:a", "192k", *_SAME_BYTES,
        "-max_interleave_delta", "0",
        # As a segment, but the index waits for the first frames, so that it can say when the sound begins.
        "-f", "mp4", "-movflags", FRAGMENTED.replace("empty_moov", "delay_moov"), f"file:{out}",
    ]  # fmt: skip
    run_ffmpeg(command, feed=(), deadline_s=deadline_s, purpose="encoding the sound of the clip")


def verify(path: Path, *, frames: int, width: int, height: int, fps: int, sound_s: float = 0.0) -> None:
    """Decodes the whole video and compares it with the plan. ``sound_s``: seconds of sound, 0 if it has none.
    Raises OutputError with both values of what differs."""
    try:
        with open_video(path) as (container, stream):
            found, tick = 0, stream.time_base or Fraction(0)
            for found, frame in enumerate(container.decode(stream), start=1):
                _require_equal(path, f"time of frame {found - 1}", Fraction(found - 1, fps), (frame.pts or 0) * tick)
                _require_equal(path, f"size of frame {found - 1}", (width, height), (frame.width, frame.height))
                _require_equal(path, f"frame {found - 1}: damaged", False, frame.is_corrupt)
            _require_equal(path, "number of frames", frames, found)
            _require_equal(path, "duration in seconds", Fraction(frames, fps), (stream.duration or 0) * tick)
            _require_equal(path, "start in seconds", Fraction(0), (stream.start_time or 0) * tick)
            _require_equal(path, "codec", "h264", stream.codec_context.name)
            _require_equal(path, "pixel format", "yuv420p", stream.codec_context.pix_fmt)
            kinds = ["video", "audio"] if sound_s else ["video"]
            _require_equal(path, "streams", kinds, [stream.type for stream in container.streams])
        if sound_s:
            _verify_sound(path, sound_s)
    except MediaError as exc:
        raise OutputError(f"The finished video {exc.reason}.", remedy=_REMEDY) from exc
    with path.open("rb") as file:
        order = [kind for kind, _, _ in _boxes(file, path) if kind in (b"moov", b"mdat")]
    _require_equal(path, "order of index and frames", [b"moov", b"mdat"], order)


def _verify_sound(path: Path, seconds: float) -> None:
    with open_video(path) as (container, _):
        stream = container.streams.audio[0]
        rate = stream.rate
        heard = sum(frame.samples for frame in container.decode(stream)) / rate
        _require_equal(path, "codec of the sound", "aac", stream.codec_context.name)
        # Blocks of 1024 samples, the first of which only starts the decoder.
        if not seconds <= heard < seconds + 2 * 1024 / rate:
            _require_equal(path, "seconds of sound", seconds, heard)


def _require_equal(path: Path, what: str, planned: object, found: object) -> None:
    if found != planned:
        values = f"planned {_printable(planned)}, found {_printable(found)}"
        raise OutputError(f"{path.name}, {what}: {values}.", remedy=_REMEDY)


def _printable(value: object) -> object:
    return round(float(value), 6) if isinstance(value, Fraction) else value


def _stream(opening: Path, segments: Sequence[Path]) -> Iterator[bytes]:
    """``opening``, the first of ``segments`` with or without sound, then what follows the header in the others."""
    first = None
    for path in segments:
        with path.open("rb") as file:
            fragments = [start for kind, start, _ in list(_boxes(file, path)) if kind == b"moof"]
            if not fragments:
                raise OutputError(f"Segment {path.name} holds no frames.", remedy=_REMEDY)
            file.seek(0)
            header = file.read(fragments[0])
            if first is None:
                first = header
                with opening.open("rb") as begin:
                    yield from iter(partial(begin.read, _BLOCK), b"")
                continue
            if header != first:
                raise OutputError(
                    f"Segment {path.name} has another header than {segments[0].name}.",
                    remedy="They were encoded with different sizes, rates or settings and cannot be joined.",
                )
            while block := file.read(_BLOCK):
                yield block


def _boxes(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, int, int]]:
    """The outermost boxes of an MP4: kind, first byte, size. Raises OutputError when they do not fill the file."""
    end = file.seek(0, 2)
    start = 0
    while start < end:
        file.seek(start)
        head = file.read(16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size < 8 or start + size > end:
            part = f"a part of {size} bytes at {start} of {end}"
            raise OutputError(f"{path.name} is not a whole MP4: {part}.", remedy=_REMEDY)
        yield kind, start, size
        start += size
