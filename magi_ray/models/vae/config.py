"""What a VAE folder's ``config.json`` says (spec §2, §6)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magi_ray.errors import WeightsError

# Fields of published configs besides those of VAEConfig, with the only value that this network supports.
# Drop rates matter in training only.
_FIXED = {
    "in_chans": 3, "double_z": True, "conv_last_layer": True, "norm_code": False, "qk_scale": None, "use_rope": False,
}  # fmt: skip
_IGNORED = {"drop_rate", "attn_drop_rate", "drop_path_rate"}


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Sizes and variants of a ViT VAE; field names and defaults are the published ones (``ddconfig``)."""

    video_size: int
    """Height and width in pixels that the positions were learned for."""
    video_length: int
    """Frames that the positions were learned for."""
    patch_size: int = 8
    patch_length: int = 4
    z_chans: int = 4
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    with_cls_token: bool = True
    ln_in_attn: bool = False
    """Normalise q, k and v in each head instead of the tokens before attention."""
    use_final_proj: bool = False
    """Project the decoder's tokens to 4 channels for each pixel before the last convolution."""

    @property
    def learned_grid(self) -> tuple[int, int, int]:
        """Tokens along T, H, W that the positions were learned for."""
        side = self.video_size // self.patch_size
        return self.video_length // self.patch_length, side, side

    @property
    def patch_pixels(self) -> int:
        return self.patch_length * self.patch_size**2

    @property
    def pixel_channels(self) -> int:
        """Channels of a pixel before the last convolution makes RGB of them."""
        return 4 if self.use_final_proj else self.embed_dim // self.patch_pixels

    @classmethod
    def load(cls, path: Path) -> VAEConfig:
        """Read ``config.json``. Raises WeightsError: missing, not JSON, not a ViT VAE, unknown or impossible fields."""
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError as exc:
            remedy = "Point vae_pretrained at a folder of the published form."
            raise WeightsError(f"There is no VAE config {path}.", remedy=remedy) from exc
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as exc:
            raise WeightsError(f"{path} is not readable as JSON: {exc}", remedy="Copy the VAE folder again.") from exc
        kind = content.get("_class_name") if isinstance(content, dict) else None
        vit = kind == "ViTVAE" and content.get("model_type", "vit") == "vit"
        if not (vit and isinstance(content.get("ddconfig"), dict)):
            raise WeightsError(
                f"{path} describes {kind or 'no VAE'}, but magi-ray reads a ViTVAE of model_type vit.",
                remedy="Point vae_pretrained at MAGI-1's own VAE.",
            )
        return cls._from_published(content["ddconfig"], source=path)

    @classmethod
    def _from_published(cls, fields: Mapping[str, Any], *, source: Path) -> VAEConfig:
        def wrong(problem: str) -> WeightsError:
            remedy = "Use the config.json that was published with these weights."
            return WeightsError(f"{source}: {problem}", remedy=remedy)

        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - names - set(_FIXED) - _IGNORED):
            raise wrong(f"unknown fields {', '.join(unknown)}")
        for name, only in _FIXED.items():
            if fields.get(name, only) != only:
                raise wrong(f"{name} is {fields[name]}, but only {only} is known")
        try:
            config = cls(**{name: value for name, value in fields.items() if name in names})
        except TypeError as exc:
            raise wrong(str(exc).partition(") ")[2] or str(exc)) from exc
        channels, heads = config.embed_dim, config.num_heads
        if channels % heads:
            raise wrong(f"embed_dim {channels} is not divisible by num_heads {heads}")
        if not config.use_final_proj and channels % config.patch_pixels:
            raise wrong(f"embed_dim {channels} is not divisible by the {config.patch_pixels} pixels of a patch")
        return config
