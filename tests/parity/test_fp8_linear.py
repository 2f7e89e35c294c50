"""Both kinds of fp8 linear alone give what the published reference gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from magi_ray.models.fp8 import Fp8Linear

TOLERANCE = 1e-5


# In the file they are called by their output: q and its like are divided by one value a channel, yet rescaled by one.
@pytest.mark.parametrize(("name", "kind"), [("per_tensor", "channel"), ("per_channel", "smooth")])
def test_an_fp8_linear_equals_the_reference(parity_dir: Path, name: str, kind: str) -> None:
    file = parity_dir / "fp8_linear.safetensors"
    if not file.is_file():
        pytest.skip(f"{parity_dir} has no fp8_linear.safetensors")
    case = {k.removeprefix(f"{name}."): v for k, v in load_file(file).items() if k.startswith(f"{name}.")}
    x, expected = case.pop("x"), case.pop("y")
    layer = Fp8Linear(x.shape[-1], expected.shape[-1], scaling=kind, out_dtype=torch.float32)  # type: ignore[arg-type]
    layer.load_state_dict(case, strict=True)
    error = (layer(x) - expected).abs().max() / expected.abs().max()
    assert float(error) <= TOLERANCE
