from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from magi_ray.forward import Forward
from magi_ray.models.dit.attention import KERNELS, plain
from magi_ray.models.dit.kv_cache import KVCache
from magi_ray.models.dit.model import DiT
from magi_ray.settings import ModelConfig

CHANNELS = 8  # of a caption
KINDS: dict[str, dict[str, Any]] = {
    "24B": {"half_channel_vae": True, "in_channels": 32, "out_channels": 32, "gated_linear_unit": True},
    "4.5B": {},
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dit(kind: str = "24B", *, attention: str = "plain", **changes: Any) -> DiT:
    config = ModelConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=48,
        num_attention_heads=8,
        num_query_groups=2,
        kv_channels=8,
        caption_channels=CHANNELS,
        caption_max_length=16,
        **({"params_dtype": "torch.float32"} | KINDS[kind] | changes),
    )
    model = DiT(config, attention=attention).requires_grad_(False)
    for i, tensor in enumerate(model.state_dict().values()):
        tensor.copy_(0.2 * randn(*tensor.shape, seed=i))
    return model


def velocity(
    model: DiT, latents: Tensor, chunks: Sequence[int], *, cache: KVCache | None = None, **changes: Any
) -> Tensor:
    first = chunks[0]
    arguments: dict[str, Any] = {
        "latents": latents,
        "t": torch.linspace(0.5, 0.1, len(chunks)),
        "captions": [randn(3 + chunk, CHANNELS, seed=chunk) for chunk in chunks],
        "dropped": False,
        "chunks": chunks,
        "positions": chunks,
        "kv_ranges": [(first, chunk + 1) for chunk in chunks],
    }
    return model(Forward(**arguments | changes), cache)


LATENTS = randn(3, 16, 6, 4, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(set(KERNELS) - {"plain"}))
def test_every_attention_kernel_agrees_with_the_plain_one(name: str, dtype: torch.dtype) -> None:
    q, k, v = (randn(n, heads, 16, seed=n).to(dtype) for n, heads in ((5, 8), (7, 2), (7, 2)))
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(KERNELS[name](q, k, v), plain(q, k, v), atol=tolerance, rtol=tolerance)


def test_plain_attention_gives_head_h_the_keys_of_its_group() -> None:
    q, k, v = randn(5, 4, 8, seed=1), randn(7, 2, 8, seed=2), randn(7, 2, 8, seed=3)
    found = plain(q, k, v)
    for head, group in ((0, 0), (1, 0), (2, 1), (3, 1)):
        weights = (q[:, head] @ k[:, group].T / 8**0.5).softmax(dim=-1)
        torch.testing.assert_close(found[:, head], weights @ v[:, group])


@pytest.mark.parametrize("kind", KINDS)
def test_a_velocity_has_the_shape_of_the_latents(kind: str) -> None:
    found = velocity(dit(kind), LATENTS, [0, 1, 2])
    assert found.shape == LATENTS.shape
    assert found.dtype == torch.float32


def test_cached_keys_stand_for_the_chunk_that_left_them() -> None:
    model = dit()
    together = velocity(model, LATENTS, [4, 5, 6])
    cache = model.new_cache(depth=2, height=4, width=8)
    for i, chunk in enumerate((4, 5)):
        t = torch.linspace(0.5, 0.1, 3)[i : i + 1]
        kv_ranges = [(4, chunk + 1)]
        alone = velocity(model, LATENTS[i : i + 1], [chunk], t=t, kv_ranges=kv_ranges, cache=cache, writes_cache=True)
        torch.testing.assert_close(alone[0], together[i])
    last = velocity(model, LATENTS[2:], [6], t=torch.tensor([0.1]), kv_ranges=[(4, 7)], cache=cache)
    torch.testing.assert_close(last[0], together[2])


def test_a_chunk_depends_on_what_its_range_holds_and_on_nothing_else() -> None:
    model, changed = dit(), LATENTS.clone()
    changed[0] += 1
    ranges = [(0, 1), (0, 2), (2, 3)]
    before, after = (velocity(model, x, [0, 1, 2], kv_ranges=ranges) for x in (LATENTS, changed))
    assert not torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2])


@pytest.mark.parametrize(
    "change",
    [{"positions": [7, 9, 8]}, {"dropped": True}, {"dt": 8.0}, {"captions": [randn(4, CHANNELS, seed=70)] * 3}],
    ids=lambda change: next(iter(change)),
)
def test_position_dropped_caption_and_step_size_all_count(change: dict[str, Any]) -> None:
    model = dit()
    assert not torch.allclose(velocity(model, LATENTS, [0, 1, 2]), velocity(model, LATENTS, [0, 1, 2], **change))


def test_positions_count_only_relative_to_each_other() -> None:
    model = dit()
    torch.testing.assert_close(
        velocity(model, LATENTS, [0, 1, 2]),
        velocity(model, LATENTS, [0, 1, 2], positions=[2, 3, 4]),
        atol=1e-4,
        rtol=1e-4,
    )


def test_in_bfloat16_the_float32_islands_stay() -> None:
    model = dit(params_dtype="torch.bfloat16")
    islands = {name for name, x in model.state_dict().items() if x.dtype == torch.float32}
    layer = "videodit_blocks.layers.0."
    assert {name.removeprefix(layer) for name in islands if name.startswith(layer)} == {
        f"{module}.{kind}"
        for module in (
            "self_attention.q_layernorm",
            "self_attention.k_layernorm",
            "self_attn_post_norm",
            "mlp_post_norm",
        )
        for kind in ("weight", "bias")
    }
    assert {name.split(".")[0] for name in islands if ".layers." not in name} == {
        "x_embedder", "rope", "t_embedder", "y_embedder", "videodit_blocks", "final_linear",
    }  # fmt: skip
    assert velocity(model, LATENTS, [0, 1, 2]).dtype == torch.float32


def test_the_cache_is_a_ring() -> None:
    cache = KVCache(depth=2, layers=1, tokens=3, groups=1, head_dim=4, dtype=torch.float32, device=torch.device("cpu"))
    for chunk in range(5):
        cache.write(0, chunk, torch.full((3, 1, 4), chunk), torch.full((3, 1, 4), -chunk))
    for chunk in (3, 4):
        k, v = cache.read(0, chunk)
        assert k.unique().tolist() == [chunk]
        assert v.unique().tolist() == [-chunk]
    with pytest.raises(KeyError, match="chunk 2 of layer 0"):
        cache.read(0, 2)
