"""What stands in the tiny DiT and VAE. Nothing is trained; a seed decides.

So that one still sees something, weights are set, not drawn, where it matters, over small random numbers everywhere:
the VAE is close to a linear codec of 4×8×8 patches, the DiT close to a rule that pulls every place towards what is
around it in space and time. All operations of the networks take part, and the random share keeps them honest.

Both work against the norms in the same way: a few channels carry a large constant ("carriers"), beside which the
signal hardly moves the mean and the variance that a norm divides by.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from math import cos, pi, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magi_ray.models.vae.config import VAEConfig
from magi_ray.settings import ModelConfig

Array = NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]

SCALE_FACTOR = 0.18215


class Draw:
    """Normal numbers keyed by (seed, name), so that no tensor depends on which others exist."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, name: str, shape: tuple[int, ...], *, scale: float = 1.0) -> Array:
        key = hashlib.sha256(f"magi-tiny/{self._seed}/{name}".encode()).digest()[:16]
        # Philox and not torch's generator: the same bits on every processor.
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))
        return generator.standard_normal(shape, dtype=np.float32) * np.float32(scale)


# ---------------------------------------------------------------------------------------------------------------
# VAE: 16 components of a patch in, 16 components out.

VAE_CONFIG = VAEConfig(
    video_size=64,
    video_length=24,
    z_chans=16,
    embed_dim=64,
    depth=2,
    num_heads=4,
    mlp_ratio=2.0,
    qkv_bias=True,
    with_cls_token=True,
    ln_in_attn=True,
    use_final_proj=True,
)

_LUMA, _BLUE_RED, _GREEN_MAGENTA = ((1, 1, 1), (-1, 0, 1), (-1, 2, -1))
# (colour axis, frequency along T, H, W, standard deviation of the pixels that this component alone makes, −1…1).
# The latents of natural pictures come out around unit variance once they are multiplied by the scale factor.
_COMPONENTS = (
    (_LUMA, 0, 0, 0, 0.42), (_LUMA, 0, 0, 1, 0.16), (_LUMA, 0, 1, 0, 0.16), (_LUMA, 0, 1, 1, 0.07),
    (_LUMA, 0, 0, 2, 0.08), (_LUMA, 0, 2, 0, 0.08), (_LUMA, 0, 1, 2, 0.04), (_LUMA, 0, 2, 1, 0.04),
    (_BLUE_RED, 0, 0, 0, 0.20), (_BLUE_RED, 0, 0, 1, 0.06), (_BLUE_RED, 0, 1, 0, 0.06),
    (_GREEN_MAGENTA, 0, 0, 0, 0.14), (_GREEN_MAGENTA, 0, 0, 1, 0.05), (_GREEN_MAGENTA, 0, 1, 0, 0.05),
    (_LUMA, 1, 0, 0, 0.06), (_LUMA, 1, 0, 1, 0.04),
)  # fmt: skip
_VAE_SIGNAL = 0.05  # a latent of 1, beside carriers of 1
_CARRIERS = slice(32, 34)
_PIXEL_CARRIER = 20.0


def vae_config_json() -> dict[str, Any]:
    """``config.json`` in the published form."""
    fixed = {"in_chans": 3, "double_z": True, "conv_last_layer": True, "norm_code": False}
    return {"_class_name": "ViTVAE", "model_type": "vit", "ddconfig": asdict(VAE_CONFIG) | fixed}


def vae_weights(shapes: Shapes, draw: Draw) -> dict[str, Array]:
    """Latent i is component i of the patch. A latent is held by two channels of opposite sign, so it has no mean."""
    weights = {name: _vae_random(name, shape, draw) for name, shape in shapes.items()}
    basis, deviation = _patch_basis()
    width, latents = VAE_CONFIG.embed_dim, len(_COMPONENTS)
    up, down = np.arange(latents) * 2, np.arange(latents) * 2 + 1
    carriers = np.zeros(width, np.float32)
    carriers[_CARRIERS] = 1, -1
    norm = sqrt(2 / width)  # what a norm divides by: the carriers' share
    scaled = SCALE_FACTOR * _VAE_SIGNAL

    patch = np.einsum("itrwc,i->ictrw", basis, _VAE_SIGNAL / deviation)  # [i, colour, T, H, W]
    weights["encoder.patch_embed.proj.weight"][up] += patch
    weights["encoder.patch_embed.proj.weight"][down] -= patch
    weights["encoder.patch_embed.proj.bias"] += carriers
    weights["encoder.last_layer.weight"][np.arange(latents), up] += norm / 2 / scaled
    weights["encoder.last_layer.weight"][np.arange(latents), down] -= norm / 2 / scaled

    weights["decoder.proj_in.weight"][up, np.arange(latents)] += scaled
    weights["decoder.proj_in.weight"][down, np.arange(latents)] -= scaled
    weights["decoder.proj_in.bias"] += carriers
    # Red, green, blue and, so that the norm over the whole patch finds no mean, minus their sum.
    pixels = basis * deviation[:, None, None, None, None]
    pixels = np.concatenate([pixels, -pixels.sum(-1, keepdims=True)], axis=-1).reshape(latents, -1)
    weights["decoder.final_proj.weight"][:, up] += pixels.T * (norm / 2 / _VAE_SIGNAL)
    weights["decoder.final_proj.weight"][:, down] -= pixels.T * (norm / 2 / _VAE_SIGNAL)
    checkers = np.indices(basis.shape[1:4]).sum(0) % 2 * 2 - 1
    weights["decoder.final_proj.bias"].reshape(*checkers.shape, 4)[..., 3] += _PIXEL_CARRIER * checkers
    for colour in range(3):
        weights["decoder.last_layer.weight"][colour, colour, 1, 1, 1] += _PIXEL_CARRIER / 2
    return weights


def _vae_random(name: str, shape: tuple[int, ...], draw: Draw) -> Array:
    if name.endswith(("norm.weight", "norm2.weight")):
        return np.ones(shape, np.float32)
    if name.endswith((".qkv.weight", ".fc1.weight")):
        return draw(name, shape, scale=shape[-1] ** -0.5)
    if name.endswith(("pos_embed", "cls_token")):
        return draw(name, shape, scale=0.02 * _VAE_SIGNAL)
    if name.endswith((".proj.weight", ".fc2.weight", ".proj_in.weight")):
        return draw(name, shape, scale=0.03 * _VAE_SIGNAL * shape[-1] ** -0.5)
    return np.zeros(shape, np.float32)


def _patch_basis() -> tuple[Array, Array]:
    """The components, orthonormal, [16, T, H, W, colour], and the standard deviation of each one's coefficient."""
    T, S = VAE_CONFIG.patch_length, VAE_CONFIG.patch_size
    basis = [
        np.einsum("t,h,w,c->thwc", _dct(t, T), _dct(h, S), _dct(w, S), np.array(colour) / np.linalg.norm(colour))
        for colour, t, h, w, _ in _COMPONENTS
    ]
    pixels = np.array([pixel for *_, pixel in _COMPONENTS])
    return np.stack(basis).astype(np.float32), (pixels * sqrt(3 * T * S * S)).astype(np.float32)


def _dct(frequency: int, size: int) -> NDArray[np.float64]:
    wave = np.array([cos(pi * frequency * (i + 0.5) / size) for i in range(size)])
    return wave / np.linalg.norm(wave)


# ---------------------------------------------------------------------------------------------------------------
# DiT


def dit_weights(shapes: Shapes, config: ModelConfig, draw: Draw) -> dict[str, Array]:
    return {name: _dit_random(name, shape, draw) for name, shape in shapes.items()}


def _dit_random(name: str, shape: tuple[int, ...], draw: Draw) -> Array:
    if name == "rope.bands":
        return np.array([0.35, 0.12], np.float32)
    if name.endswith("null_caption_embedding"):
        return draw(name, shape)
    if name.endswith("layer_norm.weight"):
        return 1 + draw(name, shape, scale=0.05)
    if len(shape) == 1:
        return draw(name, shape, scale=0.05)
    return draw(name, shape, scale=float(np.prod(shape[1:])) ** -0.5)
