"""T5 and the VAE's encoder, for the embed task."""

from __future__ import annotations

import torch

from magi_ray.models.text.t5 import TextEncoder, load_t5
from magi_ray.models.vae.model import VAE, load_vae
from magi_ray.models.vae.tiling import encode_tiled
from magi_ray.render.artifacts.latents import pack, require_finite
from magi_ray.render.artifacts.pixels import pixels_to_tensor
from magi_ray.render.artifacts.prefix import prefix_pixels
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.tasks.embed import Embedder
from magi_ray.settings import Settings
from magi_ray.storage.store import Store


def load_embedder(settings: Settings, store: Store) -> Embedder:
    """An Embedder that loads T5 and the VAE when a row first needs them."""
    return Embedder(store, _T5AndVAE(settings, store))


class _T5AndVAE:
    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings, self._store = settings, store
        self._t5: TextEncoder | None = None
        self._vae: VAE | None = None

    def embed_caption(self, plan: RowPlan, caption: str) -> bytes:
        """Packed "text": [tokens, caption_channels] float32."""
        settings = self._settings
        if self._t5 is None:
            device, dtype = settings.runtime.t5_device, getattr(torch, settings.text.dtype)
            max_length = settings.model.caption_max_length
            self._t5 = load_t5(settings.weights.t5, device=device, dtype=dtype, max_length=max_length)
        embedding = self._t5.encode([caption])[0].float().cpu()
        require_finite(embedding, what=f"row {plan.row} (job {plan.job_id}): embedding of {caption!r}")
        return pack({"text": embedding})

    def encode_prefix(self, plan: RowPlan) -> bytes:
        """Packed "prefix": [1, 16, latents, h, w] float32, × scale_factor as the DiT wants it."""
        assert plan.media is not None
        if self._vae is None:
            numeric = self._settings.numeric
            self._vae = load_vae(self._settings.weights.vae, device=numeric.device, attention=numeric.attention)
        pixels = pixels_to_tensor(prefix_pixels(self._store, plan))
        latent = encode_tiled(self._vae, pixels, tiles=plan.settings.tiles)
        latent = (latent * plan.settings.runtime.scale_factor).float().cpu()
        require_finite(latent, what=f"row {plan.row} (job {plan.job_id}): latent of its {plan.media.kind}")
        return pack({"prefix": latent})
