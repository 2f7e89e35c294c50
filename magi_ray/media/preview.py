"""Single frames as PNG pictures."""

from __future__ import annotations

from collections.abc import Collection
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from magi_ray.errors import MediaError
from magi_ray.media.reader import Pixels, open_video


def frames_at(path: Path, numbers: Collection[int]) -> Pixels:
    """The frames with these numbers (from 0), in video order: uint8 RGB [count, H, W, 3]; count: distinct numbers.

    Raises MediaError, also when the video is too short.
    """
    wanted = set(numbers)
    with open_video(path) as (container, stream):
        frames = enumerate(islice(container.decode(stream), max(wanted) + 1))
        found = [frame.to_ndarray(format="rgb24") for number, frame in frames if number in wanted]
    if len(found) < len(wanted):
        raise MediaError.about(path, f"has no frame {max(wanted)}", remedy="Ask for earlier ones.")
    return np.stack(found)


def write_png(path: Path, frame: Pixels) -> None:
    """Writes ``frame``, uint8 RGB [H, W, 3], to ``path``."""
    encoder = av.CodecContext.create("png", "w")
    assert isinstance(encoder, VideoCodecContext)
    encoder.height, encoder.width = frame.shape[:2]
    encoder.pix_fmt = "rgb24"
    encoder.framerate = Fraction(1)
    picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    path.write_bytes(b"".join(bytes(packet) for packet in [*encoder.encode(picture), *encoder.encode(None)]))
