"""Small clips with known content."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np


def grey(values: Sequence[int], *, height: int = 16, width: int = 16) -> np.ndarray:
    """uint8 [len(values), height, width, 3]: one flat grey a frame."""
    return np.repeat(np.array(values, np.uint8), height * width * 3).reshape(len(values), height, width, 3)


def waves(count: int, *, height: int = 64, width: int = 96) -> np.ndarray:
    """uint8 [count, height, width, 3]: colours in motion, no two frames alike."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    colours = [np.sin((x + 3 * t) / 9), np.cos((y + 2 * t) / 13), np.sin((x + y - t) / 7)]
    return np.stack([128 + 100 * colour for colour in colours], axis=-1).astype(np.uint8)


def write_lossless(path: Path, frames: np.ndarray, times_ms: Sequence[int]) -> None:
    """A QuickTime file that keeps every pixel and shows frame i at ``times_ms[i]``."""
    with av.open(path, "w", format="mov") as container:
        stream = container.add_stream("png", rate=1000)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "rgb24"
        lengths = [after - before for before, after in pairwise(times_ms)]
        for pixels, time, length in zip(frames, times_ms, [*lengths, lengths[-1]], strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            for packet in stream.encode(frame):
                packet.duration = length
                container.mux(packet)
        container.mux(stream.encode(None))


def decoded_yuv(path: Path) -> list[np.ndarray]:
    with av.open(path) as container:
        return [frame.to_ndarray() for frame in container.decode(video=0)]
