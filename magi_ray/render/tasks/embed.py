"""Embed: captions to T5 embeddings, an image or video to the latent it begins with. Both are cached by content."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from magi_ray.models.text.t5 import TextEncoder, load_t5
from magi_ray.models.vae.model import VAE, load_vae
from magi_ray.models.vae.tiling import encode_tiled
from magi_ray.render.artifacts.commits import commit
from magi_ray.render.artifacts.latents import pack, require_finite
from magi_ray.render.artifacts.pixels import pixels_to_tensor
from magi_ray.render.artifacts.prefix import prefix_pixels
from magi_ray.render.plans import identity
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.settings import Settings
from magi_ray.storage.records import verified_commit
from magi_ray.storage.store import Store


class Embedder:
    """Holds T5 and the VAE from the first row that needs them until it is dropped."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._text_encoder: TextEncoder | None = None
        self._vae: VAE | None = None

    def embed(self, plan: RowPlan) -> None:
        """Put into the store what is missing of ``plan``'s captions and prefix.

        Raises InputError kinds (unreadable media, weights), StoreError, NumericError.
        """
        for digest, caption in sorted(set(zip(plan.caption_digests, plan.captions, strict=True))):
            if verified_commit(self._store, "text", digest) is None:
                begun = time.monotonic()
                embedding = self._embed_caption(caption)
                require_finite(embedding, what=f"row {plan.row} (job {plan.job_id}): embedding of {caption!r}")
                pre_image = identity.text_pre_image(caption, plan.settings, plan.digests)
                payloads = {"text": pack({"text": embedding})}
                commit(self._store, "text", pre_image, payloads, seconds=time.monotonic() - begun)
        media = plan.media
        key = plan.prefix_digest
        if media is not None and key is not None and verified_commit(self._store, "prefix", key) is None:
            begun = time.monotonic()
            latent = self._encode(plan)
            require_finite(latent, what=f"row {plan.row} (job {plan.job_id}): latent of its {media.kind}")
            pre_image = identity.prefix_pre_image(media.kind, media.sha256, plan.settings, plan.digests)
            payloads = {"prefix": pack({"prefix": latent})}
            commit(self._store, "prefix", pre_image, payloads, seconds=time.monotonic() - begun)

    def _embed_caption(self, caption: str) -> Tensor:
        """[tokens, caption_channels] float32."""
        if self._text_encoder is None:
            self._text_encoder = load_t5(
                self._settings.weights.t5,
                device=self._settings.runtime.t5_device,
                dtype=getattr(torch, self._settings.text.dtype),
                max_length=self._settings.model.caption_max_length,
            )
        return self._text_encoder.encode([caption])[0].float().cpu()

    def _encode(self, plan: RowPlan) -> Tensor:
        """[1, 16, latents, h, w] float32, times scale_factor as the DiT wants it."""
        settings = plan.settings
        if self._vae is None:
            numeric = self._settings.numeric
            self._vae = load_vae(self._settings.weights.vae, device=numeric.device, attention=numeric.attention)
        frames = prefix_pixels(self._store, plan)
        latent = encode_tiled(self._vae, pixels_to_tensor(frames), tiles=settings.tiles)
        return (latent * settings.runtime.scale_factor).float().cpu()
