from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from magi_ray.errors import WeightsError
from magi_ray.models.vae.blocks import Transformer
from magi_ray.models.vae.config import VAEConfig
from magi_ray.models.vae.model import VAE, WEIGHTS_FILE, load_vae
from magi_ray.models.vae.tiling import decode_tiled
from magi_ray.settings import TileSettings


@pytest.fixture
def folder(tiny_weights: Path, tmp_path: Path) -> Path:
    """A copy of a VAE folder, to spoil."""
    return Path(shutil.copytree(tiny_weights / "vae", tmp_path / "vae"))


def _config(**changes: Any) -> VAEConfig:
    small: dict[str, Any] = {"video_size": 16, "video_length": 8, "z_chans": 16, "embed_dim": 256, "depth": 1}
    return VAEConfig(**(small | {"num_heads": 4, "mlp_ratio": 1.0} | changes))


def _random_vae(config: VAEConfig) -> VAE:
    vae = VAE(config, attention="plain")
    generator = torch.Generator().manual_seed(0)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return vae


@pytest.mark.parametrize("ln_in_attn", [True, False])
@pytest.mark.parametrize("use_final_proj", [True, False])
@pytest.mark.parametrize("with_cls_token", [True, False])
def test_every_variant_keeps_the_published_names_and_shapes(
    ln_in_attn: bool, use_final_proj: bool, with_cls_token: bool
) -> None:
    config = _config(ln_in_attn=ln_in_attn, use_final_proj=use_final_proj, with_cls_token=with_cls_token)
    vae = _random_vae(config)
    names = set(vae.state_dict())
    assert ("encoder.blocks.0.norm1.weight" in names) != ln_in_attn
    assert ("decoder.final_proj.weight" in names) == use_final_proj
    assert ("decoder.final_norm.weight" in names) == use_final_proj
    assert ("encoder.cls_token" in names) == with_cls_token
    assert vae.decoder.last_layer.weight.shape[1] == (4 if use_final_proj else 1)
    latent = vae.encode(torch.zeros(1, 3, 8, 16, 24))
    assert latent.shape == (1, 16, 2, 2, 3)
    assert vae.decode(latent).shape == (1, 3, 8, 16, 24)


def test_positions_are_used_as_learned_on_their_own_grid_and_interpolated_on_others() -> None:
    trunk = Transformer(_config(), "plain")
    torch.nn.init.normal_(trunk.pos_embed)
    assert trunk.positions((2, 2, 2)) is trunk.pos_embed
    # A linear ramp along W stays one between the outer points, which are held (align_corners false).
    trunk.pos_embed.data[:, 1:] = torch.tensor([0.0, 1.0]).repeat(4)[None, :, None]
    wider = trunk.positions((2, 2, 4))
    assert torch.equal(wider[:, :1], trunk.pos_embed[:, :1])
    assert torch.allclose(wider[0, 1:5, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))


def test_an_image_is_four_copies_of_one_frame_and_comes_back_as_one_frame() -> None:
    vae = _random_vae(_config())
    frame = torch.randn(1, 3, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    latent = vae.encode(frame)
    assert torch.equal(latent, vae.encode(frame.repeat(1, 1, 4, 1, 1)))
    assert vae.decode(latent).shape == (1, 3, 1, 16, 16)


def test_a_tile_as_large_as_the_video_changes_nothing(tiny_weights: Path) -> None:
    vae = load_vae(tiny_weights / "vae", device="cpu", attention="sdpa")
    latent = torch.randn(1, 16, 6, 3, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(decode_tiled(vae, latent, tiles=TileSettings(frames=24)), vae.decode(latent))


def test_a_last_tile_of_one_latent_frame_gives_one_frame(tiny_weights: Path) -> None:
    vae = load_vae(tiny_weights / "vae", device="cpu", attention="sdpa")
    assert decode_tiled(vae, torch.zeros(1, 16, 4, 3, 4), tiles=TileSettings(frames=12)).shape[2] == 13


def test_a_missing_and_an_unexpected_tensor_are_both_named(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["encoder.extra"] = tensors.pop("encoder.norm.bias")
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(WeightsError) as raised:
        load_vae(folder, device="cpu", attention="sdpa")
    assert "missing: encoder.norm.bias" in raised.value.message
    assert "unexpected: encoder.extra" in raised.value.message


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("colours", 3, "unknown fields colours"),
        ("norm_code", True, "norm_code is True, but only False is known"),
        ("num_heads", 5, "embed_dim 64 is not divisible by num_heads 5"),
        ("use_final_proj", False, "embed_dim 64 is not divisible by the 256 pixels of a patch"),
    ],
)
def test_a_config_this_network_cannot_follow_is_refused(folder: Path, field: str, value: Any, complaint: str) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["ddconfig"][field] = value
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=complaint):
        load_vae(folder, device="cpu", attention="sdpa")


def test_a_config_without_a_needed_field_is_refused(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    del content["ddconfig"]["video_size"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="video_size"):
        load_vae(folder, device="cpu", attention="sdpa")


@pytest.mark.parametrize("damage", ["missing config", "broken config", "another model", "cut-off weights"])
def test_a_damaged_folder_is_a_weights_error_with_a_remedy(folder: Path, damage: str) -> None:
    match damage:
        case "missing config":
            (folder / "config.json").unlink()
        case "broken config":
            (folder / "config.json").write_text("{")
        case "another model":
            (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "ddconfig": {}}))
        case "cut-off weights":
            content = (folder / WEIGHTS_FILE).read_bytes()
            (folder / WEIGHTS_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError) as raised:
        load_vae(folder, device="cpu", attention="sdpa")
    assert raised.value.remedy
