"""The sampler's loop, with a network that only remembers what it was asked, and with a small real one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from driven import START, Driven, Step
from torch import Tensor

from magi_ray.errors import NumericError
from magi_ray.forward import Forward
from magi_ray.models.dit.model import DiT
from magi_ray.sampling.noise import chunk_noise
from magi_ray.sampling.ranges import KVRanges, clean_chunks_needed
from magi_ray.sampling.sampler import StageResult
from magi_ray.sampling.state import WindowState
from magi_ray.settings import ChunkControl, EngineConfig, ModelConfig, RuntimeConfig
from magi_ray.timeline import Timeline

WIDTH = 8  # of a caption
H, W = 2, 4  # of the latents


@dataclass
class Remembering:
    """Stands in for the DiT: checks that what a chunk may see is there, and gives a velocity of 0, or NaN on demand."""

    calls: list[Forward[Tensor]] = field(default_factory=list)
    nan_in_call: int = -1

    def new_cache(self, *, depth: int, height: int, width: int) -> dict[int, int]:
        self.depth = depth
        return {}

    def __call__(self, forward: Forward[Tensor], cache: dict[int, int]) -> Tensor:
        latents, t, chunks = forward.latents, forward.t, forward.chunks
        assert len(latents) == len(t) == len(forward.captions) == len(chunks)
        assert len(chunks) == len(forward.positions) == len(forward.kv_ranges)
        if forward.writes_cache:
            cache.update({chunk % self.depth: chunk for chunk in chunks})
        for span in forward.kv_ranges:
            for chunk in range(*span):
                assert chunk in chunks or (forward.reads_cache and cache[chunk % self.depth] == chunk)
        self.calls.append(forward)
        velocity = torch.zeros_like(latents)
        if len(self.calls) - 1 == self.nan_in_call:
            velocity[-1, 0, 0, 0, 0] = torch.nan
        return velocity


def driven(
    network: Remembering | DiT,
    timeline: Timeline,
    *,
    num_steps: int = 8,
    engine: EngineConfig | None = None,
    controls: Mapping[int, ChunkControl] | None = None,
    captions: Callable[[int], Tensor] = lambda chunk: chunk_noise(seed=5, chunk=chunk, shape=(3 + chunk % 2, WIDTH)),
    **runtime: Any,
) -> Driven:
    prefix = None
    if timeline.prefix_latents:
        prefix = chunk_noise(seed=99, chunk=0, shape=(1, 16, timeline.prefix_latents, H, W))
    return Driven(
        network,
        height=H,
        width=W,
        timeline=timeline,
        runtime=RuntimeConfig(num_steps=num_steps, window_size=timeline.window_size, **runtime),
        engine=engine or EngineConfig(),
        captions=captions,
        null_caption=torch.zeros(2, WIDTH),
        noise=lambda chunk: chunk_noise(seed=6, chunk=chunk, shape=(1, 16, 6, H, W)),
        prefix=prefix,
        controls=controls,
    )


TIMELINES = {
    "t2v, window 4": Timeline(num_chunks=6, window_size=4),
    "t2v, window 2": Timeline(num_chunks=5, window_size=2),
    "t2v, window 1": Timeline(num_chunks=7, window_size=1),
    "t2v, shorter than its window": Timeline(num_chunks=2, window_size=4),
    "i2v": Timeline(num_chunks=3, window_size=4, prefix_latents=1),
    "v2v, part of a chunk": Timeline(num_chunks=3, window_size=4, prefix_latents=4),
    "v2v, two chunks and a frame": Timeline(num_chunks=5, window_size=4, prefix_latents=13),
    "v2v, seven chunks": Timeline(num_chunks=5, window_size=4, prefix_latents=42),
    "v2v, window 1": Timeline(num_chunks=6, window_size=1, prefix_latents=14),
}
RANGES: dict[str, dict[str, Any]] = {
    "published": {},
    "clean chunks see each other": {"clean_chunk_kvrange": 3},
    "clean as the last": {"clean_chunk_kvrange": -1},
    "growing": {"noise2clean_kvrange": (1, 2, 3, 4)},
    "themselves only": {"noise2clean_kvrange": (1, 1, 1, 1)},
    "all of history": {"noise2clean_kvrange": ()},
    "cuts": {"controls": {1: ChunkControl(kv_range=(1, 4, 3, 2)), 2: ChunkControl(kv_range=(2, 2))}},
    "one far look back": {
        "noise2clean_kvrange": (1, 1, 1, 1),
        "controls": {4: ChunkControl(kv_range=(1, 9)), 5: ChunkControl(text_scales=(3.0, 3.0, 3.0, 2.0, 0.0))},
    },
    "clean as the last of their own": {
        "clean_chunk_kvrange": -1,
        "controls": {1: ChunkControl(kv_range=(1, 1, 1, 1)), 3: ChunkControl(kv_range=(3,))},
    },
    "a cut in all of history": {"noise2clean_kvrange": (), "controls": {2: ChunkControl(kv_range=(1, 2))}},
}


def resumed(fresh: Driven, results: list[StageResult], stage: int) -> list[StageResult]:
    """Run ``fresh`` from ``stage`` on, from nothing but what an earlier run committed."""
    clean = {r.finished: r.clean_chunk for r in results if r.finished is not None}
    needed = clean_chunks_needed(fresh.sampler.timeline, fresh.sampler.ranges, stage)
    fresh.start(results[stage - 1].state if stage else START, {chunk: clean[chunk] for chunk in needed})
    return fresh.run(range(stage, fresh.sampler.timeline.num_stages))


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("kind", TIMELINES)
def test_every_chunk_that_may_be_seen_is_cached_from_whichever_stage_a_render_starts(kind: str, ranges: str) -> None:
    timeline = TIMELINES[kind]
    render = driven(Remembering(), timeline, **RANGES[ranges])
    render.start()
    results = render.run(range(timeline.num_stages))
    for stage in range(timeline.num_stages):
        resumed(driven(Remembering(), timeline, **RANGES[ranges]), results, stage)


def small_dit(*, like_24b: bool = True) -> DiT:
    config = ModelConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=64,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=8,
        caption_channels=WIDTH,
        caption_max_length=16,
        params_dtype="torch.float32",
        half_channel_vae=like_24b,
        in_channels=32 if like_24b else 16,
        out_channels=32 if like_24b else 16,
        gated_linear_unit=like_24b,
    )
    model = DiT(config, attention="sdpa").requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for tensor in model.state_dict().values():
        tensor.normal_(std=0.2, generator=generator)
    return model


@pytest.mark.parametrize(
    ("kind", "ranges"),
    [(kind, "published") for kind in TIMELINES]
    + [("t2v, window 4", ranges) for ranges in list(RANGES)[1:]]
    + [("v2v, two chunks and a frame", "one far look back")],
)
def test_a_render_resumed_at_any_stage_gives_the_same_bits(kind: str, ranges: str) -> None:
    timeline, model = TIMELINES[kind], small_dit()
    num_steps = 4 if timeline.window_size == 1 else 8
    undisturbed = driven(model, timeline, num_steps=num_steps, **RANGES[ranges])
    undisturbed.start()
    expected = undisturbed.run(range(timeline.num_stages))
    assert [r.finished for r in expected if r.finished is not None] == list(range(timeline.num_chunks))
    for stage in range(timeline.num_stages):
        found = resumed(driven(model, timeline, num_steps=num_steps, **RANGES[ranges]), expected, stage)
        for a, b in zip(found, expected[stage:], strict=True):
            assert a.state.stage == b.state.stage
            assert a.state.latents.keys() == b.state.latents.keys()
            assert all(torch.equal(a.state.latents[chunk], x) for chunk, x in b.state.latents.items())
            assert a.finished == b.finished
            assert a.clean_chunk is None or torch.equal(a.clean_chunk, b.clean_chunk)


def test_a_distilled_render_resumed_at_any_stage_gives_the_same_bits() -> None:
    timeline, model = Timeline(num_chunks=3, window_size=4), small_dit(like_24b=False)
    engine = EngineConfig(distill=True)
    undisturbed = driven(model, timeline, num_steps=12, engine=engine, cfg_number=1)
    undisturbed.start()
    expected = undisturbed.run(range(timeline.num_stages))
    for stage in range(timeline.num_stages):
        fresh = driven(model, timeline, num_steps=12, engine=engine, cfg_number=1)
        found = resumed(fresh, expected, stage)
        assert all(
            torch.equal(a.clean_chunk, b.clean_chunk)
            for a, b in zip(found, expected[stage:], strict=True)
            if b.clean_chunk is not None
        )


def test_the_first_chunks_do_not_depend_on_how_long_the_video_is() -> None:
    model = small_dit()
    clean = []
    for num_chunks in (5, 7):
        render = driven(model, Timeline(num_chunks=num_chunks, window_size=4))
        render.start()
        clean.append(render.run(range(5))[-1].clean_chunk)
    assert torch.equal(*clean)


def test_branches_of_weight_zero_are_not_computed() -> None:
    model = Remembering()
    render = driven(model, Timeline(num_chunks=2, window_size=4), num_steps=16)
    render.start()
    render.run(range(5))
    # Stage 0: chunk 0 alone. Text, previous chunks, alone.
    first_step = model.calls[:3]
    assert [(call.dropped, len(call.chunks)) for call in first_step] == [(False, 1), (True, 1), (True, 1)]
    # Stage 3: chunk 0 is beyond t = 0.3, chunk 1 is not, and still attends to chunk 0 in the text branch.
    in_stage_3 = model.calls[-12 - 5 : -5]
    assert [(call.dropped, call.chunks) for call in in_stage_3[:3]] == [(False, [0, 1]), (True, [0, 1]), (True, [1])]
    # Stage 4: chunk 0's clean pass, then chunk 1 beyond t = 0.3 with previous chunks only.
    assert [(call.dropped, call.chunks, call.writes_cache) for call in model.calls[-5:]] == [
        (True, [0], True),
        *[(True, [1], False)] * 4,
    ]


def test_the_text_branch_sends_the_clean_chunk_with_its_own_embedding_and_the_other_one_stays() -> None:
    model = Remembering()
    render = driven(model, Timeline(num_chunks=6, window_size=4))
    render.start()
    render.run(range(4))
    done = len(model.calls)
    render.run_stage(4)
    assert [(call.dropped, call.writes_cache) for call in model.calls[done : done + 5]] == [
        (False, True),
        (False, False),
        (True, True),
        (True, False),
        (True, False),
    ]
    assert [call.reads_cache for call in model.calls[done : done + 5]] == [True] * 4 + [False]
    assert [len(step.forwards) for step in render.steps[-2:]] == [5, 3]


def test_a_chunk_without_caption_reads_the_null_caption() -> None:
    model = Remembering()
    render = driven(model, Timeline(num_chunks=1, window_size=1), captions=lambda chunk: torch.zeros(0, WIDTH))
    render.start()
    render.run(range(1))
    assert model.calls[0].captions[0] is render.sampler.null_caption


def test_the_clean_chunk_after_a_video_prefix_holds_the_prefix_and_after_an_image_does_not() -> None:
    for latents, holds in ((4, True), (1, False)):
        timeline = Timeline(num_chunks=1, window_size=1, prefix_latents=latents)
        render = driven(small_dit(), timeline, num_steps=4)
        render.start()
        chunk = render.run(range(1))[0].clean_chunk
        assert torch.equal(chunk[:, :, :latents], render.sampler.prefix) is holds


def test_a_velocity_that_is_not_finite_names_chunk_stage_and_step() -> None:
    # Stages 0 has 2 steps of 3 forwards; the second forward of stage 1's second step is call 10.
    render = driven(Remembering(nan_in_call=10), Timeline(num_chunks=4, window_size=4, prefix_latents=0))
    render.start()
    with pytest.raises(NumericError, match=r"chunk 1 in stage 1, step 1"):
        render.run(range(2))


def test_start_refuses_a_state_that_is_not_the_window_of_its_stage() -> None:
    render = driven(Remembering(), Timeline(num_chunks=6, window_size=4))
    with pytest.raises(AssertionError):
        render.start(WindowState(stage=3, latents={}), {})


def test_ranges_come_from_the_published_fields() -> None:
    render = driven(Remembering(), Timeline(num_chunks=6, window_size=4))
    assert render.sampler.ranges == KVRanges(noise2clean=(5, 4, 3, 2), clean=1, num_steps=8)


def test_a_cut_hides_the_chunks_before_it_in_its_steps_and_in_no_others() -> None:
    # With two layers and no cache a chunk's velocity tells whether it saw what differs in the chunk before it.
    model, timeline = small_dit(), Timeline(num_chunks=3, window_size=4)
    heard: dict[str, list[Step]] = {}
    for name in ("as it was", "another chunk 1"):
        render = driven(model, timeline, controls={2: ChunkControl(kv_range=(1, 4, 3, 2))})
        render.start()
        render.run(range(2))
        if name == "another chunk 1":
            render.sampler.latents[1] = render.sampler.latents[1] + 1
        render.run(range(2, 4))
        heard[name] = render.steps
    one, other = heard.values()
    for a, b in zip(one[4:], other[4:], strict=True):
        age = a.stage - 2  # stage 2 is the first quarter of chunk 2
        assert a.window.kv_ranges[-1] == ((2, 3) if age == 0 else (0, 3))
        if age == 0:
            assert torch.equal(a.velocity[-1], b.velocity[-1])
        if age == 1:
            assert not torch.equal(a.velocity[-1], b.velocity[-1])
        assert not torch.equal(a.velocity[-2], b.velocity[-2])


def test_guidance_scales_of_one_chunk_leave_its_neighbours_alone() -> None:
    velocities = []
    for controls in ({}, {1: ChunkControl(text_scales=(0.0,) * 5, prev_chunk_scales=(1.0,) * 5)}):
        render = driven(small_dit(), Timeline(num_chunks=2, window_size=4), controls=controls)
        render.start()
        render.run(range(2))
        velocities.append(render.steps[2].velocity)
    torch.testing.assert_close(velocities[0][0], velocities[1][0])
    assert not torch.allclose(velocities[0][1], velocities[1][1], rtol=0.1)
