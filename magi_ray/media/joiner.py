"""Joins the segments of a video into one mp4 without re-encoding, and checks the result frame by frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

from magi_ray.errors import MediaError, OutputError
from magi_ray.media.encoder import run_ffmpeg
from magi_ray.media.reader import open_video

_BLOCK = 1 << 20
_REMEDY = "Nothing was published, and the stages are kept: resume to join the video again."


def join(segments: Sequence[Path], *, out: Path, ffmpeg: Path, deadline_s: float = 3600.0) -> None:
    """Writes the frames of ``segments`` (from ``encode_segment``, in order, at least one) to the mp4 ``out``.

    The first frame is at time 0. The index comes first, so that players can begin before all is loaded. The same
    segments give the same bytes. Memory does not grow with the video, except for the index.
    Raises OutputError, WorkerLost.
    """
    command = [
        str(ffmpeg), "-hide_banner", "-loglevel", "error", "-y",
        "-f", "mp4", "-i", "pipe:0",
        "-map", "0:v:0", "-c", "copy", "-map_metadata", "-1", "-flags", "+bitexact", "-fflags", "+bitexact",
        "-f", "mp4", "-movflags", "+faststart", f"file:{out}",
    ]  # fmt: skip
    run_ffmpeg(command, feed=_stream(segments), deadline_s=deadline_s, purpose=f"joining {len(segments)} segments")


def verify(path: Path, *, frames: int, width: int, height: int, fps: int) -> None:
    """Decodes the whole video and compares it with the plan. Raises OutputError with both values of what differs."""
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
            _require_equal(path, "streams", 1, len(container.streams))
    except MediaError as exc:
        raise OutputError(f"The finished video is damaged: {exc.message}", remedy=_REMEDY) from exc
    with path.open("rb") as file:
        order = [kind for kind, _, _ in _boxes(file, path) if kind in (b"moov", b"mdat")]
    _require_equal(path, "order of index and frames", [b"moov", b"mdat"], order)


def _require_equal(path: Path, what: str, planned: object, found: object) -> None:
    if found != planned:
        values = f"planned {_printable(planned)}, found {_printable(found)}"
        raise OutputError(f"{path.name}, {what}: {values}.", remedy=_REMEDY)


def _printable(value: object) -> object:
    return round(float(value), 6) if isinstance(value, Fraction) else value


def _stream(segments: Sequence[Path]) -> Iterator[bytes]:
    """The header of the first segment, then what follows the header in every segment."""
    header = None
    for path in segments:
        with path.open("rb") as file:
            fragments = [start for kind, start, _ in list(_boxes(file, path)) if kind == b"moof"]
            if not fragments:
                raise OutputError(f"Segment {path.name} holds no frames.", remedy=_REMEDY)
            file.seek(0)
            own = file.read(fragments[0])
            if header is None:
                header = own
                yield header
            if own != header:
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
