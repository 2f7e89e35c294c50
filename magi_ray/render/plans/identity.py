"""Identity: what a result depends on (its pre-image), and the hash of that (its key). No tensors.

A video is a chain: the key of stage s depends on the key of stage s − 1, so two renders share exactly the stages before
the first difference. The pre-image is stored beside the hash, so that a difference can be named.
Priority, tags, output path, host, retries and our own version are not part of it: they change no pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from magi_ray.render.plans.takes import Wish, take_of_chunk
from magi_ray.settings import AS_THE_RUN, ChunkControl, RunSettings, Settings
from magi_ray.storage.records import digest
from magi_ray.timeline import Timeline

FORMAT = 1
NOISE_VERSION = "magi-ray/noise/v1"  # as in sampling.noise, which imports torch

# The fields of the published config that change latents. The others (paths, ports, fps, number of frames) do not, or
# are in the pre-image under names of their own (seed, size, stage).
_RUNTIME_FIELDS = (
    "cfg_number", "cfg_t_range", "prev_chunk_scales", "text_scales", "noise2clean_kvrange", "clean_chunk_kvrange",
    "clean_t", "num_steps", "window_size",
)  # fmt: skip
_ENGINE_FIELDS = ("fp8_quant", "distill", "distill_nearly_clean_chunk_threshold", "shortcut_mode", "pp_size", "cp_size")


@dataclass(frozen=True, kw_only=True)
class Digests:
    """sha256 of the files of each network (names and contents), as hex."""

    dit: str
    vae: str
    t5: str
    special_tokens: str


def text_pre_image(caption: str, settings: Settings, digests: Digests) -> dict[str, Any]:
    """What the embedding of a cleaned ``caption`` depends on."""
    # Named only where it is not the default, so that embeddings from before this setting keep their keys.
    dtype = {} if settings.text.dtype == "float32" else {"dtype": settings.text.dtype}
    return dtype | {
        "format": FORMAT,
        "kind": "text",
        "caption": caption,
        "text_encoder": digests.t5,
        "max_length": settings.model.caption_max_length,
        "numeric": {"device": settings.runtime.t5_device, "cpu_threads": settings.numeric.cpu_threads},
    }


def prefix_pre_image(
    kind: str, settings: Settings, digests: Digests, *, sha256: str, pixels: str | None
) -> dict[str, Any]:
    """What the latent of an image or video prefix depends on. ``settings`` carries the row's size and fps.

    sha256: of the file.  pixels: of the frames that are taken from it, as they are encoded; None for a run before
    format 3, whose prefix is known by its file and by how they are taken.
    """
    runtime = settings.runtime
    taken: dict[str, Any] = {"pixels": pixels}
    if pixels is None:
        taken = {
            "media": sha256,
            "fps": runtime.fps if kind == "video" else None,
            "prefix": settings.prefix.model_dump(mode="json", exclude={"include"}),
        }
        # Frames of the clip that fill no whole latent frame are left over, far from the join.
        if kind == "video" and settings.prefix.clip_end == "end":
            taken["left_over"] = "at the start"
    return taken | {
        "format": FORMAT,
        "kind": kind,
        "size": [runtime.video_size_h, runtime.video_size_w],
        "tiles": settings.tiles.model_dump(mode="json"),
        "scale_factor": runtime.scale_factor,
        "vae": digests.vae,
        "numeric": settings.numeric.model_dump(mode="json"),
    }


@dataclass(frozen=True, kw_only=True)
class VideoInputs:
    """What the stages of one video depend on.

    settings: with the row's own size, fps, seed, steps and prefix.
    caption_digests: the key of each denoised chunk's embedding.  controls: of the chunks that differ from ``settings``.
    takes: what was asked of the row since it was submitted.  prefix_digest: the key of the prefix, None for text alone.
    """

    settings: Settings
    digests: Digests
    timeline: Timeline
    caption_digests: tuple[str, ...]
    controls: Mapping[int, ChunkControl]
    takes: tuple[Wish, ...]
    prefix_digest: str | None


def stage_pre_image(video: VideoInputs, stage: int, *, previous: str | None) -> dict[str, Any]:
    """What the window after ``stage``, and the chunk it completes, depend on. ``previous``: key of the stage before,
    None for the first."""
    settings, digests = video.settings, video.digests
    runtime, engine = settings.runtime.model_dump(mode="json"), settings.engine.model_dump(mode="json")
    chunk = video.timeline.entering(stage)
    entering = None
    if chunk is not None:
        duration = video.timeline.duration_index(chunk) if settings.special_tokens.duration else None
        own = video.controls.get(chunk, AS_THE_RUN).model_dump(mode="json", exclude_none=True)
        entering = {"chunk": chunk, "caption": video.caption_digests[chunk], "duration": duration} | own
        if take := take_of_chunk(video.takes, chunk):
            entering["take"] = take
    return {
        "format": FORMAT,
        "kind": "stage",
        "weights": digests.dit,
        "special_token_table": digests.special_tokens,
        "model": settings.model.model_dump(mode="json"),
        "sampling": {name: runtime[name] for name in _RUNTIME_FIELDS} | {name: engine[name] for name in _ENGINE_FIELDS},
        "special_tokens": settings.special_tokens.model_dump(mode="json"),
        "negative_prompt": settings.negative_prompt,
        "numeric": settings.numeric.model_dump(mode="json"),
        "size": [settings.runtime.video_size_h, settings.runtime.video_size_w],
        "noise": {"law": NOISE_VERSION, "seed": settings.runtime.seed},
        "prefix": video.prefix_digest,
        "stage": stage,
        "entering": entering,
        "previous": previous,
    }


def stage_keys(video: VideoInputs) -> tuple[str, ...]:
    """The key of every stage, in order."""
    keys: list[str] = []
    for stage in range(video.timeline.num_stages):
        keys.append(digest(stage_pre_image(video, stage, previous=keys[-1] if keys else None)))
    return tuple(keys)


def segment_pre_image(
    chunk_sha256: str,
    settings: Settings,
    digests: Digests,
    encoder: str,
    *,
    dropped_frames: int,
    trimmed_frames: int,
    first_frame: int,
) -> dict[str, Any]:
    """What the encoded segment of one chunk depends on.

    chunk_sha256: digest of the stored clean latent.  encoder: ``media.encoder.encoder_identity``.
    dropped_frames: leading frames that belong to a video prefix.  trimmed_frames: at the end, not shown.
    first_frame: the segment's place in the video, for its timestamps.
    """
    # Named only where there are any, so that segments from before keep their keys.
    trimmed = {"trimmed_frames": trimmed_frames} if trimmed_frames else {}
    return trimmed | {
        "format": FORMAT,
        "kind": "segment",
        "chunk": chunk_sha256,
        "dropped_frames": dropped_frames,
        "first_frame": first_frame,
        "fps": settings.runtime.fps,
        "scale_factor": settings.runtime.scale_factor,
        "tiles": settings.tiles.model_dump(mode="json"),
        "vae": digests.vae,
        "encoder": settings.encoder.model_dump(mode="json") | {"binary": encoder},
        "numeric": settings.numeric.model_dump(mode="json"),
    }


def run_digest(
    manifest_digest: str,
    media: Mapping[str, str],
    settings: Settings,
    digests: Digests,
    *,
    left_out: Sequence[int] = (),
) -> str:
    """Two submissions with the same digest are the same run: rows, what their media show (``Media.identity`` by
    job_id), settings and weights. left_out: the rows that are not rendered."""
    # Where weights lie and how many workers there are may differ between machines.
    values = settings.model_dump(mode="json", exclude=set(RunSettings.model_fields))
    for paths in ("load", "t5_pretrained", "vae_pretrained"):
        del values["runtime"][paths]
    if not media:
        # Changes nothing then. So that runs from when it was the default keep their ids.
        values["prefix"]["take"] = "start"
    # Decides which rows fail. Named only where it is not the default, so that runs from before it keep their ids.
    if settings.black_frames != "fail":
        values["black_frames"] = settings.black_frames
    inputs = {"manifest": manifest_digest, "media": dict(media), "settings": values, "digests": asdict(digests)}
    return digest({"format": FORMAT} | inputs | ({"left_out": list(left_out)} if left_out else {}))
