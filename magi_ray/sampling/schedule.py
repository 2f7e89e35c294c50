"""Where a chunk stands between noise (t = 0) and clean (t = 1) after each of its steps (spec §5)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ShortcutMode = Literal["8,16,16", "16,16,8"]

# A 12-step grid keeps three of the four points in each quarter of the 16-step grid.
_KEPT: dict[ShortcutMode, tuple[int, int, int]] = {"8,16,16": (0, 2, 3), "16,16,8": (0, 1, 2)}
# How many 16-step points each of those three steps covers.
_INTERVALS: dict[ShortcutMode, tuple[int, int, int]] = {"8,16,16": (2, 1, 1), "16,16,8": (1, 1, 2)}


def time_grid(num_steps: int, *, shortcut_mode: ShortcutMode = "8,16,16") -> Tensor:
    """[num_steps + 1] float32 from 0 to 1.0000001: t before each step, and after the last.

    shortcut_mode counts for 12 steps only.
    """
    if num_steps == 12:
        kept = [4 * quarter + point for quarter in range(4) for point in _KEPT[shortcut_mode]]
        return time_grid(16)[[*kept, 16]]
    # A square, shifted by 3. In float32 and in this order: other orders round differently.
    x = torch.linspace(0, 1, num_steps + 1, dtype=torch.float32) ** 2
    inverse = 1 / 3.0
    return (inverse * x) / (1 + (inverse - 1) * x)


def intervals(num_steps: int, *, shortcut_mode: ShortcutMode = "8,16,16") -> tuple[int, ...]:
    """How many points of the base grid each step covers: 1, or for 12 steps a pattern of 1 and 2."""
    return _INTERVALS[shortcut_mode] * 4 if num_steps == 12 else (1,) * num_steps


def distilled_dt(num_steps: int, stage_step: int, *, shortcut_mode: ShortcutMode = "8,16,16") -> float:
    """What a distilled model is told about the step size (spec §3, 3). stage_step: from 0 in each stage."""
    if num_steps == 12:
        return 2 * 4 / intervals(num_steps, shortcut_mode=shortcut_mode)[stage_step]
    return 2 * num_steps / 4
