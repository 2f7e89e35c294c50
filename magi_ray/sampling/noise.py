"""The noise a chunk starts from: a pure function of (seed, chunk), the same in a video of any length, on any machine.

It is numpy's Philox, not torch's CPU generator, which uses only 32 bits of its seed and whose normals differ in the
last bit between processors with and without AVX2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

NOISE_LAW = "magi-ray/noise/v1"


def chunk_noise(*, seed: int, chunk: int, shape: Sequence[int]) -> Tensor:
    """N(0, 1) of ``shape``, float32, on the CPU. chunk: numbered from 0 among the denoised ones."""
    key = hashlib.sha256(f"{NOISE_LAW}:{seed}:{chunk}".encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))
