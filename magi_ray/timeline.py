"""Arithmetic of frames, latent frames, chunks, windows and stages. No tensors.

A chunk is 6 latent frames, a latent frame is 4 video frames (spec §1: chunk_width 6, temporal_downsample_factor 4).
Chunks are numbered from 0 among the *denoised* ones; the whole clean chunks of a video prefix come before them
(``offset`` of them). With window W, chunk i enters at stage i and is clean at the end of stage i + W − 1 (spec §5).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

FRAMES_PER_LATENT = 4
# Of MAGI-1, not an option: no stage's identity names it, so another number needs another `identity.FORMAT`.
LATENTS_PER_CHUNK = 6
FRAMES_PER_CHUNK = FRAMES_PER_LATENT * LATENTS_PER_CHUNK
SPATIAL_FACTOR = 8
LATENT_CHANNELS = 16
SIZE_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Which chunks a video has and which stages make them.

    num_chunks: denoised chunks, ≥ 1.  window_size: chunks in flight, ≥ 1.
    prefix_latents: latent frames of the prefix: 0 for text, 1 for an image, frames // 4 for a video.
    include_prefix: whether the finished video begins with the prefix's frames.
    new_frames: frames of new video, if that is fewer than the chunks hold: the end of the last chunk is not shown.
    """

    num_chunks: int
    window_size: int
    prefix_latents: int = 0
    include_prefix: bool = False
    new_frames: int | None = None

    @property
    def offset(self) -> int:
        """Whole clean chunks in front of the first denoised one."""
        return self.prefix_latents // LATENTS_PER_CHUNK

    @property
    def num_stages(self) -> int:
        return self.num_chunks + self.window_size - 1

    @property
    def prefix_latents_in_first_chunk(self) -> int:
        """Latent frames of the prefix that overwrite the start of chunk 0."""
        return self.prefix_latents % LATENTS_PER_CHUNK

    @property
    def dropped_frames(self) -> int:
        """Frames of chunk 0 that belong to a video prefix and are not emitted; an image's chunk is kept whole."""
        return 0 if self.prefix_latents == 1 else self.prefix_latents_in_first_chunk * FRAMES_PER_LATENT

    @property
    def trimmed_frames(self) -> int:
        """Frames at the end of the last chunk that are not emitted."""
        if self.new_frames is None:
            return 0
        return self.num_chunks * FRAMES_PER_CHUNK - self.dropped_frames - self.new_frames

    @property
    def included_frames(self) -> int:
        """Frames of a video prefix that the finished video begins with. One latent frame is in its chunk already."""
        return self.prefix_latents * FRAMES_PER_LATENT if self.include_prefix and self.prefix_latents > 1 else 0

    @property
    def num_frames(self) -> int:
        """Frames of the finished video."""
        shown = self.num_chunks * FRAMES_PER_CHUNK - self.dropped_frames - self.trimmed_frames
        return self.included_frames + shown

    def chunk_frames(self, chunk: int) -> int:
        """Frames that chunk ``chunk`` contributes to the finished video."""
        dropped = self.dropped_frames if chunk == 0 else 0
        trimmed = self.trimmed_frames if chunk == self.num_chunks - 1 else 0
        return FRAMES_PER_CHUNK - dropped - trimmed

    def first_frame(self, chunk: int) -> int:
        """Index in the finished video of the first frame that ``chunk`` contributes."""
        return self.included_frames + chunk * FRAMES_PER_CHUNK - (self.dropped_frames if chunk else 0)

    def window(self, stage: int) -> range:
        """Chunks in flight during ``stage``, oldest first."""
        return range(max(0, stage - self.window_size + 1), min(self.num_chunks, stage + 1))

    def entering(self, stage: int) -> int | None:
        """The chunk that starts from noise in ``stage``, if any."""
        return stage if stage < self.num_chunks else None

    def finished(self, stage: int) -> int | None:
        """The chunk that is clean at the end of ``stage``, if any."""
        chunk = stage - self.window_size + 1
        return chunk if chunk >= 0 else None

    def chunk_stages(self, stages: int) -> int:
        """How many of its own stages each chunk has behind it after the first ``stages``, summed over the chunks. A
        chunk has ``window_size``."""
        clean = min(self.num_chunks, max(0, stages - self.window_size + 1))
        begun = min(self.num_chunks, stages)
        in_flight = begun - clean  # the newest of them has stages − begun + 1 behind it
        return clean * self.window_size + in_flight * (stages - begun + 1) + in_flight * (in_flight - 1) // 2

    def finishing_stage(self, chunk: int) -> int:
        """The stage at whose end ``chunk`` is clean."""
        return chunk + self.window_size - 1

    def duration_index(self, chunk: int) -> int:
        """1…8: the DURATION token of ``chunk``: chunks that remain after it, at most 7, plus one (spec §4)."""
        return min(self.num_chunks - chunk - 1, 7) + 1


def frames_for_seconds(seconds: float, fps: float) -> int:
    """Fewest frames that last at least ``seconds`` at ``fps``, at least one."""
    # Rounded to a whole frame first: 0.1 + 0.2 s must not cost one more.
    return max(1, ceil(round(seconds * fps, 6)))


def chunks_for_frames(frames: int, prefix_latents: int = 0) -> int:
    """Fewest denoised chunks that hold ``frames``, ≥ 1, of new video (prefix frames not counted)."""
    dropped = Timeline(num_chunks=1, window_size=1, prefix_latents=prefix_latents).dropped_frames
    return ceil((frames + dropped) / FRAMES_PER_CHUNK)
