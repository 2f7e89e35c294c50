"""Loads published tensors into a module: strictly, one tensor at a time, without a second copy.

A module is built on the meta device, where every parameter already has its shape and run-time dtype. Loading replaces
each with the file's tensor, converted where the dtypes differ (bf16 files, float32 islands: spec §3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from magi_ray.errors import WeightsError
from magi_ray.models.safetensors_stream import Entry, read_header, read_tensors

# The dtypes in a file that a parameter can be loaded from. Any other means another kind of checkpoint.
_ACCEPTED = {
    torch.float32: ("F32", "BF16", "F16"),
    torch.bfloat16: ("BF16", "F32", "F16"),
    torch.float16: ("F16", "F32", "BF16"),
    torch.float8_e4m3fn: ("F8_E4M3",),
}
_LISTED = 50


def load_into(module: nn.Module, files: Sequence[Path], *, device: torch.device | str = "cpu") -> None:
    """Fill ``module`` (on the meta device) with the tensors of ``files``; its parameters need no gradient afterwards.

    On a CPU, tensors of the right dtype in plain files stay memory-mapped; all others are unpacked, converted and moved
    to ``device`` one by one, so that host memory never holds a second copy of the module.
    Raises WeightsError for a damaged file, or with the first 50 missing and unexpected keys, wrong shapes and wrong
    dtypes (found, expected).
    """
    check_fit(module, files)
    expected = module.state_dict()
    tensors = {
        name: tensor.to(device=device, dtype=expected[name].dtype)
        for file in files
        for name, tensor in read_tensors(file, expected)
    }
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False).eval()


def check_fit(module: nn.Module, files: Sequence[Path]) -> None:
    """Raises what ``load_into`` would raise. Reads the files' headers only, so damage within is not found."""
    expected: Mapping[str, Tensor] = module.state_dict()
    found: dict[str, Entry] = {}
    problems = []
    for file in files:
        header = read_header(file)
        problems += [f"twice: {name}, the second time in {file.name}" for name in header if name in found]
        found |= header
    problems += [f"missing: {name} {list(want.shape)}" for name, want in expected.items() if name not in found]
    for name, entry in sorted(found.items()):
        problems += _mismatch(name, entry, expected.get(name))
    if problems:
        raise WeightsError(
            f"The weights in {files[0].parent} do not fit the config, {len(problems)} differences:\n  "
            + "\n  ".join(problems[:_LISTED])
            + (f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""),
            remedy="Use the config that was published with this checkpoint.",
        )


def _mismatch(name: str, found: Entry, want: Tensor | None) -> list[str]:
    if want is None:
        return [f"unexpected: {name} {found.shape}"]
    problems = []
    if found.shape != list(want.shape):
        problems.append(f"shape: {name} found {found.shape}, expected {list(want.shape)}")
    if found.dtype not in _ACCEPTED[want.dtype]:
        problems.append(f"dtype: {name} found {found.dtype}, expected one of {', '.join(_ACCEPTED[want.dtype])}")
    return problems
