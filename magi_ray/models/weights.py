"""Published tensors into a module: strictly, memory-mapped, one copy.

A module is built on the meta device, where every parameter already has the shape and the run-time dtype it wants;
loading replaces each by the file's tensor, converted where the dtypes differ (bf16 files, float32 islands: spec §3).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from magi_ray.errors import WeightsError

# Which dtypes of a file a parameter may come from. Anything else means another kind of checkpoint.
_ACCEPTED = {
    torch.float32: ("F32", "BF16", "F16"),
    torch.bfloat16: ("BF16", "F32", "F16"),
    torch.float16: ("F16", "F32", "BF16"),
    torch.float8_e4m3fn: ("F8_E4M3",),
}
_LISTED = 50


def load_into(module: nn.Module, files: Sequence[Path], *, device: torch.device | str = "cpu") -> None:
    """Fill ``module`` (on the meta device) with the tensors of ``files``; its parameters need no gradient afterwards.

    Tensors of the right dtype stay mapped to the file on a CPU; others are converted one by one.
    Raises WeightsError listing the missing and unexpected keys and the wrong shapes and dtypes (found, expected), the
    first 50 of them.
    """
    expected = module.state_dict()
    with ExitStack() as stack:
        where = _opened(stack, module, files)
        module.load_state_dict(
            {n: where[n].get_tensor(n).to(device=device, dtype=want.dtype) for n, want in expected.items()}, assign=True
        )
    module.requires_grad_(False).eval()


def check_fit(module: nn.Module, files: Sequence[Path]) -> None:
    """Raises what ``load_into`` would raise, having read the files' headers alone."""
    with ExitStack() as stack:
        _opened(stack, module, files)


def _opened(stack: ExitStack, module: nn.Module, files: Sequence[Path]) -> dict[str, safe_open]:
    """The open file of every tensor, all of which fit ``module``. Raises WeightsError."""
    expected = module.state_dict()
    opened = [stack.enter_context(_open(file)) for file in files]
    where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (not a dict)
    problems = [f"missing: {name} {list(want.shape)}" for name, want in expected.items() if name not in where]
    for name, file in sorted(where.items()):
        problems += _mismatch(name, file.get_slice(name), expected.get(name))
    if problems:
        raise WeightsError(
            f"The weights in {files[0].parent} do not fit the config, {len(problems)} differences:\n  "
            + "\n  ".join(problems[:_LISTED])
            + (f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""),
            remedy="Use the config that was published with this checkpoint.",
        )
    return where


def _mismatch(name: str, found: object, want: torch.Tensor | None) -> list[str]:
    shape, dtype = found.get_shape(), found.get_dtype()  # type: ignore[attr-defined]
    if want is None:
        return [f"unexpected: {name} {shape}"]
    problems = []
    if shape != list(want.shape):
        problems.append(f"shape: {name} found {shape}, expected {list(want.shape)}")
    if dtype not in _ACCEPTED[want.dtype]:
        problems.append(f"dtype: {name} found {dtype}, expected one of {', '.join(_ACCEPTED[want.dtype])}")
    return problems


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as exc:
        raise WeightsError(
            f"{file} is not a readable safetensors file: {exc}", remedy="Download it again; it may be cut off."
        ) from exc
