"""How many bytes of the store a video takes, from its plan alone.

Latents are known to the byte, but for a header of some hundred: float32, for each stage the chunks still under way and
the one that it completes. With four chunks in flight that is one byte for each pixel of each frame, and nine tenths of
the whole. The rest is estimated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.sampling.window import chunks_under_way
from magi_ray.timeline import LATENT_CHANNELS, LATENTS_PER_CHUNK, SPATIAL_FACTOR

# H.264 with crf 18, preset medium: 0.016 to 0.047 for real clips of 144 to 720 lines (ultrafast: up to 0.12).
BYTES_PER_PIXEL = 0.05
# A token is some four letters of a caption.
LETTERS_PER_TOKEN = 4
COMMIT = 4096  # of one to three thousand bytes, in a block of its own
_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Space:
    """Bytes. latents: of stages and a prefix, known exactly.  other: estimated: segments, videos, texts, commits."""

    latents: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        return self.latents + self.other

    def __add__(self, more: Space) -> Space:
        return Space(latents=self.latents + more.latents, other=self.other + more.other)


def stages_space(plan: RowPlan, stages: Iterable[int]) -> Space:
    """What these stages of ``plan`` commit."""
    timeline, chunks, commits = plan.timeline, 0, 0
    for stage in stages:
        chunks += len(chunks_under_way(timeline, stage + 1)) + (timeline.finished(stage) is not None)
        commits += 1
    return Space(latents=chunks * LATENTS_PER_CHUNK * _latent_bytes(plan), other=commits * COMMIT)


def inputs_space(plan: RowPlan, captions: Iterable[str]) -> Space:
    """The embeddings of ``captions``, and the prefix if there is one."""
    model, latents = plan.settings.model, plan.timeline.prefix_latents
    lengths = [min(model.caption_max_length, 1 + len(caption) // LETTERS_PER_TOKEN) for caption in captions]
    texts = sum(lengths) * model.caption_channels * _FLOAT32
    commits = (len(lengths) + (plan.media is not None)) * COMMIT
    return Space(latents=latents * _latent_bytes(plan), other=texts + commits)


def video_space(plan: RowPlan, segments: int) -> Space:
    """``segments`` that are still to be encoded, and the finished video."""
    runtime, timeline = plan.settings.runtime, plan.timeline
    frames = timeline.num_frames * (1 + segments / timeline.num_chunks)
    pixels = frames * runtime.video_size_h * runtime.video_size_w
    return Space(other=int(pixels * BYTES_PER_PIXEL) + (segments + 1) * COMMIT)


def whole_space(plan: RowPlan) -> Space:
    """All of a video of which the store holds nothing."""
    chunks, captions = plan.timeline.num_chunks, set(plan.captions)
    # Each chunk is under way after all of its stages but the last, which completes it.
    latents = chunks * plan.timeline.window_size * LATENTS_PER_CHUNK * _latent_bytes(plan)
    stages = Space(latents=latents, other=plan.timeline.num_stages * COMMIT)
    return stages + inputs_space(plan, captions) + video_space(plan, chunks)


def _latent_bytes(plan: RowPlan) -> int:
    """Of one latent frame."""
    runtime = plan.settings.runtime
    height, width = runtime.video_size_h // SPATIAL_FACTOR, runtime.video_size_w // SPATIAL_FACTOR
    return LATENT_CHANNELS * height * width * _FLOAT32
