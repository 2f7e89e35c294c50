from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from magi_ray.errors import WeightsError
from magi_ray.models.text.prompt import clean_caption
from magi_ray.models.text.t5 import TextEncoder, load_t5
from magi_ray.models.text.tokens import T5_NAME, TOKENIZER_FILE

CAPTIONS = ["a cat walks through the snow", "", 'two children at night: "cinematic", 35mm!', "ünïcödé ☃☃ 日本"]


@pytest.fixture(scope="module")
def encoder(tiny_weights: Path) -> TextEncoder:
    return load_t5(tiny_weights / "t5", device="cpu")


@pytest.fixture
def folder(tiny_weights: Path, tmp_path: Path) -> Path:
    """A copy of a T5 folder, to spoil."""
    return Path(shutil.copytree(tiny_weights / "t5", tmp_path / "t5"))


def test_an_embedding_has_a_row_for_each_token_and_one_for_the_end(encoder: TextEncoder) -> None:
    for caption, embedding in zip(CAPTIONS, encoder.encode(CAPTIONS), strict=True):
        assert embedding.shape == (len(encoder.token_ids(caption)), encoder.width)
        assert embedding.dtype == torch.float32


def test_an_empty_caption_is_the_end_of_the_text_alone(encoder: TextEncoder) -> None:
    assert encoder.token_ids("") == [1]
    assert encoder.encode([""])[0].shape == (1, encoder.width)


def test_other_captions_change_no_bit(encoder: TextEncoder) -> None:
    together = encoder.encode(CAPTIONS)
    for caption, embedding in zip(CAPTIONS, together, strict=True):
        assert torch.equal(encoder.encode([caption])[0], embedding)


def test_a_long_caption_is_cut_to_the_maximum_and_still_ends(encoder: TextEncoder) -> None:
    ids = encoder.token_ids("dog " * 2000)
    assert len(ids) == 800
    assert ids[-1] == 1


def test_embeddings_are_those_at_the_unmasked_positions_of_a_padded_caption(
    encoder: TextEncoder, tiny_weights: Path
) -> None:
    from transformers import T5EncoderModel

    model = T5EncoderModel.from_pretrained(tiny_weights / "t5" / T5_NAME, local_files_only=True)
    ids = encoder.token_ids(CAPTIONS[0])
    padded = torch.tensor([ids + [0] * (800 - len(ids))])
    with torch.no_grad():
        whole = model(input_ids=padded, attention_mask=(padded != 0).long()).last_hidden_state[0]
    assert torch.allclose(encoder.encode([CAPTIONS[0]])[0], whole[: len(ids)], atol=1e-5)


def test_tokens_are_those_of_the_transformers_tokenizer(encoder: TextEncoder, tiny_weights: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_weights / "t5" / T5_NAME, local_files_only=True)
    for caption in [*CAPTIONS, "dog " * 2000, clean_caption("A  %20 “quoted” Caption, free shipping")]:
        assert encoder.token_ids(caption) == tokenizer(caption, max_length=800, truncation=True).input_ids


def test_loading_is_silent_and_opens_no_connection(
    tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    load_t5(tiny_weights / "t5", device="cpu")
    assert capfd.readouterr() == ("", "")


def test_a_whole_t5_with_decoder_is_read_too(folder: Path, encoder: TextEncoder) -> None:
    path = folder / T5_NAME / "model.safetensors"
    extra = {"decoder.final_layer_norm.weight": torch.ones(64), "lm_head.weight": torch.ones(256, 64)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    assert torch.equal(load_t5(folder, device="cpu").encode(CAPTIONS)[0], encoder.encode(CAPTIONS)[0])


@pytest.mark.parametrize(
    "damage",
    ["no folder", "no config", "broken config", "no tokenizer", "cut-off tokenizer", "another tokenizer", "no weights",
     "cut-off weights", "a tensor missing", "a tensor too many", "another width"],
)  # fmt: skip
def test_a_damaged_folder_is_a_weights_error_with_a_remedy(folder: Path, damage: str) -> None:
    path = folder / T5_NAME
    config, tokenizer, weights = path / "config.json", path / TOKENIZER_FILE, path / "model.safetensors"
    tensors, settings = load_file(weights), json.loads(config.read_text())
    match damage:
        case "no folder":
            shutil.rmtree(folder)
        case "no config":
            config.unlink()
        case "broken config":
            config.write_text("{")
        case "no tokenizer":
            tokenizer.unlink()
        case "cut-off tokenizer":
            tokenizer.write_bytes(tokenizer.read_bytes()[:1000])
        case "another tokenizer":
            config.write_text(json.dumps(settings | {"vocab_size": 512}))
            tensors["shared.weight"] = torch.zeros(512, 64)
            save_file(tensors, weights, metadata={"format": "pt"})
        case "no weights":
            weights.unlink()
        case "cut-off weights":
            weights.write_bytes(weights.read_bytes()[:5000])
        case "a tensor missing":
            del tensors["encoder.final_layer_norm.weight"]
            save_file(tensors, weights, metadata={"format": "pt"})
        case "a tensor too many":
            save_file(tensors | {"encoder.extra": torch.ones(1)}, weights, metadata={"format": "pt"})
        case "another width":
            config.write_text(json.dumps(settings | {"d_model": 128}))
    with pytest.raises(WeightsError) as raised:
        load_t5(folder, device="cpu")
    assert str(path) in raised.value.message
    assert raised.value.remedy
