"""The sound of a clip, for as long as the frames of it that a video begins with."""

from __future__ import annotations

import hashlib
import wave
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.video.frame import VideoFrame

from magi_ray.errors import MediaError
from magi_ray.media.reader import open_video

_JUMP_S = Fraction(1, 10)  # times in files are rounded; only a longer jump is silence, or is cut


@dataclass(frozen=True, kw_only=True)
class Sound:
    """samples: int16 [samples, 1 or 2 channels], at least one.  rate: samples per second."""

    samples: npt.NDArray[np.int16]
    rate: int

    @property
    def digest(self) -> str:
        """sha256 of what is heard."""
        head = f"{self.rate} {self.samples.shape[1]} ".encode()
        return hashlib.sha256(head + self.samples.tobytes()).hexdigest()

    def write(self, path: Path) -> None:
        """Writes a WAV file."""
        with wave.open(str(path), "wb") as file:
            file.setnchannels(self.samples.shape[1])
            file.setsampwidth(2)
            file.setframerate(self.rate)
            file.writeframes(self.samples.astype("<i2").tobytes())


def has_sound(path: Path) -> bool:
    """Raises MediaError."""
    with open_video(path) as (container, _):
        return bool(container.streams.audio)


def read_sound(path: Path, *, begin: Fraction, end: Fraction) -> Sound | None:
    """What is heard between two times, in seconds from the clip's first frame; None if that is nothing.

    The first sound of a clip counts. Where it begins later or has a gap there is silence; where it ends earlier, this
    ends too. More than two channels become two. Memory does not grow with the clip's length.  Raises MediaError.
    """
    with open_video(path) as (container, stream):
        picture = next(container.decode(stream), None)
        shown = _time(picture) or Fraction(0)
    with open_video(path) as (container, _):
        samples, resampler, at, heard = np.zeros((0, 1), np.int16), None, 0, 0
        try:
            for frame in container.decode(audio=0) if container.streams.audio else ():
                rate, channels = frame.sample_rate, min(2, len(frame.layout.channels))
                time = None if (heard_at := _time(frame)) is None else heard_at - shown - begin
                if resampler is None:
                    resampler = AudioResampler(format="s16", layout="stereo" if channels == 2 else "mono", rate=rate)
                    samples = np.zeros((round((end - begin) * rate), channels), np.int16)
                    at = round((time or 0) * rate)
                elif time is not None and abs(time - Fraction(at, rate)) > _JUMP_S:
                    at = round(time * rate)
                for part in resampler.resample(frame):
                    block = part.to_ndarray().reshape(-1, samples.shape[1])
                    first, last = max(0, at), min(len(samples), at + len(block))
                    if first < last:
                        samples[first:last], heard = block[first - at : last - at], max(heard, last)
                    at += len(block)
                if at >= len(samples):
                    break
        except ValueError as exc:  # not of FFmpeg: PyAV's word for a sound that changes its form on the way
            raise MediaError.about(path, f"has a sound that cannot be read: {exc}") from exc
    return Sound(samples=samples[:heard], rate=rate) if heard else None


def _time(frame: AudioFrame | VideoFrame | None) -> Fraction | None:
    """When ``frame`` begins, in seconds; None if its file does not say."""
    if frame is None or frame.pts is None or frame.time_base is None:
        return None
    return frame.pts * frame.time_base
