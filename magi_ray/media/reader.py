"""Reads images and clips as players show them, at a given size and rate.

Pixels come as uint8 RGB in 0…255. The same file gives the same pixels on every machine: swscale runs in its
bit-exact mode on one thread.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from math import floor
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from magi_ray.media.bounds import check_gap, check_length, unreadable
from magi_ray.media.frames import FrameConverter, decoded_frames, open_video, scaled, shown_frames
from magi_ray.media.pictures import Pixels, open_picture, shown_picture, shown_picture_size

__all__ = [
    "ClipPart", "Fit", "Inspection", "Pixels", "count_frames", "inspect_clip", "inspect_image", "open_video",
    "read_image", "read_video", "shown_size",
]  # fmt: skip

Fit = Literal["crop", "pad", "fit"]
ClipPart = Literal["start", "end"]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a player shows.  width, height: as shown, with square pixels.  notes: what was done to it, each a predicate
    without its subject, the file ("is interlaced; it is deinterlaced")."""

    width: int
    height: int
    notes: tuple[str, ...]


def shown_size(path: Path) -> tuple[int, int]:
    """Width and height of an image or a clip as players show it: turned upright, with square pixels.

    Raises MediaError.
    """
    with open_picture(path) as picture:
        if picture is not None:
            return shown_picture_size(picture)
    with open_video(path) as (container, stream):
        _, _, frame = next(_timed(path, container, stream))
        return FrameConverter(path, stream).size(frame)


def inspect_image(path: Path) -> Inspection:
    """Decodes all of the picture (of a clip: its first frame). Raises MediaError."""
    pixels, _, notes = _image(path)
    del pixels
    width, height = shown_size(path)
    return Inspection(width=width, height=height, notes=notes)


def inspect_clip(path: Path) -> Inspection:
    """Reads all of the clip, but decodes only its first frame. Raises MediaError, also for one with too many frames or
    seconds, or a frame that is shown for too long."""
    _check_times(path)
    with open_video(path) as (container, stream):
        # Not from shown_frames: a deinterlaced frame does not say what it was.
        frame = next(decoded_frames(container, stream), None)
        if frame is None:
            raise unreadable(path, "it has no frames")
        converter = FrameConverter(path, stream)
        width, height = converter.size(frame)
        return Inspection(width=width, height=height, notes=converter.notes(frame))


def read_image(path: Path, *, width: int, height: int, fit: Fit) -> Pixels:
    """The picture (of a video: its first frame) as uint8 [height, width, 3]. ``fit`` as in ``read_video``.

    Raises MediaError.
    """
    pixels, aspect, _ = _image(path)
    return _fitted(pixels, aspect, width=width, height=height, fit=fit)


def read_video(path: Path, *, width: int, height: int, fps: int, max_frames: int, part: ClipPart, fit: Fit) -> Pixels:
    """At most ``max_frames`` frames at ``fps`` of the start or the end of a clip: uint8 [T, height, width, 3], T ≥ 1.

    Output frame k is the source frame whose time is nearest to k / fps (the earlier of two equally near).
    fit: "crop" fills the frame and cuts off the edges; "pad" shows all, with black bars; "fit" stretches.
    Memory does not grow with the clip's length.  Raises MediaError.
    """
    return read_clip(path, width=width, height=height, fps=fps, max_frames=max_frames, part=part, fit=fit)[0]


def read_clip(
    path: Path, *, width: int, height: int, fps: int, max_frames: int, part: ClipPart, fit: Fit
) -> tuple[Pixels, int]:
    """As ``read_video``, and the clip's number of frames at ``fps`` as far as it was decoded: all of them, unless the
    first ``max_frames`` were enough. Raises MediaError."""
    with open_video(path) as (container, stream):
        frames = _resampled(_timed(path, container, stream), fps)
        found, chosen = 0, deque[VideoFrame](maxlen=max_frames)
        for found, frame in enumerate(islice(frames, max_frames) if part == "start" else frames, 1):  # noqa: B007
            chosen.append(frame)
        show = FrameConverter(path, stream)
        pixels = [
            _fitted(show.pixels(frame), show.aspect(frame), width=width, height=height, fit=fit) for frame in chosen
        ]
        return np.stack(pixels), found


def clip_frames(path: Path, *, fps: int) -> int:
    """How many frames a clip has at ``fps``, as its packets say: nothing is decoded. 0 if they do not say when they are
    shown. Raises MediaError."""
    first: int | None = None
    last = 0
    with open_video(path) as (container, stream):
        tick = stream.time_base or Fraction(0)
        for packet in container.demux(stream):
            if packet.pts is not None and not packet.is_discard:
                first = packet.pts if first is None else min(first, packet.pts)
                last = max(last, packet.pts + (packet.duration or 0))
    return 0 if first is None else round((last - first) * tick * fps)


def count_frames(path: Path, *, fps: int, max_frames: int) -> int:
    """How many frames ``read_video`` gives. Decodes no more of the clip than needed. Raises MediaError."""
    with open_video(path) as (container, stream):
        return sum(1 for _ in islice(_resampled(_timed(path, container, stream), fps), max_frames))


def _image(path: Path) -> tuple[Pixels, Fraction, tuple[str, ...]]:
    """uint8 [H, W, 3], width by height of a pixel, and notes. Raises MediaError."""
    with open_picture(path) as picture:
        if picture is not None:
            pixels, notes = shown_picture(path, picture)
            return pixels, Fraction(1), notes
    with open_video(path) as (container, stream):
        _, _, frame = next(_timed(path, container, stream))
        show = FrameConverter(path, stream)
        return show.pixels(frame), show.aspect(frame), ("is a clip; its first frame is taken", *show.notes(frame))


def _check_times(path: Path) -> None:
    """Raises MediaError for a clip with too many frames or seconds, or a frame that is shown for too long."""
    with open_video(path) as (container, stream):
        tick = stream.time_base or Fraction(1)
        times = array("q")
        for packet in container.demux(stream):
            time = packet.dts if packet.pts is None else packet.pts
            if time is None:
                continue
            times.append(time)
            length = (time - times[0]) * tick
            check_length(path, float(length), len(times))
            if packet.duration:
                check_gap(path, float(packet.duration * tick), float(length))
    ordered = np.sort(np.frombuffer(times, np.int64))
    if len(ordered) > 1:
        gaps = np.diff(ordered)
        longest = int(gaps.argmax())
        check_gap(path, float(gaps[longest] * tick), float((ordered[longest] - ordered[0]) * tick))


def _timed(
    path: Path, container: InputContainer, stream: VideoStream
) -> Iterator[tuple[Fraction, Fraction, VideoFrame]]:
    """Every frame, after the seconds from the first frame's begin at which it begins and ends."""
    rate = stream.average_rate or stream.guessed_rate or Fraction(24)
    tick = stream.time_base or 1 / rate
    start = before = Fraction(0)
    count = 0
    try:
        for frame in shown_frames(container, stream):
            tick = frame.time_base or tick
            # Some formats (raw streams) carry no times.
            begin = count / rate if frame.pts is None else frame.pts * tick
            start = start if count else begin
            length = frame.duration * tick if frame.duration else 1 / rate
            check_gap(path, float(max(begin - start - before, length)), float(before))
            before = begin - start
            check_length(path, float(before), count)
            yield before, before + length, frame
            count += 1
    except av.FFmpegError as exc:
        raise unreadable(path, f"it is damaged after {count} frames ({exc.strerror})") from exc
    if not count:
        raise unreadable(path, "it has no frames")


def _resampled(timed: Iterable[tuple[Fraction, Fraction, VideoFrame]], fps: int) -> Iterator[VideoFrame]:
    """The frames nearest to 0, 1/fps, 2/fps, …, for as long as the clip lasts, rounded to a whole frame."""
    count, end = 0, Fraction(0)
    before: tuple[Fraction, VideoFrame] | None = None
    for begin, end, frame in timed:  # noqa: B007
        due, nearer = floor(begin * fps), floor((before[0] + begin) * fps / 2) if before else -1
        while count <= due:
            yield before[1] if before and count <= nearer else frame
            count += 1
        before = begin, frame
    while before and count < round(end * fps):
        yield before[1]
        count += 1


def _fitted(pixels: Pixels, aspect: Fraction, *, width: int, height: int, fit: Fit) -> Pixels:
    """uint8 [height, width, 3] of [H, W, 3] with pixels that are ``aspect`` times as wide as high."""
    h, w = pixels.shape[:2]
    if fit == "crop":
        pixels = _centre(pixels, *_inscribed((h, w), (height, width / aspect)))
    inner = _inscribed((height, width), (h, w * aspect)) if fit == "pad" else (height, width)
    resized = scaled(pixels, inner[1], inner[0])
    if inner == (height, width):
        return resized
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    _centre(canvas, *inner)[:] = resized
    return canvas


def _inscribed(outer: tuple[int, int], shape: tuple[int, int | Fraction]) -> tuple[int, int]:
    """The largest (height, width) inside ``outer`` with the aspect ratio of ``shape``, at least one pixel."""
    (outer_h, outer_w), (h, w) = outer, shape
    if outer_w * h > outer_h * w:
        return outer_h, max(1, round(outer_h * w / h))
    return max(1, round(outer_w * h / w)), outer_w


def _centre(pixels: Pixels, height: int, width: int) -> Pixels:
    """The middle ``height`` × ``width`` of ``pixels``, as a view."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]
