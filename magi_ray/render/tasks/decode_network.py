"""The VAE's decoder and ffmpeg, for the decode task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from magi_ray.errors import MediaError, NumericError
from magi_ray.media.encoder import encode_segment, encoder_identity, find_ffmpeg
from magi_ray.media.reader import Pixels
from magi_ray.models.vae.model import VAE, load_vae
from magi_ray.models.vae.tiling import Tiles, decode_tiled
from magi_ray.render.artifacts.latents import load_clean_chunk, require_finite
from magi_ray.render.artifacts.pixels import tensor_to_pixels
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.tasks.decode import Decoder
from magi_ray.settings import Settings
from magi_ray.storage.store import Store
from magi_ray.system import System


def load_decoder(settings: Settings, store: Store, *, encoder: str, system: System = System()) -> Decoder:
    """A Decoder with the VAE of ``settings``, which stays loaded from one chunk to the next.

    Raises MediaError when this machine's ffmpeg is not ``encoder``, the run's; WeightsError.
    """
    ffmpeg = find_ffmpeg()
    found = encoder_identity(ffmpeg)
    if found != encoder:
        raise MediaError(
            f"ffmpeg here is {found!r}, but this run encodes with {encoder!r}.",
            remedy="Install the same ffmpeg on every machine: another one gives other bytes.",
        )
    numeric = settings.numeric
    vae = load_vae(settings.weights.vae, device=numeric.device, attention=numeric.attention)
    return Decoder(store, VAEAndFfmpeg(store, vae, ffmpeg), encoder=encoder, system=system)


class VAEAndFfmpeg:
    """The DecodeNetwork of real runs."""

    def __init__(self, store: Store, vae: VAE, ffmpeg: Path) -> None:
        self._store, self._vae, self._ffmpeg = store, vae, ffmpeg

    def segment(self, plan: RowPlan, chunk: int, out: Path) -> None:
        """As ``DecodeNetwork``."""
        encode_segment(
            decode_chunk(self._vae, load_clean_chunk(self._store, plan, chunk), plan, chunk),
            ffmpeg=self._ffmpeg,
            fps=plan.settings.runtime.fps,
            frame_offset=plan.timeline.first_frame(chunk),
            settings=plan.settings.encoder,
            out=out,
        )


def decode_chunk(vae: VAE, latent: Tensor, plan: RowPlan, chunk: int) -> Pixels:
    """What ``chunk`` contributes to the video: uint8 RGB [T, H, W, 3].

    latent: the chunk's clean latent [1, 16, 6, h, w], × scale_factor.  Raises NumericError.
    """
    tiles = Tiles(**plan.settings.tiles.model_dump())
    pixels = decode_tiled(vae, latent / plan.settings.runtime.scale_factor, tiles=tiles)
    require_finite(pixels, what=f"row {plan.row} (job {plan.job_id}): decoded chunk {chunk}")
    # Frames of a video prefix were decoded with the rest of their chunk, and are left out here.
    frames = tensor_to_pixels(pixels)[-plan.timeline.chunk_frames(chunk) :]
    if plan.settings.black_frames == "fail":
        _require_no_black_frame(frames, plan, chunk)
    return frames


def _require_no_black_frame(frames: Pixels, plan: RowPlan, chunk: int) -> None:
    """A frame in which every value is 0 comes of a broken network, not of a dark scene. Raises NumericError."""
    black = np.flatnonzero(~frames.any(axis=(1, 2, 3)))
    if len(black):
        first = plan.timeline.first_frame(chunk) + int(black[0])
        raise NumericError(
            f"row {plan.row} (job {plan.job_id}): {len(black)} of {len(frames)} frames of chunk {chunk} are black in "
            f"every pixel, the first of them frame {first} of the video.",
            remedy='Check the weights and the precision; if black is meant, set black_frames = "allow" in a job file.',
        )
