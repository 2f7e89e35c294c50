"""The plan of a video: everything its rendering needs to know, found without loading a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from magi_ray.manifest import Row
from magi_ray.models.text.prompt import clean_caption
from magi_ray.render import identity
from magi_ray.render.identity import Digests
from magi_ray.settings import Settings, override
from magi_ray.storage.records import digest
from magi_ray.timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class Media:
    """A row's image or video, as found at submission.

    sha256: of the file; it lies in the store under that name.  latents: latent frames it gives.
    """

    kind: Literal["image", "video"]
    sha256: str
    latents: int


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """One video to be. Small, picklable, and a function of the row, the settings and the weights alone.

    settings: with the row's own size, fps, seed and steps.  captions: cleaned, one per denoised chunk.
    stage_keys: identity of every stage, in order.
    """

    row: int
    job_id: str
    priority: int
    settings: Settings
    digests: Digests
    timeline: Timeline
    captions: tuple[str, ...]
    caption_digests: tuple[str, ...]
    media: Media | None
    prefix_digest: str | None
    stage_keys: tuple[str, ...]

    def pre_image(self, stage: int) -> dict[str, Any]:
        """What ``stage_keys[stage]`` is the hash of."""
        return identity.stage_pre_image(
            self.settings,
            self.digests,
            self.timeline,
            caption_digests=self.caption_digests,
            prefix_digest=self.prefix_digest,
            stage=stage,
            previous=self.stage_keys[stage - 1] if stage else None,
        )

    @property
    def forwards_per_stage(self) -> int:
        """Denoising steps between two chunks becoming clean."""
        return self.settings.runtime.num_steps // self.settings.runtime.window_size


def plan_row(row: Row, settings: Settings, digests: Digests, media: Media | None) -> RowPlan:
    """The plan of ``row``, whose values replace those of ``settings``. Raises SettingsError if they do not fit it."""
    own = {
        "video_size_w": row.width,
        "video_size_h": row.height,
        "fps": row.fps,
        "seed": row.seed,
        "num_steps": row.num_steps,
    }
    settings = override(settings, {"runtime": own}, source=f"row {row.number}")
    prefix_latents = media.latents if media else 0
    timeline = Timeline(
        num_chunks=row.chunks(prefix_latents),
        window_size=settings.runtime.window_size,
        prefix_latents=prefix_latents,
    )

    captions = _captions_per_chunk(row, timeline.num_chunks)
    embedded = {c: digest(identity.text_pre_image(c, settings, digests)) for c in set(captions)}
    caption_digests = tuple(embedded[caption] for caption in captions)
    prefix_digest = None
    if media is not None:
        prefix_digest = digest(identity.prefix_pre_image(media.kind, media.sha256, settings, digests))

    stage_keys: list[str] = []
    for stage in range(timeline.num_stages):
        image = identity.stage_pre_image(
            settings,
            digests,
            timeline,
            caption_digests=caption_digests,
            prefix_digest=prefix_digest,
            stage=stage,
            previous=stage_keys[-1] if stage_keys else None,
        )
        stage_keys.append(digest(image))
    return RowPlan(
        row=row.number,
        job_id=row.job_id,
        priority=row.priority,
        settings=settings,
        digests=digests,
        timeline=timeline,
        captions=captions,
        caption_digests=caption_digests,
        media=media,
        prefix_digest=prefix_digest,
        stage_keys=tuple(stage_keys),
    )


def plan_rows(
    rows: tuple[Row, ...], settings: Settings, digests: Digests, media: Mapping[str, Media]
) -> dict[str, RowPlan]:
    """A plan for every row, by job_id, in the manifest's order."""
    return {row.job_id: plan_row(row, settings, digests, media.get(row.job_id)) for row in rows}


def _captions_per_chunk(row: Row, num_chunks: int) -> tuple[str, ...]:
    cleaned = [(caption.start_chunk, clean_caption(caption.prompt)) for caption in row.captions]
    captions: list[str] = []
    for chunk in range(num_chunks):
        if len(cleaned) > 1 and cleaned[1][0] <= chunk:
            cleaned.pop(0)
        captions.append(cleaned[0][1])
    return tuple(captions)
