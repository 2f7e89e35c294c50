from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from magi_ray.errors import WeightsError
from magi_ray.models.dit.model import load_dit
from magi_ray.models.files import digest_files, published_folder, weight_files
from magi_ray.models.weights import check_fit, load_into
from magi_ray.settings import ModelConfig


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(2)


def on_meta() -> Small:
    with torch.device("meta"):
        return Small()


def tensors() -> dict[str, Tensor]:
    return {
        "linear.weight": torch.arange(6.0).view(2, 3).bfloat16(),
        "linear.bias": torch.ones(2).bfloat16(),
        "norm.weight": torch.full((2,), 0.5).bfloat16(),
        "norm.bias": torch.zeros(2),
    }


def test_a_module_on_the_meta_device_gets_the_tensors_of_all_files_in_its_own_dtypes(tmp_path: Path) -> None:
    names = list(tensors())
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file, part in zip(files, (names[:2], names[2:]), strict=True):
        save_file({name: tensors()[name] for name in part}, file)
    module = on_meta()
    load_into(module, files)
    assert torch.equal(module.linear.weight, tensors()["linear.weight"])
    assert module.linear.weight.dtype == torch.bfloat16
    assert module.norm.weight.dtype == torch.float32
    assert module.norm.weight.tolist() == [0.5, 0.5]
    assert not any(p.requires_grad for p in module.parameters())
    assert not module.training


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path: Path) -> None:
    content = tensors()
    del content["linear.bias"]
    content["stranger"] = torch.zeros(5)
    content["linear.weight"] = torch.zeros(3, 2)
    content["norm.weight"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(content, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_into(on_meta(), [tmp_path / "model.safetensors"])
    assert caught.value.message == (
        f"The weights in {tmp_path} do not fit the config, 4 differences:\n"
        "  missing: linear.bias [2]\n"
        "  shape: linear.weight found [3, 2], expected [2, 3]\n"
        "  dtype: norm.weight found F8_E4M3, expected one of F32, BF16, F16\n"
        "  unexpected: stranger [5]"
    )


def test_a_cut_off_file_is_a_weights_error(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(WeightsError, match=f"model.safetensors has {len(whole) - 3} bytes, but needs {len(whole)}"):
        check_fit(on_meta(), [file])


def test_a_dit_of_another_size_is_refused_with_the_first_differences(tmp_path: Path) -> None:
    save_file({"x_embedder.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = ModelConfig(
        num_layers=2, hidden_size=64, ffn_hidden_size=64, num_attention_heads=8, num_query_groups=4, kv_channels=8
    )
    with pytest.raises(WeightsError, match=r"missing: t_embedder\.mlp\.0\.weight \[16, 256\]") as caught:
        load_dit(config, tmp_path, attention="plain")
    assert "and 16 more" in caught.value.message


@pytest.mark.parametrize(
    ("fp8", "distill", "name"),
    [
        (False, False, "inference_weight"),
        (True, False, "inference_weight.fp8"),
        (False, True, "inference_weight.distill"),
        (True, True, "inference_weight.fp8.distill"),
    ],
)
def test_the_published_folder(fp8: bool, distill: bool, name: str) -> None:
    assert published_folder(Path("ckpt"), fp8=fp8, distill=distill) == Path("ckpt") / name


def test_an_index_names_the_shards(tmp_path: Path) -> None:
    for name in ("two.safetensors", "one.safetensors", "stray.safetensors"):
        (tmp_path / name).touch()
    weight_map = {"a": "two.safetensors", "b": "one.safetensors", "c": "one.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert weight_files(tmp_path) == [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_a_single_file_is_found(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert weight_files(tmp_path) == [tmp_path / name]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights folder"):
        weight_files(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="holds none of"):
        weight_files(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(WeightsError, match=r"1 are missing: gone\.safetensors"):
        weight_files(tmp_path)
    index.write_text("[]")
    with pytest.raises(WeightsError, match="not a safetensors index"):
        weight_files(tmp_path)


def test_a_digest_depends_on_names_and_contents_and_not_on_the_folder(tmp_path: Path) -> None:
    def written(folder: str, **contents: bytes) -> str:
        (tmp_path / folder).mkdir()
        files = [tmp_path / folder / name for name in contents]
        for file, content in zip(files, contents.values(), strict=True):
            file.write_bytes(content)
        return digest_files(files, cache=None)

    first = written("a", x=b"1", y=b"2")
    assert written("b", y=b"2", x=b"1") == first
    assert written("c", x=b"1", y=b"3") != first
    assert written("d", x=b"1", z=b"2") != first


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    file, cache = tmp_path / "w", tmp_path / "deep" / "digests.json"
    file.write_bytes(b"1")
    first = digest_files([file], cache=cache)
    known = json.loads(cache.read_text())
    assert len(known) == 1
    cache.write_text(json.dumps(dict.fromkeys(known, "from the cache")))
    assert digest_files([file], cache=cache) != first
    file.write_bytes(b"22")
    assert digest_files([file], cache=cache) == digest_files([file], cache=None)


def test_a_broken_cache_is_only_slower(tmp_path: Path) -> None:
    file, cache = tmp_path / "w", tmp_path / "digests.json"
    file.write_bytes(b"1")
    cache.write_text("{")
    assert digest_files([file], cache=cache) == digest_files([file], cache=None)


def test_a_file_that_is_gone_cannot_be_digested(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be read"):
        digest_files([tmp_path / "gone"], cache=None)
