"""Classifier-free guidance with three branches (spec §5).

v = (1 − p) · alone + (p − s) · previous + s · text, with p and s looked up by the chunk's t.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch

from magi_ray.settings import AS_THE_RUN, ChunkControl, RuntimeConfig


@dataclass(frozen=True, kw_only=True)
class BranchShares:
    """The share of each branch in a chunk's velocity; they sum to 1.

    text: sees its caption and earlier chunks.  previous: sees earlier chunks only.  alone: sees neither.
    """

    text: float
    previous: float
    alone: float


def branch_shares(t: float, runtime: RuntimeConfig, control: ChunkControl = AS_THE_RUN) -> BranchShares:
    """The shares at ``t``, a value of the float32 time grid; on an edge of cfg_t_range the upper interval counts.
    The scales of ``control`` replace the run's."""
    # Edges are rounded to float32, as t is, so that 0.1 equals 0.1.
    edges = torch.tensor(runtime.cfg_t_range, dtype=torch.float32).tolist()
    interval = max(0, bisect_right(edges, t) - 1)
    p = (control.prev_chunk_scales or runtime.prev_chunk_scales)[interval]
    s = (control.text_scales or runtime.text_scales)[interval]
    return BranchShares(text=s, previous=p - s, alone=1 - p)
