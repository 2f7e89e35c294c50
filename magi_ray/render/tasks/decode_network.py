"""The VAE's decoder and ffmpeg, for the decode task."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from magi_ray.errors import NumericError
from magi_ray.media.encoder import encode_segment
from magi_ray.media.reader import Pixels
from magi_ray.models.vae.model import VAE, load_vae
from magi_ray.models.vae.tiling import decode_tiled
from magi_ray.render.artifacts.latents import load_clean_chunk, require_finite
from magi_ray.render.artifacts.pixels import tensor_to_pixels
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.tasks.decode import Decoder
from magi_ray.settings import Settings
from magi_ray.storage.store import Store


def load_decoder(settings: Settings, store: Store, *, ffmpeg: Path, encoder: str, run_id: str = "") -> Decoder:
    """A Decoder with the VAE of ``settings``. ``encoder``: the identity of ``ffmpeg``. Raises WeightsError."""
    numeric = settings.numeric
    vae = load_vae(settings.weights.vae, device=numeric.device, attention=numeric.attention)
    return Decoder(store, partial(_make_segment, store, vae, ffmpeg), encoder=encoder, run_id=run_id)


def _make_segment(store: Store, vae: VAE, ffmpeg: Path, plan: RowPlan, chunk: int, out: Path) -> None:
    frames = decode_chunk(vae, load_clean_chunk(store, plan, chunk), plan, chunk)
    fps, offset = plan.settings.runtime.fps, plan.timeline.first_frame(chunk)
    encode_segment(frames, ffmpeg=ffmpeg, fps=fps, frame_offset=offset, settings=plan.settings.encoder, out=out)


def decode_chunk(vae: VAE, latent: Tensor, plan: RowPlan, chunk: int) -> Pixels:
    """The frames that ``chunk`` adds to the video: uint8 RGB [T ≤ 24, H, W, 3].

    latent: the chunk's clean latent [1, 16, 6, h, w], × scale_factor.  Raises NumericError.
    """
    pixels = decode_tiled(vae, latent / plan.settings.runtime.scale_factor, tiles=plan.settings.tiles)
    require_finite(pixels, what=f"row {plan.row} (job {plan.job_id}): decoded chunk {chunk}")
    # A chunk is decoded whole: frames of a video prefix, and those beyond the video's end, are dropped here.
    first = plan.timeline.dropped_frames if chunk == 0 else 0
    frames = tensor_to_pixels(pixels)[first : first + plan.timeline.chunk_frames(chunk)]
    if plan.settings.black_frames == "fail":
        _require_no_black_frame(frames, plan, chunk)
    return frames


def _require_no_black_frame(frames: Pixels, plan: RowPlan, chunk: int) -> None:
    """A frame in which every value is 0 means a broken network, not a dark scene. Raises NumericError."""
    black = np.flatnonzero(~frames.any(axis=(1, 2, 3)))
    if len(black):
        first = plan.timeline.first_frame(chunk) + int(black[0])
        raise NumericError(
            f"row {plan.row} (job {plan.job_id}): {len(black)} of {len(frames)} frames of chunk {chunk} are black in "
            f"every pixel, the first of them frame {first} of the video.",
            remedy='Check the weights and the precision; if black is meant, set black_frames = "allow" in a job file.',
        )
