"""One call of the network, as a value. The sampler makes it; whoever drives the sampler's generator computes it,
in a render ``render/tasks/denoise_network.py``.

It lies beside errors and events because sampling and models may not import each other, and is generic in its tensors
because nothing there imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

TensorT = TypeVar("TensorT")


@dataclass(frozen=True, kw_only=True, eq=False)
class Forward(Generic[TensorT]):
    """R chunks whose velocity is wanted, and everything the network needs to compute it.

    latents: [R, 16, 6, h, w] float32.
    t: [R] float32 in 0 (noise) … 1 (clean).
    captions: R of [n ≥ 1, caption_channels], special tokens included.
    chunks: their absolute numbers, the keys of the cache.
    positions: for RoPE, in chunks from the start of the video.
    kv_ranges: the absolute chunks [first, end) that each sees: those of this forward, the rest from the cache.
    dropped: AdaLN is told that there is no caption.
    dt: the step size that a distilled model is told, None for others.
    reads_cache: false where the cache must not be used; ``chunks`` are then arbitrary numbers.
    writes_cache: the keys and values of these chunks are put into the cache, in place of earlier ones.
    """

    latents: TensorT
    t: TensorT
    captions: Sequence[TensorT]
    chunks: Sequence[int]
    positions: Sequence[int]
    kv_ranges: Sequence[tuple[int, int]]
    dropped: bool
    dt: float | None = None
    reads_cache: bool = True
    writes_cache: bool = False
