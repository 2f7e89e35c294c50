"""Which frames of a clip a video continues, in numbers for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Taken:
    """first, last: of the frames that are taken, from 0, at the row's fps.  of: how many the clip has.
    begins_s, ends_s: seconds from the clip's begin at which the first one begins and the last one ends."""

    first: int
    last: int
    of: int
    begins_s: float
    ends_s: float

    @classmethod
    def of_clip(cls, clip_frames: int, *, frames: int, part: Literal["start", "end"], fps: int) -> Taken:
        """``frames`` of a clip that has ``clip_frames``."""
        first = clip_frames - frames if part == "end" else 0
        last = first + frames - 1
        return cls(first=first, last=last, of=clip_frames, begins_s=first / fps, ends_s=(last + 1) / fps)

    def __str__(self) -> str:
        return f"frames {self.first}–{self.last} of {self.of}, ends at {self.ends_s:.2f} s"
