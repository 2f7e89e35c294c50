"""The VAE gives the reference's latents and pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from magi_ray.models.vae.model import VAE, load_vae
from magi_ray.models.vae.tiling import decode_tiled, encode_tiled
from magi_ray.settings import TileSettings


@pytest.fixture(params=["plain", "sdpa"])
def attention(request: pytest.FixtureRequest) -> Literal["plain", "sdpa"]:
    kind: Literal["plain", "sdpa"] = request.param
    return kind


def _vae(case: Any, attention: Literal["plain", "sdpa"]) -> VAE:
    folder: Path = case.folder
    return load_vae(folder / f"{case.name}_weights", device="cpu", attention=attention)


def test_a_video_goes_in_and_out_as_in_the_reference(vae_case: Any, attention: Literal["plain", "sdpa"]) -> None:
    vae, want = _vae(vae_case, attention), vae_case.tensors
    pixels = want["video_uint8"] / 127.5 - 1
    assert vae_case.relative_error(vae.encode(pixels), want["latent_full"]) <= vae_case.tolerance
    assert vae_case.relative_error(vae.decode(want["latent_full"]), want["decoded_full"]) <= vae_case.tolerance


def test_an_image_goes_in_and_out_as_in_the_reference(vae_case: Any, attention: Literal["plain", "sdpa"]) -> None:
    vae, want = _vae(vae_case, attention), vae_case.tensors
    first_frame = want["video_uint8"][:, :, :1] / 127.5 - 1
    assert vae_case.relative_error(vae.encode(first_frame), want["latent_image"]) <= vae_case.tolerance
    assert vae_case.relative_error(vae.decode(want["latent_image"]), want["decoded_image"]) <= vae_case.tolerance


def test_tiles_are_cut_and_blended_as_in_the_reference(vae_case: Any, attention: Literal["plain", "sdpa"]) -> None:
    vae, want = _vae(vae_case, attention), vae_case.tensors
    height, width, frames = vae_case.facts["tiles"]
    # Smaller than the settings allow, as the pictures of the case are.
    tiles = TileSettings.model_construct(height=height, width=width, frames=frames)
    pixels = want["video_uint8"] / 127.5 - 1
    assert vae_case.relative_error(encode_tiled(vae, pixels, tiles=tiles), want["latent_tiled"]) <= vae_case.tolerance
    decoded = decode_tiled(vae, want["latent_full"], tiles=tiles)
    assert vae_case.relative_error(decoded, want["decoded_tiled"]) <= vae_case.tolerance
