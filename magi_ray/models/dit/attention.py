"""Attention kernels with one signature. ``plain`` is the specification; a test compares the others with it."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

# (q_SHK, k_TGK, v_TGK) -> [S, H, K] in their dtype, scores and sums in float32. Every query sees every key; head h
# reads group h // (H / G).
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(q_SHK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
    S, H, K = q_SHK.shape
    G = k_TGK.shape[1]
    q_SGqK = q_SHK.float().reshape(S, G, H // G, K)
    weights = (torch.einsum("sgqk,tgk->gqst", q_SGqK, k_TGK.float()) / sqrt(K)).softmax(dim=-1)
    return torch.einsum("gqst,tgk->sgqk", weights, v_TGK.float()).reshape(S, H, K).to(q_SHK.dtype)


def sdpa(q_SHK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_SHK, k_TGK, v_TGK))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).squeeze(0).transpose(0, 1)


KERNELS: dict[str, Kernel] = {"plain": plain, "sdpa": sdpa}
