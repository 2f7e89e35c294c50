"""Reads images and videos with PyAV: their pixels at a given size and rate.

Pixels come as uint8 RGB in 0…255. The same file gives the same pixels on every machine: swscale runs in its
bit-exact mode on one thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Literal

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from magi_ray.errors import MediaError
from magi_ray.media.pictures import open_picture, shown_picture_size

Fit = Literal["crop", "pad", "fit"]
ClipPart = Literal["start", "end"]
Pixels = npt.NDArray[np.uint8]

_SCALING = (
    Interpolation.LANCZOS
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.BITEXACT
)


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and its first video stream (an image is a video of one frame). Raises MediaError, also for PyAV's
    errors in the block inside."""
    try:
        # Opened by number and so without a name: a name like "a%02d.png" or "x:y.mp4" means something to ffmpeg.
        with open(os.open(path, os.O_RDONLY), "rb") as file, av.open(file, "r") as container:  # noqa: PTH123
            if not container.streams.video:
                kinds = ", ".join(stream.type for stream in container.streams) or "nothing"
                raise _unreadable(path, f"it holds {kinds}, but no picture")
            stream = container.streams.video[0]
            # Not by frames: errors in the last few frames would then go unreported.
            stream.thread_type = "SLICE"
            yield container, stream
    except (av.FFmpegError, OSError) as exc:
        raise _unreadable(path, exc.strerror or str(exc)) from exc


def shown_size(path: Path) -> tuple[int, int]:
    """Width and height of an image or a clip as players show it: turned upright, with square pixels.

    Raises MediaError.
    """
    try:
        with open_picture(path) as picture:
            if picture is not None:
                return shown_picture_size(picture)
    except OSError as exc:
        raise _unreadable(path, exc.strerror or str(exc)) from exc
    with open_video(path) as (container, stream):
        _, _, frame = next(_timed(path, container, stream))
        width, height = frame.width, frame.height
        aspect = stream.sample_aspect_ratio or Fraction(1)
        # Players never shrink: the side with the shorter pixels is enlarged.
        width, height = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
        return (height, width) if frame.rotation % 180 else (width, height)


def read_image(path: Path, *, width: int, height: int, fit: Fit) -> Pixels:
    """The picture (of a video: its first frame) as uint8 [height, width, 3]. ``fit`` as in ``read_video``.

    Raises MediaError.
    """
    with open_video(path) as (container, stream):
        _, _, frame = next(_timed(path, container, stream))
        return _scaled(frame, width=width, height=height, fit=fit)


def read_video(path: Path, *, width: int, height: int, fps: int, max_frames: int, part: ClipPart, fit: Fit) -> Pixels:
    """At most ``max_frames`` frames at ``fps`` of the start or the end of a clip: uint8 [T, height, width, 3], T ≥ 1.

    Output frame k is the source frame whose time is nearest to k / fps (the earlier of two equally near).
    fit: "crop" fills the frame and cuts off the edges; "pad" shows all, with black bars; "fit" stretches.
    Memory does not grow with the clip's length.  Raises MediaError.
    """
    with open_video(path) as (container, stream):
        frames = _resampled(_timed(path, container, stream), fps)
        chosen: Iterable[VideoFrame] = islice(frames, max_frames) if part == "start" else deque(frames, max_frames)
        return np.stack([_scaled(frame, width=width, height=height, fit=fit) for frame in chosen])


def count_frames(path: Path, *, fps: int, max_frames: int) -> int:
    """How many frames ``read_video`` gives. Decodes no more of the clip than needed. Raises MediaError."""
    with open_video(path) as (container, stream):
        return sum(1 for _ in islice(_resampled(_timed(path, container, stream), fps), max_frames))


def _timed(
    path: Path, container: InputContainer, stream: VideoStream
) -> Iterator[tuple[Fraction, Fraction, VideoFrame]]:
    """Every frame, after the seconds from the first frame's begin at which it begins and ends."""
    rate = stream.average_rate or stream.guessed_rate or Fraction(24)
    tick = stream.time_base or 1 / rate
    start, count = Fraction(0), 0
    try:
        for frame in container.decode(stream):
            # Some formats (raw streams, single pictures) carry no times.
            begin = count / rate if frame.pts is None else frame.pts * tick
            start = start if count else begin
            length = frame.duration * tick if frame.duration else 1 / rate
            yield begin - start, begin - start + length, frame
            count += 1
    except av.FFmpegError as exc:
        raise _unreadable(path, f"it is damaged after {count} frames ({exc.strerror})") from exc
    if not count:
        raise _unreadable(path, "it has no frames")


def _resampled(timed: Iterable[tuple[Fraction, Fraction, VideoFrame]], fps: int) -> Iterator[VideoFrame]:
    """The frames nearest to 0, 1/fps, 2/fps, …, for as long as the clip lasts, rounded to a whole frame."""
    count, end = 0, Fraction(0)
    before: tuple[Fraction, VideoFrame] | None = None
    for begin, end, frame in timed:  # noqa: B007
        while (wanted := Fraction(count, fps)) <= begin:
            yield before[1] if before and wanted - before[0] <= begin - wanted else frame
            count += 1
        before = begin, frame
    while before and count < round(end * fps):
        yield before[1]
        count += 1


def _scaled(frame: VideoFrame, *, width: int, height: int, fit: Fit) -> Pixels:
    """uint8 [height, width, 3]."""
    pixels = _rgb(frame, frame.width, frame.height)
    if fit == "crop":
        pixels = _centre(pixels, *_inscribed((frame.height, frame.width), (height, width)))
    inner = _inscribed((height, width), pixels.shape[:2]) if fit == "pad" else (height, width)
    scaled = _rgb(VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"), inner[1], inner[0])
    if inner == (height, width):
        return scaled
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    _centre(canvas, *inner)[:] = scaled
    return canvas


def _rgb(frame: VideoFrame, width: int, height: int) -> Pixels:
    rgb = frame.reformat(width, height, "rgb24", interpolation=_SCALING, threads=1)
    return rgb.to_ndarray().astype(np.uint8, copy=False)


def _inscribed(outer: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) inside ``outer`` with the aspect ratio of ``shape``, at least one pixel."""
    (outer_h, outer_w), (h, w) = outer, shape
    if outer_w * h > outer_h * w:
        return outer_h, max(1, round(outer_h * w / h))
    return max(1, round(outer_w * h / w)), outer_w


def _centre(pixels: Pixels, height: int, width: int) -> Pixels:
    """The middle ``height`` × ``width`` of ``pixels``, as a view."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _unreadable(path: Path, what: str) -> MediaError:
    return MediaError.about(
        path,
        f"cannot be read: {what}",
        remedy="Images may be PNG, JPEG or WebP; a video that is not read can be converted: "
        "ffmpeg -i IN -c:v libx264 -pix_fmt yuv420p OUT.mp4",
    )
