"""The plan of a video: all that rendering it needs to know, found without loading a network."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from magi_ray.manifest import Caption, Row
from magi_ray.media.clips import Taken
from magi_ray.models.text.prompt import clean_caption
from magi_ray.render.plans import identity
from magi_ray.render.plans.identity import Digests, VideoInputs
from magi_ray.render.plans.takes import Wish
from magi_ray.sampling.window import forwards_per_stage
from magi_ray.settings import AS_THE_RUN, ChunkControl, RuntimeConfig, Settings, override
from magi_ray.storage.records import digest
from magi_ray.timeline import FRAMES_PER_LATENT, Timeline, chunks_for_frames


@dataclass(frozen=True, kw_only=True)
class Media:
    """A row's image or video, as found at submission.

    sha256: of the file; it lies in the store under that name.  latents: latent frames it gives.

    Runs before format 3 do not say:
    pixels: sha256 of the frames that these latents are encoded from, uint8 RGB [T, H, W, 3].
    clip_frames: of a clip, how many frames it has in all at the row's fps.
    exact_length: whether what is shown after a clip ends with the frame that was asked for, not with its chunk.
    sound: sha256 of what is heard with those frames (``media.sound``), if the finished video is to carry it.
    """

    kind: Literal["image", "video"]
    sha256: str
    latents: int
    pixels: str | None = None
    clip_frames: int | None = None
    exact_length: bool = False
    sound: str | None = None

    @property
    def identity(self) -> str:
        """The same for two files that look alike, and sound alike where that is carried."""
        return "+".join(filter(None, (self.pixels or self.sha256, self.sound)))


@dataclass(frozen=True, kw_only=True)
class RowPlan(VideoInputs):
    """One video to be rendered. Small, picklable, and determined by the row with its takes, settings and weights alone.

    captions: cleaned, one per denoised chunk.  stage_keys: identity of every stage, in order.
    """

    row: int
    job_id: str
    priority: int
    captions: tuple[str, ...]
    media: Media | None
    stage_keys: tuple[str, ...]

    def pre_image(self, stage: int) -> dict[str, Any]:
        """What ``stage_keys[stage]`` is the hash of."""
        return identity.stage_pre_image(self, stage, previous=self.stage_keys[stage - 1] if stage else None)

    @property
    def taken(self) -> Taken | None:
        """Which frames of its clip the video continues; None without a clip, and in runs before format 3."""
        media, runtime = self.media, self.settings.runtime
        if media is None or media.clip_frames is None:
            return None
        frames, part = media.latents * FRAMES_PER_LATENT, self.settings.prefix.clip_end
        return Taken.of_clip(media.clip_frames, frames=frames, part=part, fps=runtime.fps)

    @property
    def forwards_per_stage(self) -> int:
        """Denoising steps between two chunks becoming clean."""
        runtime = self.settings.runtime
        return forwards_per_stage(num_steps=runtime.num_steps, window_size=runtime.window_size)


def plan_row(
    row: Row, settings: Settings, digests: Digests, media: Media | None, takes: tuple[Wish, ...] = ()
) -> RowPlan:
    """The plan of ``row``, whose values replace those of ``settings``. Raises SettingsError if they do not fit.

    takes: what was asked of it since it was submitted, in that order.
    """
    size = {"video_size_w": row.width, "video_size_h": row.height}
    runtime = size | {"fps": row.fps, "seed": row.seed, "num_steps": row.num_steps}
    changes = {"runtime": runtime, "prefix": row.prefix.model_dump()}
    settings = override(settings, changes, source=f"row {row.number}")
    timeline = timeline_of(row, media, window_size=settings.runtime.window_size)
    per_chunk = _entries_per_chunk(row, timeline.num_chunks)
    cleaned = {entry.prompt: clean_caption(entry.prompt) for entry in row.captions}
    captions = tuple(cleaned[entry.prompt] for entry in per_chunk)
    text_keys = {c: digest(identity.text_pre_image(c, settings, digests)) for c in set(captions)}
    prefix_digest = None
    if media is not None:
        prefix_digest = digest(prefix_pre_image(media, settings, digests))
    plan = RowPlan(
        row=row.number,
        job_id=row.job_id,
        priority=row.priority,
        settings=settings,
        digests=digests,
        timeline=timeline,
        captions=captions,
        caption_digests=tuple(text_keys[caption] for caption in captions),
        controls=_controls(per_chunk, settings.runtime),
        takes=takes,
        media=media,
        prefix_digest=prefix_digest,
        stage_keys=(),
    )
    return replace(plan, stage_keys=identity.stage_keys(plan))


def timeline_of(row: Row, media: Media | None, *, window_size: int) -> Timeline:
    """The chunks and frames of ``row``. What follows a clip begins in the clip's last chunk, unless that is whole."""
    latents = media.latents if media else 0
    chunks, new_frames = chunks_for_frames(row.frames, latents), None
    if media is not None and latents > 1:
        if media.exact_length:
            new_frames = row.frames
        elif row.num_chunks is not None:
            chunks = row.num_chunks
    return Timeline(
        num_chunks=chunks,
        window_size=window_size,
        prefix_latents=latents,
        include_prefix=row.prefix.include,
        new_frames=new_frames,
    )


def prefix_pre_image(media: Media, settings: Settings, digests: Digests) -> dict[str, Any]:
    """What the latent of ``media`` depends on. ``settings`` carries the row's size and fps."""
    return identity.prefix_pre_image(media.kind, settings, digests, sha256=media.sha256, pixels=media.pixels)


def plan_rows(
    rows: tuple[Row, ...],
    settings: Settings,
    digests: Digests,
    media: Mapping[str, Media],
    takes: Mapping[str, tuple[Wish, ...]],
) -> dict[str, RowPlan]:
    """A plan for every row, by job_id, in the manifest's order. media, takes: by job_id, of the rows that have any.

    Raises SettingsError.
    """
    return {
        row.job_id: plan_row(row, settings, digests, media.get(row.job_id), takes.get(row.job_id, ())) for row in rows
    }


def _entries_per_chunk(row: Row, num_chunks: int) -> list[Caption]:
    """The entry of the row's schedule that applies to each chunk."""
    starts = [entry.start_chunk for entry in row.captions]
    return [row.captions[bisect_right(starts, chunk) - 1] for chunk in range(num_chunks)]


def _controls(per_chunk: Sequence[Caption], runtime: RuntimeConfig) -> dict[int, ChunkControl]:
    """The controls that differ from ``runtime``: repeating what the run does anyway gives the same video."""
    run = {name: getattr(runtime, name) for name in ("text_scales", "prev_chunk_scales")}
    run["kv_range"] = runtime.noise2clean_kvrange
    differing = {}
    for entry in set(per_chunk):
        same = {name: None for name, value in run.items() if getattr(entry.control, name) == value}
        # By start_chunk, so that the chunks of an entry share one object.
        differing[entry.start_chunk] = entry.control.model_copy(update=same)
    controls = {chunk: differing[entry.start_chunk] for chunk, entry in enumerate(per_chunk)}
    return {chunk: control for chunk, control in controls.items() if control != AS_THE_RUN}
