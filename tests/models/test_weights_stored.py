"""Weights in every form they are stored in, and damaged in every way that can be seen."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import save, save_file
from torch import Tensor, nn

from magi_ray.errors import WeightsError
from magi_ray.models.dit.model import load_dit
from magi_ray.models.files import digest_files, published_folder, text_encoder_files, weight_files
from magi_ray.models.safetensors_stream import read_header, read_tensors
from magi_ray.models.tiny import make_tiny
from magi_ray.models.vae.model import load_vae
from magi_ray.models.weights import check_fit, load_into
from magi_ray.render.runs import preflight
from magi_ray.settings import override, preset


def content() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(300, 200, generator=generator),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "c": torch.randn(2, 3, generator=generator).to(torch.float8_e4m3fn),
        "d": torch.zeros(0, 4),
        "e": torch.tensor(5.0),
    }


def packed(data: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)  # type: ignore[arg-type]


def streamed(data: bytes) -> bytes:
    """As a pipe writes it: the frame does not say how much it holds."""
    compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    return compressor.compress(data) + compressor.flush()


def in_frames(data: bytes) -> bytes:
    """As parallel compressors write it: many frames, and one to skip."""
    frames = [packed(data[at : at + 50_000]) for at in range(0, len(data), 50_000)]
    skipped = struct.pack("<II", 0x184D2A50, 4) + b"skip"
    return skipped + b"".join(frames)


FORMS: dict[str, Callable[[bytes], bytes]] = {"one frame": packed, "streamed": streamed, "many frames": in_frames}


@pytest.fixture(params=FORMS)
def pack(request: pytest.FixtureRequest) -> Callable[[bytes], bytes]:
    return FORMS[request.param]


class Same(nn.Module):
    """Has the parameters of ``content``."""

    def __init__(self) -> None:
        super().__init__()
        for name, tensor in content().items():
            self.register_parameter(name, nn.Parameter(tensor.to("meta"), requires_grad=False))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.float(), b.float())


def test_a_compressed_file_holds_what_the_plain_one_does(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    plain, file = tmp_path / "m.safetensors", tmp_path / "m.safetensors.zst"
    plain.write_bytes(save(content()))
    file.write_bytes(pack(plain.read_bytes()))

    assert read_header(file) == read_header(plain)
    module = Same()
    load_into(module, [file])
    assert all(same_bits(module.state_dict()[name], tensor) for name, tensor in content().items())


def test_only_the_tensors_that_are_wanted_are_given(tmp_path: Path) -> None:
    plain, file = tmp_path / "m.safetensors", tmp_path / "m.safetensors.zst"
    save_file(content(), plain)
    file.write_bytes(packed(plain.read_bytes()))

    for path in (plain, file):
        (pair,) = read_tensors(path, {"b", "nowhere"})
        assert pair[0] == "b"
        assert same_bits(pair[1], content()["b"])


def test_a_compressed_shard_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    one = 4 * 2**20
    names = [f"t{i:02}" for i in range(16)]
    data = save({name: torch.full((one // 4,), float(i)) for i, name in enumerate(names)})
    (tmp_path / "m.safetensors.zst").write_bytes(packed(data))
    whole = len(data)
    del data

    tracemalloc.start()
    seen = [(name, float(tensor[0])) for name, tensor in read_tensors(tmp_path / "m.safetensors.zst", names)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert seen == [(name, float(i)) for i, name in enumerate(names)]
    assert peak < whole / 4


def test_a_plain_file_stays_mapped(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(2**20)}, file)
    module = nn.Module()
    module.register_parameter("a", nn.Parameter(torch.empty(2**20, device="meta"), requires_grad=False))
    load_into(module, [file])

    begin = module.state_dict()["a"].data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line]
    assert any(int(r[0].split("-")[0], 16) <= begin < int(r[0].split("-")[1], 16) for r in maps)


def test_a_plain_file_cut_short_is_told_with_both_sizes_before_anything_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    data = save(content())
    file.write_bytes(data[:-1000])
    with pytest.raises(WeightsError, match=rf"m\.safetensors has {len(data) - 1000} bytes, but needs {len(data)}"):
        check_fit(Same(), [file])


def test_a_plain_file_with_more_than_it_says_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    data = save(content())
    file.write_bytes(data + b"more")
    with pytest.raises(WeightsError, match=rf"has {len(data) + 4} bytes, but needs {len(data)}"):
        check_fit(Same(), [file])


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.1])
def test_a_compressed_file_cut_short_is_found_without_unpacking_it(
    pack: Callable[[bytes], bytes], kept: float, tmp_path: Path
) -> None:
    file = tmp_path / "m.safetensors.zst"
    data = pack(save(content()))
    left = int(len(data) * kept)
    file.write_bytes(data[:left])
    with pytest.raises(WeightsError, match=rf"m\.safetensors\.zst has {left} bytes, but needs at least \d+"):
        check_fit(Same(), [file])


def test_a_whole_frame_of_a_file_that_was_cut_short_before_is_told_with_both_sizes(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors.zst"
    data = save(content())
    file.write_bytes(packed(data[:-10]))
    with pytest.raises(WeightsError, match=f"unpacks to {len(data) - 10} bytes, but needs {len(data)}"):
        check_fit(Same(), [file])
    file.write_bytes(streamed(data[:-10]))
    with pytest.raises(WeightsError, match=r"m\.safetensors\.zst ends \d+ bytes early"):
        load_into(Same(), [file])


def test_a_byte_flipped_in_a_frame_with_a_checksum_is_found_while_loading(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors.zst"
    data = bytearray(packed(save(content()), write_checksum=True))
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    check_fit(Same(), [file])
    with pytest.raises(WeightsError, match=r"m\.safetensors\.zst is not a readable safetensors file"):
        load_into(Same(), [file])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"\xff\xfe",
        struct.pack("<Q", 9) + b'{"a": 1} ',
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_what_is_no_safetensors_file_is_a_weights_error_that_names_it(
    data: bytes, compressed: bool, tmp_path: Path
) -> None:
    file = tmp_path / ("m.safetensors" + ".zst" * compressed)
    file.write_bytes(packed(data) if compressed else data)
    with pytest.raises(WeightsError, match=r"m\.safetensors") as caught:
        check_fit(Same(), [file])
    assert caught.value.remedy


def test_a_plain_file_named_as_a_compressed_one_is_a_weights_error(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors.zst"
    file.write_bytes(save(content()))
    with pytest.raises(WeightsError, match="no zstd frame begins at byte 0"):
        check_fit(Same(), [file])


def test_a_header_whose_places_do_not_fit_its_shapes_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    file = tmp_path / "m.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(WeightsError, match="a needs 16 bytes from 0 on, but is said to lie at 0–8"):
        check_fit(Same(), [file])


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    save_file(content(), files[0])
    save_file({"b": content()["b"]}, files[1])
    with pytest.raises(WeightsError, match=r"twice: b, the second time in two\.safetensors"):
        check_fit(Same(), files)


def test_a_shard_that_is_only_there_compressed_is_taken_for_the_one_the_index_names(tmp_path: Path) -> None:
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", names))}))  # noqa: B905
    (tmp_path / names[0]).touch()
    (tmp_path / f"{names[0]}.zst").touch()
    (tmp_path / f"{names[1]}.zst").touch()
    assert [file.name for file in weight_files(tmp_path)] == [names[0], f"{names[1]}.zst"]


def test_a_single_file_may_be_compressed(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.zst").touch()
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors.zst"]


@pytest.mark.parametrize("form", ["{}\n", "{}  model.safetensors\n", "{} *model.safetensors"])
@pytest.mark.parametrize("upper", [False, True])
def test_a_flipped_byte_is_found_by_the_digest_beside_the_file(form: str, upper: bool, tmp_path: Path) -> None:
    file, cache = tmp_path / "model.safetensors", tmp_path / "digests.json"
    file.write_bytes(save(content()))
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "model.safetensors.sha256").write_text(form.format(right.upper() if upper else right))
    digest_files([file], cache=cache)

    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 1
    file.write_bytes(damaged)
    wrong = hashlib.sha256(damaged).hexdigest()
    check_fit(Same(), [file])  # headers alone do not tell
    for _ in range(2):  # the second time the digest comes from the cache
        with pytest.raises(WeightsError, match=rf"{wrong}, but model\.safetensors\.sha256 says {right}"):
            digest_files([file], cache=cache)


def test_a_sidecar_without_a_digest_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m"
    file.touch()
    for text in ("", "<html>"):
        (tmp_path / "m.sha256").write_text(text)
        with pytest.raises(WeightsError, match="does not begin with a sha256"):
            digest_files([file], cache=None)


def test_a_sidecar_is_no_part_of_the_text_encoder(tmp_path: Path) -> None:
    folder = tmp_path / "t5-v1_1-xxl"
    folder.mkdir()
    for name in ("config.json", "config.json.sha256"):
        (folder / name).touch()
    assert text_encoder_files(tmp_path) == [folder / "config.json"]


@pytest.mark.parametrize("fp8", [False, True])
def test_a_tiny_checkpoint_is_the_same_in_every_form(fp8: bool, tmp_path: Path) -> None:
    engine, runtime = {"fp8_quant": fp8, "distill": fp8}, {"cfg_number": 1 if fp8 else 3}
    states, files = [], []
    for form, options in {"single": {}, "shards": {"shards": 3}, "zst": {"shards": 2, "compress": True}}.items():
        settings = override(preset("magi-tiny", weights=tmp_path / form), {"engine": engine, "runtime": runtime})
        make_tiny(tmp_path / form, settings, **options)  # type: ignore[arg-type]
        preflight.check(settings)
        folder = published_folder(settings.weights.dit, fp8=fp8, distill=fp8)
        states.append(load_dit(settings.model, folder, attention="plain", fp8=fp8).state_dict())
        files.append([file.name for file in weight_files(folder)])

    assert [len(names) for names in files] == [1, 3, 2]
    assert all(name.endswith(".safetensors.zst") for name in files[2])
    for other in states[1:]:
        assert all(same_bits(other[name], tensor) for name, tensor in states[0].items())


def test_the_vae_may_be_compressed_too(tiny_weights: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_weights / "vae" / "config.json", tmp_path)
    plain = tiny_weights / "vae" / "diffusion_pytorch_model.safetensors"
    (tmp_path / f"{plain.name}.zst").write_bytes(packed(plain.read_bytes()))
    ours, theirs = (load_vae(folder, device="cpu", attention="plain") for folder in (tmp_path, plain.parent))
    assert all(same_bits(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


def test_tiny_fp8_weights_use_the_whole_range_of_e4m3(tmp_path: Path) -> None:
    changes = {"engine": {"fp8_quant": True, "distill": True}, "runtime": {"cfg_number": 1}}
    fp8 = override(preset("magi-tiny", weights=tmp_path / "fp8"), changes)
    float32 = override(fp8, {"engine": {"fp8_quant": False}, "weights": {"dit": tmp_path / "float32" / "magi"}})
    make_tiny(tmp_path / "fp8", fp8)
    make_tiny(tmp_path / "float32", float32)
    stored, meant = (
        load_dit(s.model, published_folder(s.weights.dit, fp8=s is fp8, distill=True), attention="plain", fp8=s is fp8)
        for s in (fp8, float32)
    )
    name = "videodit_blocks.layers.2.mlp.linear_fc1."
    weight, scale = (stored.state_dict()[name + field] for field in ("weight", "weight_scale"))
    original = meant.state_dict()[name + "weight"]
    assert weight.float().abs().max() == 448
    # Rounded to 3 bits behind the first one.
    np.testing.assert_allclose(
        (weight[0].float() * scale).numpy(), original.numpy(), rtol=2**-4, atol=float(scale) * 2**-9
    )
