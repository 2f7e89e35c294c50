"""Which chunks a chunk sees, and what the cache must hold for it (spec §5, KV ranges).

Chunks are numbered absolutely here: a video prefix's whole chunks first, then the denoised ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from magi_ray.settings import ChunkControl, RuntimeConfig
from magi_ray.timeline import Timeline

# How far a prefix chunk reaches back when everything else sees all of history.
_PREFIX_REACH = 8


@dataclass(frozen=True, kw_only=True)
class KVRanges:
    """Ranges are [first, end) in absolute chunks.

    noise2clean: chunks seen, itself included, in each equal part of the ``num_steps`` steps; empty: all of history.
    clean: chunks a clean chunk sees, itself included; −1: the last value of noise2clean.
    own: chunks with values of their own in place of noise2clean, never empty.
    """

    noise2clean: tuple[int, ...]
    clean: int
    num_steps: int
    own: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, runtime: RuntimeConfig, controls: Mapping[int, ChunkControl] | None = None, *, offset: int = 0) -> Self:
        """controls: of the denoised chunks that differ from the run, numbered from 0.  offset: of the timeline."""
        return cls(
            noise2clean=runtime.noise2clean_kvrange,
            clean=runtime.clean_chunk_kvrange,
            num_steps=runtime.num_steps,
            own={offset + chunk: c.kv_range for chunk, c in (controls or {}).items() if c.kv_range},
        )

    def in_flight(self, chunk: int, step: int) -> tuple[int, int]:
        """What ``chunk`` sees in its step ``step`` (0 … num_steps − 1)."""
        reaches = self.own.get(chunk, self.noise2clean)
        return _back(chunk, reaches[step * len(reaches) // self.num_steps]) if reaches else (0, chunk + 1)

    def clean_chunk(self, chunk: int) -> tuple[int, int]:
        """What a chunk sees in its clean pass."""
        reaches = self.own.get(chunk, self.noise2clean)
        return _back(chunk, self._clean_reach(reaches)) if reaches else (0, chunk + 1)

    def prefix_chunk(self, chunk: int) -> tuple[int, int]:
        """What a whole chunk of a video prefix sees when it is cached."""
        return _back(chunk, self._clean_reach(self.noise2clean))

    @property
    def clean_chunks_see_others(self) -> bool:
        """Whether a clean chunk's keys depend on the clean chunks before it."""
        return not self.noise2clean or any(self._clean_reach(r) != 1 for r in (self.noise2clean, *self.own.values()))

    def _clean_reach(self, reaches: tuple[int, ...]) -> int:
        if self.clean != -1:
            return self.clean
        return reaches[-1] if reaches else _PREFIX_REACH

    def _first_seen(self, timeline: Timeline, stage: int) -> int:
        """The oldest chunk that anything sees in ``stage``."""
        window = timeline.window(stage)
        per_stage = self.num_steps // timeline.window_size
        seen = [
            self.in_flight(timeline.offset + chunk, (stage - chunk) * per_stage + step)[0]
            for chunk in window
            for step in range(per_stage)
        ]
        just_clean = timeline.offset + window[0] - 1
        if just_clean >= timeline.offset:
            seen.append(self.clean_chunk(just_clean)[0])
        elif just_clean >= 0:
            seen.append(self.prefix_chunk(just_clean)[0])
        return min(seen)


def _back(chunk: int, reach: int) -> tuple[int, int]:
    return max(0, chunk + 1 - reach), chunk + 1


def cache_depth(timeline: Timeline, ranges: KVRanges) -> int:
    """Clean chunks that must be cached at once, at least 1, at most the longest range. It does not depend on the
    length of a long video, unless the ranges are empty (all of history)."""
    if not ranges.noise2clean:
        return timeline.offset + timeline.num_chunks
    # From this stage on, every stage looks like the one before, one chunk later; chunks with ranges of their own apart.
    steady = timeline.window_size + max(*ranges.noise2clean, ranges.clean, 0)
    stages = set(range(min(timeline.num_stages, steady + 1)))
    for chunk in ranges.own:
        enters = chunk - timeline.offset
        stages.update(range(enters, min(enters + timeline.window_size + 1, timeline.num_stages)))
    return max(1, *(timeline.offset + timeline.window(s)[0] - ranges._first_seen(timeline, s) for s in stages))


def first_needed(timeline: Timeline, ranges: KVRanges, stage: int) -> int:
    """The oldest absolute chunk whose clean pass must have run before ``stage`` begins, for this and later stages."""
    if ranges.clean_chunks_see_others:
        return 0
    # A chunk that enters later than `stage` never sees further back than the one that enters at it, unless its own
    # range is longer.
    further = max((reach for reaches in ranges.own.values() for reach in reaches), default=0)
    stages = range(stage, min(stage + timeline.window_size + further, timeline.num_stages))
    return min(ranges._first_seen(timeline, s) for s in stages)


def clean_chunks_needed(timeline: Timeline, ranges: KVRanges, stage: int) -> range:
    """The denoised chunks (numbered from 0, without the prefix) whose clean latents a sampler needs to start at
    ``stage``: with the published ranges and window 4 only the one that just became clean."""
    clean = max(0, stage - timeline.window_size + 1)
    return range(min(max(0, first_needed(timeline, ranges, stage) - timeline.offset), clean), clean)
