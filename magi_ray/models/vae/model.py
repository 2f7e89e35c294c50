"""The ViT VAE: pixels ↔ latents, 8×8 pixels by 4 frames a token (spec §6).

Shapes: B batch · C channels · D embed_dim · T, H, W latent frames, rows, columns (tokens are latents).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from magi_ray.models.files import weight_files
from magi_ray.models.vae.blocks import LAYERNORM_EPSILON, AttentionKind, Transformer
from magi_ray.models.vae.config import VAEConfig
from magi_ray.models.weights import load_into

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class PatchEmbed(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        patch = (config.patch_length, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.embed_dim, kernel_size=patch, stride=patch)

    def forward(self, pixels_BCTHW: Tensor) -> Tensor:
        patches_BDTHW: Tensor = self.proj(pixels_BCTHW)
        return patches_BDTHW.movedim(1, -1)


class Encoder(Transformer):
    def __init__(self, config: VAEConfig, attention: AttentionKind) -> None:
        super().__init__(config, attention)
        self.patch_embed = PatchEmbed(config)
        self.last_layer = nn.Linear(config.embed_dim, 2 * config.z_chans)

    def forward(self, pixels_BCTHW: Tensor) -> Tensor:
        x_BTHWD = self.patch_embed(pixels_BCTHW)
        x_BTHWD = self.transform(x_BTHWD)
        moments: Tensor = self.last_layer(x_BTHWD)
        mean_BTHWC, _log_variance = moments.chunk(2, dim=-1)
        return mean_BTHWC.movedim(-1, 1)


class Decoder(Transformer):
    def __init__(self, config: VAEConfig, attention: AttentionKind) -> None:
        super().__init__(config, attention)
        self.patch = (config.patch_length, config.patch_size, config.patch_size, config.pixel_channels)
        self.proj_in = nn.Linear(config.z_chans, config.embed_dim)
        width = config.patch_pixels * config.pixel_channels
        final = config.use_final_proj
        self.final_proj = nn.Linear(config.embed_dim, width) if final else nn.Identity()
        self.final_norm = nn.LayerNorm(width, eps=LAYERNORM_EPSILON) if final else nn.Identity()
        self.last_layer = nn.Conv3d(config.pixel_channels, 3, kernel_size=3, padding=1)

    def forward(self, latent_BCTHW: Tensor) -> Tensor:
        x_BTHWD = self.proj_in(latent_BCTHW.movedim(1, -1))
        x_BTHWD = self.transform(x_BTHWD)
        x_BTHWD = self.final_norm(self.final_proj(x_BTHWD))
        pixels = torch.unflatten(x_BTHWD, -1, self.patch)  # [B, T, H, W, pT, pH, pW, C]
        pixels = pixels.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, C, T, pT, H, pH, W, pW]
        out_BCTHW: Tensor = self.last_layer(pixels.flatten(6, 7).flatten(4, 5).flatten(2, 3))
        return out_BCTHW


class VAE(nn.Module):
    """Encoder and decoder. Latents are means, and unscaled: callers multiply by ``scale_factor``."""

    def __init__(self, config: VAEConfig, *, attention: AttentionKind) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, attention)
        self.decoder = Decoder(config, attention)

    @torch.no_grad()
    def encode(self, pixels_BCTHW: Tensor) -> Tensor:
        """Latents of a video or of one image.

        Args:
            pixels_BCTHW: [B, 3, T, H, W] in −1…1; T is 1 or a multiple of 4, H and W are multiples of 8.

        Returns: [B, z_chans, max(T/4, 1), H/8, W/8]. One frame is encoded as four copies of itself.
        """
        length, size = self.config.patch_length, self.config.patch_size
        _, _, T, H, W = pixels_BCTHW.shape
        assert T == 1 or T % length == 0, f"{T} frames"
        assert H % size == W % size == 0, f"{H} × {W} pixels"
        if T == 1:
            pixels_BCTHW = pixels_BCTHW.expand(-1, -1, length, -1, -1)
        latent_BCTHW: Tensor = self.encoder(pixels_BCTHW)
        return latent_BCTHW

    @torch.no_grad()
    def decode(self, latent_BCTHW: Tensor) -> Tensor:
        """Pixels of latents: [B, z_chans, T, H, W] → [B, 3, 4·T, 8·H, 8·W] around −1…1, not clamped.

        One latent frame gives one frame, the first of its four: so an image stays an image.
        """
        pixels_BCTHW: Tensor = self.decoder(latent_BCTHW)
        return pixels_BCTHW[:, :, :1] if latent_BCTHW.shape[2] == 1 else pixels_BCTHW


def load_vae(folder: Path, *, device: str, attention: AttentionKind) -> VAE:
    """The VAE of a folder in the published form, in float32.

    Raises WeightsError: files missing or damaged, or keys and shapes that do not fit the config.
    """
    config = VAEConfig.load(folder / "config.json")
    with torch.device("meta"):
        vae = VAE(config, attention=attention)
    load_into(vae, weight_files(folder), device=device)
    return vae
