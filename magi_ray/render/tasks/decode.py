"""Decode: the clean latent of one chunk to one encoded segment."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from torch import Tensor

from magi_ray.errors import MediaError, NumericError
from magi_ray.media.encoder import encode_segment, encoder_identity, find_ffmpeg
from magi_ray.models.vae.model import VAE, load_vae
from magi_ray.models.vae.tiling import decode_tiled
from magi_ray.render.artifacts.commits import commit, segment_pre_image
from magi_ray.render.artifacts.latents import load_clean_chunk, require_finite
from magi_ray.render.artifacts.pixels import tensor_to_pixels
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.settings import Settings
from magi_ray.storage.records import digest, verified_commit
from magi_ray.storage.store import Store


def decode_chunk(vae: VAE, latent: Tensor, plan: RowPlan, chunk: int) -> np.ndarray:
    """What ``chunk`` contributes to the video: uint8 RGB [T, H, W, 3].

    latent: the chunk's clean latent [1, 16, 6, h, w], × scale_factor.  Raises NumericError.
    """
    pixels = decode_tiled(vae, latent / plan.settings.runtime.scale_factor, tiles=plan.settings.tiles)
    require_finite(pixels, what=f"row {plan.row} (job {plan.job_id}): decoded chunk {chunk}")
    # Frames of a video prefix were decoded with the rest of their chunk, and are left out here.
    frames = tensor_to_pixels(pixels)[-plan.timeline.chunk_frames(chunk) :]
    if plan.settings.black_frames == "fail":
        _require_light(frames, plan, chunk)
    return frames


def _require_light(frames: np.ndarray, plan: RowPlan, chunk: int) -> None:
    """A frame in which every value is 0 is no dark picture but a broken network."""
    black = np.flatnonzero(~frames.any(axis=(1, 2, 3)))
    if len(black):
        first = plan.timeline.first_frame(chunk) + int(black[0])
        raise NumericError(
            f"row {plan.row} (job {plan.job_id}): {len(black)} of {len(frames)} frames of chunk {chunk} are black in "
            f"every pixel, the first of them frame {first} of the video.",
            remedy='Check the weights and the precision; if black is meant, set black_frames = "allow" in a job file.',
        )


class Decoder:
    """Holds the VAE; it stays loaded from one chunk to the next.

    encoder: identity of the run's ffmpeg. Raises MediaError when this machine has another one, WeightsError.
    """

    def __init__(self, settings: Settings, store: Store, encoder: str) -> None:
        self._ffmpeg = find_ffmpeg()
        found = encoder_identity(self._ffmpeg)
        if found != encoder:
            raise MediaError(
                f"ffmpeg here is {found!r}, but this run encodes with {encoder!r}.",
                remedy="Install the same ffmpeg on every machine: another one gives other bytes.",
            )
        numeric = settings.numeric
        self._vae = load_vae(settings.weights.vae, device=numeric.device, attention=numeric.attention)
        self._encoder = encoder
        self._store = store

    def decode(self, plan: RowPlan, chunk: int) -> None:
        """Make and commit the segment of ``chunk``, unless it exists. Raises StoreError, NumericError, MediaError."""
        pre_image = segment_pre_image(self._store, plan, chunk, self._encoder)
        if verified_commit(self._store, "segment", digest(pre_image)) is not None:
            return
        begun = time.monotonic()
        runtime, timeline = plan.settings.runtime, plan.timeline
        frames = decode_chunk(self._vae, load_clean_chunk(self._store, plan, chunk), plan, chunk)
        with tempfile.TemporaryDirectory(prefix="magi-ray-") as folder:
            path = Path(folder) / "segment.mp4"
            encode_segment(
                frames,
                ffmpeg=self._ffmpeg,
                fps=runtime.fps,
                frame_offset=timeline.first_frame(chunk),
                settings=plan.settings.encoder,
                out=path,
            )
            commit(self._store, "segment", pre_image, {"segment": path}, seconds=time.monotonic() - begun)
