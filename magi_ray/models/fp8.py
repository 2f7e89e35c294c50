"""Linear layers of fp8 checkpoints (spec §3): inputs and weights in e4m3, sums in float32.

The plain path is the specification: it multiplies the same e4m3 values in float32. Hardware with fp8 matmul sums in
its own order.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0

Scaling = Literal["channel", "smooth"]


class Fp8Linear(nn.Module):
    """y = e4m3(x / scale) @ weightᵀ × input_scale[0] × weight_scale.

    scaling: what x is divided by: "channel": input_scale [in]; "smooth": smooth_scale [1, in], input_scale being [1].
    out_dtype: of the result. Parameter names and shapes are the published ones.
    """

    def __init__(self, width_in: int, width_out: int, *, scaling: Scaling, out_dtype: torch.dtype) -> None:
        super().__init__()
        self.out_dtype = out_dtype
        self.weight = _frozen((1, width_out, width_in), E4M3)
        self.weight_scale = _frozen((1,), torch.float32)
        self.input_scale = _frozen((width_in if scaling == "channel" else 1,), torch.float32)
        self.smooth_scale = _frozen((1, width_in), torch.float32) if scaling == "smooth" else None

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out] in ``out_dtype``."""
        scale = self.input_scale if self.smooth_scale is None else self.smooth_scale[0]
        # By way of bfloat16, as the published weights were calibrated.
        quantised = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.bfloat16).to(E4M3)
        multiply = _hardware if fp8_matmul(x.device) else _plain
        return multiply(quantised, self.weight[0], self.input_scale[:1], self.weight_scale).to(self.out_dtype)


def fp8_matmul(device: torch.device) -> bool:
    """Whether ``device`` multiplies e4m3 matrices: NVIDIA from compute capability 8.9 (Ada, Hopper) on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _plain(x: Tensor, weight: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    return F.linear(x.float(), weight.float()) * input_scale * weight_scale


def _hardware(x: Tensor, weight: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    # The kernel needs a multiple of 16 rows. Padded as bytes, since not every operation knows e4m3; byte 0 is 0.0.
    rows = x.flatten(0, -2).view(torch.uint8)
    padding = -len(rows) % 16
    rows = F.pad(rows, (0, 0, 0, padding)).view(E4M3)
    y = torch._scaled_mm(rows, weight.t(), scale_a=input_scale[0], scale_b=weight_scale[0], out_dtype=torch.float32)
    return y[: len(y) - padding].reshape(*x.shape[:-1], -1)


def _frozen(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
