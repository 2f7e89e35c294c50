"""A task of each kind with the networks that it needs. Torch is imported only when a kind that computes with it is
loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from magi_ray.events import TaskKind
from magi_ray.settings import Settings
from magi_ray.storage.store import Store
from magi_ray.system import System

if TYPE_CHECKING:
    from magi_ray.render.tasks.decode import Decoder
    from magi_ray.render.tasks.denoise import Denoiser
    from magi_ray.render.tasks.embed import Embedder
    from magi_ray.render.tasks.finish import Finisher


def load_task(
    kind: TaskKind, *, settings: Settings, store: Store, run_id: str, encoder: str, system: System = System()
) -> Embedder | Denoiser | Decoder | Finisher:
    """The task of ``kind``, whose networks stay loaded from one ``carry_out`` to the next.

    encoder: ``media.encoder.encoder_identity`` of the run's ffmpeg.
    Raises WeightsError; MediaError when this machine decodes and has no ffmpeg, or another one.
    """
    match kind:
        case TaskKind.EMBED:
            from magi_ray.render.tasks.embed_network import load_embedder

            return load_embedder(settings, store, system=system)
        case TaskKind.DENOISE:
            from magi_ray.render.tasks.denoise_network import load_denoiser

            return load_denoiser(settings, store, system=system)
        case TaskKind.DECODE:
            from magi_ray.render.tasks.decode_network import load_decoder

            return load_decoder(settings, store, encoder=encoder, system=system)
        case TaskKind.FINISH:
            from magi_ray.render.tasks.finish import FfmpegJoiner, Finisher

            return Finisher(store, run_id, encoder=encoder, joiner=FfmpegJoiner(store), system=system)
