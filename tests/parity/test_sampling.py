"""The DiT and the sampler give the latents that the published reference gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from driven import Driven, Step
from torch import Tensor

from magi_ray.forward import Forward
from magi_ray.models.dit.model import DiT
from magi_ray.models.text.special_tokens import SpecialTokenTable, null_caption, prepend_special_tokens
from magi_ray.models.weights import load_into
from magi_ray.settings import EngineConfig, ModelConfig, RuntimeConfig, SpecialTokens
from magi_ray.timeline import LATENTS_PER_CHUNK, Timeline

if TYPE_CHECKING:
    from conftest import Case


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
def test_a_render_equals_the_reference(sampling_case: Case, attention: str) -> None:
    case = sampling_case
    tensors = case.tensors
    chunks, render = run(case, tensors, attention)

    assert len(render.steps) == case.facts["forward_steps"]
    timesteps, kv_ranges = what_the_reference_saw(render)
    tokens = render.network.tokens_per_chunk(*tensors["noise"].shape[3:])
    in_tokens = [[[first * tokens, end * tokens] for first, end in ranges] for ranges in kv_ranges]
    assert in_tokens == case.facts["kv_ranges"]
    for found, expected in zip(timesteps, case.facts["timesteps"], strict=True):
        assert found == pytest.approx(expected, abs=1e-6)
    assert bool(render.first) == (case.facts["prefix_T"] >= LATENTS_PER_CHUNK)

    assert set(chunks) == set(case.facts["chunk_ids"])
    errors, allowed = errors_of(case, tensors, chunks, render.steps), case.tolerance
    if max(errors.values()) > allowed and case.facts["config"]["model_config"]["params_dtype"] == "torch.bfloat16":
        # How bfloat16 is rounded differs between processors, and the sampler makes more of it. No render in it can
        # be asked to come nearer to the reference's than exact arithmetic does.
        exact_chunks, exact = run(case, tensors, attention, params_dtype="torch.float32")
        allowed = max(allowed, 1.5 * max(errors_of(case, tensors, exact_chunks, exact.steps).values()))
    assert max(errors.values()) <= allowed, errors


def what_the_reference_saw(render: Driven) -> tuple[list[list[float]], list[list[tuple[int, int]]]]:
    """Timesteps and ranges, in chunks: of the pass over a video prefix, then of every step. The clean chunk stands
    first where one is sent through; a chunk that a distilled model sends through twice is there once."""
    passes: list[list[tuple[float, tuple[int, int]]]] = []
    if render.first:
        passes.append([pair for forward in render.first for pair in _pairs(forward)])
    for step in render.steps:
        clean = [_pairs(forward) for forward in step.forwards if forward.writes_cache]
        passes.append([*(clean[0] if clean else []), *_pairs(step.window)[: len(step.velocity)]])
    return [[t for t, _ in pairs] for pairs in passes], [[span for _, span in pairs] for pairs in passes]


def _pairs(forward: Forward[Tensor]) -> list[tuple[float, tuple[int, int]]]:
    return list(zip(forward.t.tolist(), forward.kv_ranges, strict=True))


def errors_of(case: Case, tensors: dict[str, Tensor], chunks: dict[int, Tensor], steps: list[Step]) -> dict[str, float]:
    """The relative error of everything the case holds, by name."""
    errors = {}
    for name, expected in tensors.items():
        if name.startswith("velocity_step_"):
            velocity = torch.cat(list(steps[int(name.removeprefix("velocity_step_"))].velocity), dim=1)[None]
            # The reference's has the clean chunk in front where one was sent through; it is of no consequence.
            errors[name] = case.relative_error(velocity, expected[:, :, -velocity.shape[2] :])
        elif name.startswith("chunk_"):
            errors[name] = case.relative_error(chunks[int(name.removeprefix("chunk_"))], expected)
    return errors


def run(case: Case, tensors: dict[str, Tensor], attention: str, **changes: str) -> tuple[dict[int, Tensor], Driven]:
    """The emitted chunks (without frames of a video prefix), and every step. ``changes``: to the model's config."""
    facts, config = case.facts, case.facts["config"]
    model_config = ModelConfig(**config["model_config"] | changes)
    runtime = RuntimeConfig(**config["runtime_config"])
    engine = EngineConfig(**config["engine_config"])
    with torch.device("meta"):
        model = DiT(model_config, attention=attention, fp8=engine.fp8_quant)
    load_into(model, [case.folder / facts["weights"]])

    offset = facts["prefix_T"] // LATENTS_PER_CHUNK
    timeline = Timeline(
        num_chunks=facts["num_chunks"] - offset, window_size=runtime.window_size, prefix_latents=facts["prefix_T"]
    )
    tokens = SpecialTokenTable.load(case.folder / "special_tokens.npz")
    chosen = SpecialTokens(
        **{f: f"{f.upper()}_TOKEN" in facts["special_token_keys"] for f in SpecialTokens.model_fields}
    )

    def caption(chunk: int) -> Tensor:
        number = facts["schedule"][chunk] if facts["schedule"] else 0
        return prepend_special_tokens(
            tensors[f"caption_{number}"],
            tokens,
            chosen=chosen,
            duration_index=timeline.duration_index(chunk),
            max_length=model_config.caption_max_length,
        )

    def noise(chunk: int) -> Tensor:
        start = (offset + chunk) * LATENTS_PER_CHUNK
        return tensors["noise"][:, :, start : start + LATENTS_PER_CHUNK]

    render = Driven(
        model,
        height=tensors["noise"].shape[3],
        width=tensors["noise"].shape[4],
        timeline=timeline,
        runtime=runtime,
        engine=engine,
        captions=caption,
        null_caption=null_caption(model.y_embedder.null_caption_embedding, tokens, negative_prompt=False),
        noise=noise,
        prefix=tensors.get("prefix_latent"),
    )
    render.start()
    results = render.run(range(timeline.num_stages))
    chunks = {result.finished: result.clean_chunk for result in results if result.clean_chunk is not None}
    chunks[0] = chunks[0][:, :, timeline.dropped_frames // 4 :]
    return chunks, render
