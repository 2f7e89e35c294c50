"""Linear layers of fp8 checkpoints: tests/parity compares their numbers, this how they behave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from magi_ray.errors import WeightsError
from magi_ray.models.dit.model import DiT
from magi_ray.models.fp8 import E4M3, E4M3_MAX, Fp8Linear, Scaling, _hardware, _plain, fp8_matmul
from magi_ray.models.weights import check_fit
from magi_ray.settings import override, preset

SCALE = 0.5


def layer(scaling: Scaling, weight: Tensor, *, out_dtype: torch.dtype = torch.float32) -> Fp8Linear:
    """One whose e4m3 weight is ``weight``, weight_scale 2, inputs divided by SCALE."""
    made = Fp8Linear(weight.shape[1], weight.shape[0], scaling=scaling, out_dtype=out_dtype)
    made.weight.data = weight.to(E4M3)[None]
    made.weight_scale.data.fill_(2)
    made.input_scale.data.fill_(SCALE)
    if made.smooth_scale is not None:
        made.smooth_scale.data.fill_(SCALE)
    return made


@pytest.mark.parametrize(
    ("scaling", "shapes"),
    [
        ("channel", {"weight": [1, 3, 8], "weight_scale": [1], "input_scale": [8]}),
        ("smooth", {"weight": [1, 3, 8], "weight_scale": [1], "input_scale": [1], "smooth_scale": [1, 8]}),
    ],
)
def test_the_parameters_have_the_published_names_and_shapes(scaling: Scaling, shapes: dict[str, list[int]]) -> None:
    state = layer(scaling, torch.zeros(3, 8)).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == shapes
    assert state["weight"].dtype == E4M3


@pytest.mark.parametrize("scaling", ["channel", "smooth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_leading_shape_is_kept_and_the_dtype_is_the_one_asked_for(scaling: Scaling, dtype: torch.dtype) -> None:
    y = layer(scaling, torch.eye(3, 8), out_dtype=dtype)(torch.ones(2, 5, 8, dtype=torch.bfloat16))
    assert (y.shape, y.dtype) == ((2, 5, 3), dtype)
    assert torch.equal(y.float(), torch.full((2, 5, 3), 2.0))  # 1 / SCALE · 1 · SCALE · 2


@pytest.mark.parametrize("scaling", ["channel", "smooth"])
def test_inputs_beyond_what_e4m3_holds_are_clamped(scaling: Scaling) -> None:
    x = torch.tensor([[1e6, 0.0], [-1e6, 0.0], [E4M3_MAX * SCALE, 0.0]])
    y = layer(scaling, torch.eye(2))(x)
    largest = E4M3_MAX * SCALE * 2
    assert y[:, 0].tolist() == [largest, -largest, largest]


def test_inputs_are_rounded_to_the_three_bits_of_e4m3() -> None:
    # 17/16 lies halfway between 1 and 9/8, and goes to the even one.
    x = torch.tensor([[17 / 16], [18 / 16], [19 / 16]]) * SCALE
    assert (layer("channel", torch.ones(1, 1))(x) / (SCALE * 2)).flatten().tolist() == [1.0, 1.125, 1.25]


def test_each_input_channel_of_a_smooth_layer_has_its_own_scale() -> None:
    made = layer("smooth", torch.ones(1, 2))
    assert made.smooth_scale is not None
    made.smooth_scale.data = torch.tensor([[1.0, 4.0]])
    assert made(torch.tensor([[2.0, 8.0]])).item() == (2 + 2) * SCALE * 2


@pytest.mark.parametrize("leading", [(16,), (2, 5), (3, 16), (1,)])
def test_the_matmul_of_the_hardware_is_asked_for_the_same_sums(leading: tuple[int, ...]) -> None:
    # A CPU knows the operation too, if slowly.
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(*leading, 64, generator=generator) * 20).to(E4M3)
    weight = (torch.randn(32, 64, generator=generator) * 100).to(E4M3)
    scales = torch.tensor([0.3]), torch.tensor([0.01])
    torch.testing.assert_close(_hardware(x, weight, *scales), _plain(x, weight, *scales), rtol=1e-5, atol=1e-3)


def test_a_cpu_takes_the_plain_path() -> None:
    assert not fp8_matmul(torch.device("cpu"))


def test_all_layers_of_the_dit_but_the_first_and_the_last_are_fp8() -> None:
    with torch.device("meta"):
        dit = DiT(override(preset("magi-tiny"), {"model": {"num_layers": 5}}).model, fp8=True)
    kinds = [
        {name for name, part in block.named_modules() if isinstance(part, Fp8Linear)}
        for block in dit.videodit_blocks.layers
    ]
    inner = {f"self_attention.linear_qkv.{name}" for name in ("q", "qx", "k", "v")}
    inner |= {"self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"}
    assert kinds == [set(), inner, inner, inner, set()]


def test_a_weight_stored_in_another_dtype_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with torch.device("meta"):
        module = nn.Sequential(Fp8Linear(8, 3, scaling="channel", out_dtype=torch.float32))
    tensors = {name: torch.zeros(want.shape) for name, want in module.state_dict().items()}
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=r"dtype: 0\.weight found F32, expected one of F8_E4M3"):
        check_fit(module, [file])
    save_file(tensors | {"0.weight": tensors["0.weight"].bfloat16()[0].contiguous()}, file)
    with pytest.raises(WeightsError, match=r"shape: 0\.weight found \[3, 8\], expected \[1, 3, 8\]"):
        check_fit(module, [file])
