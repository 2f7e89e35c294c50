"""Keys and values of clean chunks: a ring, so that memory does not grow with the video."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """K and V of the last ``depth`` clean chunks, for every layer.

    Chunk c is in slot c mod depth; writing it replaces chunk c − depth.
    Memory: depth · layers · 2 · S · G · K elements, allocated at once.
    """

    def __init__(
        self, *, depth: int, layers: int, tokens: int, groups: int, head_dim: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._kv = torch.empty(depth, layers, 2, tokens, groups, head_dim, dtype=dtype, device=device)
        self._held = [[-1] * layers for _ in range(depth)]

    @property
    def depth(self) -> int:
        return self._kv.shape[0]

    def write(self, layer: int, chunk: int, k_SGK: Tensor, v_SGK: Tensor) -> None:
        slot = chunk % self.depth
        self._kv[slot, layer, 0].copy_(k_SGK)
        self._kv[slot, layer, 1].copy_(v_SGK)
        self._held[slot][layer] = chunk

    def read(self, layer: int, chunk: int) -> tuple[Tensor, Tensor]:
        """K and V [S, G, K] of ``chunk``. Raises KeyError if it was never written or has been replaced."""
        slot = chunk % self.depth
        if self._held[slot][layer] != chunk:
            raise KeyError(f"chunk {chunk} of layer {layer} is not cached; its place holds {self._held[slot][layer]}")
        return self._kv[slot, layer, 0], self._kv[slot, layer, 1]
