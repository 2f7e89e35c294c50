"""Loads a task of each kind with the networks it needs. Torch is imported only for kinds that compute with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from magi_ray.errors import MediaError
from magi_ray.events import TaskKind
from magi_ray.media.encoder import encoder_identity, find_ffmpeg
from magi_ray.settings import Settings
from magi_ray.storage.store import Store

if TYPE_CHECKING:
    from magi_ray.render.tasks.decode import Decoder
    from magi_ray.render.tasks.denoise import Denoiser
    from magi_ray.render.tasks.embed import Embedder
    from magi_ray.render.tasks.finish import Finisher


def load_task(
    kind: TaskKind, *, settings: Settings, store: Store, run_id: str, encoder: str
) -> Embedder | Denoiser | Decoder | Finisher:
    """The task of ``kind``, whose networks stay loaded from one ``carry_out`` to the next.

    encoder: ``media.encoder.encoder_identity`` of the run's ffmpeg.
    Raises WeightsError; MediaError if it decodes or finishes and this machine has no ffmpeg, or another one.
    """
    match kind:
        case TaskKind.EMBED:
            from magi_ray.render.tasks.embed_network import load_embedder

            return load_embedder(settings, store)
        case TaskKind.DENOISE:
            from magi_ray.render.tasks.denoise_network import load_denoiser

            return load_denoiser(settings, store, run_id=run_id)
        case TaskKind.DECODE:
            from magi_ray.render.tasks.decode_network import load_decoder

            return load_decoder(settings, store, ffmpeg=_same_ffmpeg(encoder), encoder=encoder, run_id=run_id)
        case TaskKind.FINISH:
            from magi_ray.render.tasks.finish import load_finisher

            return load_finisher(store, run_id, ffmpeg=_same_ffmpeg(encoder), encoder=encoder)


def _same_ffmpeg(encoder: str) -> Path:
    """This machine's ffmpeg. Raises MediaError unless its identity is ``encoder``."""
    ffmpeg = find_ffmpeg()
    found = encoder_identity(ffmpeg)
    if found != encoder:
        raise MediaError(
            f"ffmpeg here is {found!r}, but this run encodes with {encoder!r}.",
            remedy="Install the same ffmpeg on every machine: another one gives other bytes.",
        )
    return ffmpeg
