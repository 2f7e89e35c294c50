"""One layer of the DiT (spec §3, 5). Attribute names are the published state-dict names.

R chunks, S tokens of a chunk, D hidden, H heads, G groups of keys and values, K head width, N caption tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magi_ray.models.dit.attention import Kernel
from magi_ray.models.dit.kv_cache import KVCache
from magi_ray.models.dit.rope import rotate
from magi_ray.models.fp8 import Fp8Linear, Scaling
from magi_ray.settings import ModelConfig

HEAD_BLOCKS = 8


@dataclass(frozen=True, kw_only=True)
class Context:
    """What all layers of one forward share.

    condition: [R, c] (time, dropped or not).  caption: [sum of lengths, xattn width], chunk after chunk.
    sin, cos: [R, S, 3 · bands].  chunks, kv_ranges, writes_cache: as in Forward.  cache: None if it is not used.
    """

    condition: Tensor
    caption: Tensor
    caption_lengths: Sequence[int]
    sin: Tensor
    cos: Tensor
    chunks: Sequence[int]
    kv_ranges: Sequence[tuple[int, int]]
    cache: KVCache | None
    writes_cache: bool
    attend: Kernel


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose stored weight may be centred on 0 (``offset`` 1), computed in the dtype of its weight."""

    def __init__(self, width: int, config: ModelConfig, *, one_plus: bool, dtype: torch.dtype) -> None:
        super().__init__(width, eps=config.layernorm_epsilon, dtype=dtype)
        self.offset = float(one_plus and config.apply_layernorm_1p)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.offset
        return F.layer_norm(x.to(weight.dtype), self.normalized_shape, weight, self.bias, self.eps)


class Float32Linear(nn.Linear):
    """A linear layer without bias that computes in float32, whatever the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float())


class QKV(nn.Module):
    """The pre-norm and the projections from it: queries of both attentions, keys and values of self-attention."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, *, fp8: bool) -> None:
        super().__init__()
        width, q = config.hidden_size, config.num_attention_heads * config.kv_channels
        kv = config.num_query_groups * config.kv_channels
        self.layer_norm = LayerNorm(width, config, one_plus=False, dtype=dtype)
        self.q, self.qx = (_linear(width, q, dtype, fp8=fp8) for _ in range(2))
        self.k, self.v = (_linear(width, kv, dtype, fp8=fp8) for _ in range(2))

    def forward(self, x_RSD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n = self.layer_norm(x_RSD)
        return self.q(n), self.qx(n), self.k(n), self.v(n)


class Attention(nn.Module):
    """Self-attention over chunks and cross-attention to the caption, side by side from one norm."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, *, layer: int, fp8: bool) -> None:
        super().__init__()
        width, K = config.hidden_size, config.kv_channels
        q, kv = config.num_attention_heads * K, config.num_query_groups * K
        self.layer, self.head_dim = layer, K
        self.linear_qkv = QKV(config, dtype, fp8=fp8)
        xattn_width = int(width * config.xattn_cond_hidden_ratio)
        self.linear_kv_xattn = nn.Linear(xattn_width, 2 * kv, bias=False, dtype=dtype)
        self.linear_proj = (
            Fp8Linear(2 * q, width, scaling="smooth", out_dtype=torch.float32)
            if fp8
            else Float32Linear(2 * q, width, bias=False, dtype=dtype)
        )
        self.q_layernorm, self.k_layernorm = (
            LayerNorm(K, config, one_plus=True, dtype=torch.float32) for _ in range(2)
        )
        self.q_layernorm_xattn, self.k_layernorm_xattn = (
            LayerNorm(K, config, one_plus=True, dtype=dtype) for _ in range(2)
        )

    def forward(self, x_RSD: Tensor, context: Context) -> Tensor:
        """[R, S, D] in float32."""
        dtype = x_RSD.dtype
        q, qx, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.linear_qkv(x_RSD))
        q = rotate(self.q_layernorm(q), context.sin, context.cos).to(dtype)
        k = rotate(self.k_layernorm(k), context.sin, context.cos).to(dtype)
        self_attention = self._self_attention(q, k, v, context)
        cross_attention = self._cross_attention(self.q_layernorm_xattn(qx), context)
        # Interleaved in 8 blocks of heads: the order that 8 tensor-parallel training ranks left in linear_proj.
        blocks = [torch.unflatten(out.flatten(-2), -1, (HEAD_BLOCKS, -1)) for out in (self_attention, cross_attention)]
        out_RSD: Tensor = self.linear_proj(torch.stack(blocks, dim=-2).flatten(-3))
        return out_RSD

    def _self_attention(self, q_RSHK: Tensor, k_RSGK: Tensor, v_RSGK: Tensor, context: Context) -> Tensor:
        own = {chunk: (k_RSGK[i], v_RSGK[i]) for i, chunk in enumerate(context.chunks)}
        if context.writes_cache:
            assert context.cache is not None
            for chunk, (k, v) in own.items():
                context.cache.write(self.layer, chunk, k, v)
        outs = []
        for q_SHK, kv_range in zip(q_RSHK, context.kv_ranges, strict=True):
            visible = [own[c] if c in own else _cached(context, self.layer, c) for c in range(*kv_range)]
            k_TGK, v_TGK = (torch.cat(parts) for parts in zip(*visible, strict=True))
            outs.append(context.attend(q_SHK, k_TGK, v_TGK))
        return torch.stack(outs)

    def _cross_attention(self, q_RSHK: Tensor, context: Context) -> Tensor:
        kv_N_G_2K = self.linear_kv_xattn(context.caption).unflatten(-1, (-1, 2 * self.head_dim))
        k_NGK, v_NGK = kv_N_G_2K.chunk(2, dim=-1)
        lengths = list(context.caption_lengths)
        keys, values = self.k_layernorm_xattn(k_NGK).split(lengths), v_NGK.split(lengths)
        return torch.stack([context.attend(q, k, v) for q, k, v in zip(q_RSHK, keys, values, strict=True)])


def _cached(context: Context, layer: int, chunk: int) -> tuple[Tensor, Tensor]:
    assert context.cache is not None, f"chunk {chunk} is not in this forward, which has no cache"
    return context.cache.read(layer, chunk)


def _linear(width_in: int, width_out: int, dtype: torch.dtype, *, fp8: bool, scaling: Scaling = "channel") -> nn.Module:
    if fp8:
        return Fp8Linear(width_in, width_out, scaling=scaling, out_dtype=dtype)
    return nn.Linear(width_in, width_out, bias=False, dtype=dtype)


def _silu_gated(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype, *, fp8: bool) -> None:
        super().__init__()
        width, ffn = config.hidden_size, config.ffn_hidden_size
        self.layer_norm = LayerNorm(width, config, one_plus=False, dtype=dtype)
        self.linear_fc1 = _linear(width, ffn * (1 + config.gated_linear_unit), dtype, fp8=fp8)
        self.linear_fc2 = _linear(ffn, width, dtype, fp8=fp8, scaling="smooth")
        self.activation: Callable[[Tensor], Tensor] = _silu_gated if config.gated_linear_unit else F.gelu

    def forward(self, x_RSD: Tensor) -> Tensor:
        out_RSD: Tensor = self.linear_fc2(self.activation(self.linear_fc1(self.layer_norm(x_RSD))))
        return out_RSD


class AdaModulate(nn.Module):
    """Condition → two gates in −1…1, for attention and MLP."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        condition = int(config.hidden_size * config.cond_hidden_ratio)
        self.proj = nn.Sequential(nn.Linear(condition, 2 * config.hidden_size, dtype=dtype))

    def forward(self, condition_Rc: Tensor) -> tuple[Tensor, Tensor]:
        """Two of [R, 1, D] in float32."""
        gates = self.proj(F.silu(condition_Rc)).tanh().float()
        attention, mlp = gates[:, None].chunk(2, dim=-1)
        return attention, mlp


class Block(nn.Module):
    """x + norm(attention · gate), then x + norm(mlp · gate); the sums in float32."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, *, layer: int, fp8: bool) -> None:
        super().__init__()
        self.ada_modulate_layer = AdaModulate(config, dtype)
        self.self_attention = Attention(config, dtype, layer=layer, fp8=fp8)
        self.self_attn_post_norm, self.mlp_post_norm = (
            LayerNorm(config.hidden_size, config, one_plus=True, dtype=torch.float32) for _ in range(2)
        )
        self.mlp = MLP(config, dtype, fp8=fp8)

    def forward(self, x_RSD: Tensor, context: Context) -> Tensor:
        dtype = x_RSD.dtype
        attention_gate, mlp_gate = self.ada_modulate_layer(context.condition)
        out: Tensor = self.self_attention(x_RSD, context)
        x_RSD = (x_RSD.float() + self.self_attn_post_norm(out * attention_gate)).to(dtype)
        out = self.mlp(x_RSD).float()
        x_RSD = (x_RSD.float() + self.mlp_post_norm(out * mlp_gate)).to(dtype)
        return x_RSD
