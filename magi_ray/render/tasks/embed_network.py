"""T5 and the VAE's encoder, for the embed task."""

from __future__ import annotations

import torch

from magi_ray.models.text.t5 import TextEncoder, load_t5
from magi_ray.models.vae.model import VAE, load_vae
from magi_ray.models.vae.tiling import Tiles, encode_tiled
from magi_ray.render.artifacts.latents import pack, require_finite
from magi_ray.render.artifacts.pixels import pixels_to_tensor
from magi_ray.render.artifacts.prefix import prefix_pixels
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.tasks.embed import Embedder
from magi_ray.settings import Settings
from magi_ray.storage.store import Store
from magi_ray.system import System


def load_embedder(settings: Settings, store: Store, *, system: System = System()) -> Embedder:
    """An Embedder that loads T5 and the VAE when the first row needs them, and holds them until it is dropped."""
    return Embedder(store, T5AndVAE(settings, store), system=system)


class T5AndVAE:
    """The EmbedNetworks of ``settings``, each loaded when it is first used."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings, self._store = settings, store
        self._text_encoder: TextEncoder | None = None
        self._vae: VAE | None = None

    def embed_caption(self, plan: RowPlan, caption: str) -> bytes:
        """Packed "text": [tokens, caption_channels] float32. Raises WeightsError, NumericError."""
        if self._text_encoder is None:
            self._text_encoder = load_t5(
                self._settings.weights.t5,
                device=self._settings.runtime.t5_device,
                dtype=getattr(torch, self._settings.text.dtype),
                max_length=self._settings.model.caption_max_length,
            )
        embedding = self._text_encoder.encode([caption])[0].float().cpu()
        require_finite(embedding, what=f"row {plan.row} (job {plan.job_id}): embedding of {caption!r}")
        return pack({"text": embedding})

    def encode_prefix(self, plan: RowPlan) -> bytes:
        """Packed "prefix": [1, 16, latents, h, w] float32, × scale_factor as the DiT wants it.

        Raises MediaError, WeightsError, NumericError, StoreError.
        """
        assert plan.media is not None
        if self._vae is None:
            numeric = self._settings.numeric
            self._vae = load_vae(self._settings.weights.vae, device=numeric.device, attention=numeric.attention)
        frames = prefix_pixels(self._store, plan)
        tiles = Tiles(**plan.settings.tiles.model_dump())
        latent = encode_tiled(self._vae, pixels_to_tensor(frames), tiles=tiles)
        latent = (latent * plan.settings.runtime.scale_factor).float().cpu()
        require_finite(latent, what=f"row {plan.row} (job {plan.job_id}): latent of its {plan.media.kind}")
        return pack({"prefix": latent})
