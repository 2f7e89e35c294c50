"""The weights of the tiny DiT and VAE. Nothing is trained; a seed decides.

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
    video_size=64, video_length=24, z_chans=16, embed_dim=64, depth=2, num_heads=4, mlp_ratio=2.0,
    qkv_bias=True, with_cls_token=True, ln_in_attn=True, use_final_proj=True,
)  # fmt: skip

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
    unit: NDArray[np.float64] = wave / np.linalg.norm(wave)
    return unit


# ---------------------------------------------------------------------------------------------------------------
# DiT: velocity = PULL · (GAIN · surroundings − own latents). Layer 1 finds the surroundings; the other layers, both
# MLPs' and the caption's branches included, are random and weak, and move the colours of the surroundings.
#
# Channels of the stream: 60 for a token's own latents (2×2 places × 15 of the 16 latent channels), 60 for those of its
# surroundings, 4 carriers, the rest free.

_PLACES, _KEPT = 4, 15
_PLACE, _CHANNEL = np.divmod(np.arange(_PLACES * _KEPT), _KEPT)
_OWN = slice(0, _PLACES * _KEPT)
_AROUND = slice(_OWN.stop, 2 * _OWN.stop)
_DIT_CARRIERS = slice(_AROUND.stop, _AROUND.stop + 4)
_SIGNS = np.array([1, -1, 1, -1], np.float32)
_STRUCTURED = "videodit_blocks.layers.1."
_HEAD_BLOCKS = 8  # the columns of linear_proj: (block, {self, cross}, rest)

_DIT_SIGNAL = 0.05  # a latent of 1, beside carriers of 1
_PULL, _GAIN = 4.0, 1.15
_CONTRAST = 0.25  # carriers beside the surroundings: the smaller, the more the norm evens out their contrast
_RANDOM = 0.025  # what a random branch adds, in units of the signal
_BANDS = (0.35, 0.12)
_SHARPNESS = 1.5  # added to the weights of the query and key norms: how near surroundings are
_REACH = (0.45, 1, 1)  # along T, H, W: how much a distance counts
_NEAR_SHARE = 0.8  # of the head in each group that looks near; the others look further
_MIXED = 0.3  # share of the surroundings that is the mean of a token's four places


def _flat(components: tuple[tuple[Any, int, int, int, float], ...], *, flat: float, others: float) -> Array:
    """A factor for each kept latent channel: components without any frequency, and the others."""
    return np.array([flat if t + h + w == 0 else others for _, t, h, w, _ in components[:_KEPT]], np.float32)


_KEEP = _flat(_COMPONENTS, flat=1, others=0.85)  # edges are pulled to less than their surroundings, so they fade
_TINT = _flat(_COMPONENTS, flat=1, others=0.1)  # random branches tint more than they draw


def unfit(config: ModelConfig) -> str:
    """Why no tiny weights can be made for ``config``; empty if they can."""
    least = {"num_layers": 2, "hidden_size": _DIT_CARRIERS.stop, "num_query_groups": _PLACES, "kv_channels": _KEPT + 1}
    return "; ".join(
        f"{name} is {getattr(config, name)}, but has to be at least {value}"
        for name, value in least.items()
        if getattr(config, name) < value
    )


def dit_weights(shapes: Shapes, config: ModelConfig, draw: Draw) -> dict[str, Array]:
    """Weights for the DiT whose state dict has ``shapes``; ``unfit`` has to be empty."""
    weights = {name: _dit_random(name, shape, draw) for name, shape in shapes.items()}
    copies = 2 if config.half_channel_vae else 1
    for copy in range(copies):
        weights["x_embedder.weight"][np.arange(_OWN.stop), _CHANNEL + 16 * copy, 0, _PLACE // 2, _PLACE % 2] = (
            _DIT_SIGNAL / config.x_rescale_factor / copies
        )
    # The bias of a norm is the first there is on the way.
    weights["videodit_blocks.layers.0.self_attn_post_norm.bias"][_DIT_CARRIERS] += _SIGNS
    _look_around(weights, config)
    norm = sqrt(len(_SIGNS) / config.hidden_size) * (1 + _CONTRAST)
    gain = _PULL * norm / _DIT_SIGNAL * config.x_rescale_factor
    rows = _PLACE * config.out_channels + _CHANNEL
    weights["final_linear.linear.weight"][rows, np.arange(_OWN.start, _OWN.stop)] = -gain
    weights["final_linear.linear.weight"][rows, np.arange(_AROUND.start, _AROUND.stop)] = gain * _GAIN
    return weights


def _look_around(weights: dict[str, Array], config: ModelConfig) -> None:
    """Layer 1's self-attention. Queries and keys are constants, so RoPE alone makes the weights: sums of
    cos(band · distance). Values are the latents, one place of the token in each group."""
    K, G, heads = config.kv_channels, config.num_query_groups, config.num_attention_heads
    per_group = heads // G
    bands = len(weights["rope.bands"])
    near = np.repeat(_REACH, bands).astype(np.float32)
    far = near * np.tile([0.2, *[1.0] * (bands - 1)], 3).astype(np.float32)
    attention = _STRUCTURED + "self_attention."
    q, k, v = (weights[attention + f"linear_qkv.{name}.weight"] for name in "qkv")
    for head in range(heads):
        q[head * K : (head + 1) * K, _DIT_CARRIERS] += np.outer(_kernel(far if head % per_group else near, K), _SIGNS)
    for group in range(G):
        k[group * K : (group + 1) * K, _DIT_CARRIERS] += np.outer(_kernel(near, K), _SIGNS)
        v[group * K + K - 1, _DIT_CARRIERS] += _CONTRAST * _SIGNS / len(_SIGNS)
    v[_PLACE * K + _CHANNEL, np.arange(_OWN.start, _OWN.stop)] += 1
    for name in "qk":
        weights[attention + f"{name}_layernorm.weight"] += _SHARPNESS

    proj = weights[attention + "linear_proj.weight"]
    columns = np.arange(proj.shape[1]).reshape(_HEAD_BLOCKS, 2, -1)[:, 0].reshape(heads, K)
    for head in range(_PLACES * per_group):
        own_place, further = divmod(head, per_group)
        share = (1 - _NEAR_SHARE) / (per_group - 1) if further else _NEAR_SHARE
        for place in range(_PLACES):
            rows = _AROUND.start + place * _KEPT + np.arange(_KEPT)
            mixed = _MIXED / _PLACES + (1 - _MIXED) * (place == own_place)
            proj[rows, columns[head, :_KEPT]] += share * mixed * _KEEP
        proj[_DIT_CARRIERS, columns[head, K - 1]] += _SIGNS / (_PLACES * per_group)
    # Undoes what the norms before and after have divided by.
    norm = sqrt(len(_SIGNS) / config.hidden_size)
    weights[_STRUCTURED + "self_attn_post_norm.weight"][:] = norm * _CONTRAST - 1


def _kernel(amplitude: Array, width: int) -> Array:
    """A query or key without mean, so that a norm changes its length only."""
    vector = np.zeros(width, np.float32)
    vector[: len(amplitude)], vector[len(amplitude) : 2 * len(amplitude)] = amplitude, -amplitude
    return vector


def _dit_random(name: str, shape: tuple[int, ...], draw: Draw) -> Array:
    if name == "rope.bands":
        return np.array([_BANDS[0] * (_BANDS[1] / _BANDS[0]) ** i for i in range(shape[0])], np.float32)
    if name.endswith("null_caption_embedding"):
        return draw(name, shape)
    if name in ("x_embedder.weight", "final_linear.linear.weight"):
        return np.zeros(shape, np.float32)
    if name.endswith("layer_norm.weight"):
        return np.ones(shape, np.float32)
    if name.endswith("post_norm.weight"):  # stored minus one
        return draw(name, shape, scale=0.01 * _DIT_SIGNAL) + np.float32(_RANDOM * _DIT_SIGNAL - 1)
    if name.endswith("proj.0.bias") and "ada_modulate" in name:
        return 1 + draw(name, shape, scale=0.1)
    if len(shape) == 1:
        return draw(name, shape, scale=0 if "post_norm" in name else 0.01)
    random = draw(name, shape, scale=shape[-1] ** -0.5)
    if "ada_modulate" in name:
        random *= 0.1
    if _STRUCTURED + "self_attention" in name:
        random *= 0.05
    if ".linear_qkv." in name or name.endswith("linear_fc1.weight"):
        random[:, _DIT_CARRIERS] = 0  # or every token would get the same
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        # The four places of a token move mostly together.
        together = draw(name + "/together", (_KEPT, shape[1]), scale=float(random.std()))
        around = (together[_CHANNEL] + 0.05 * random[_AROUND]) * _TINT[_CHANNEL, None]
        random[:] = 0
        random[_AROUND] = around
    return random
