"""The DiT under the sampler, on one device, for the denoise task."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from functools import partial

from torch import Tensor

from magi_ray.models.dit.model import DiT, load_dit
from magi_ray.models.files import published_folder
from magi_ray.models.text.special_tokens import SpecialTokenTable, null_caption, prepend_special_tokens
from magi_ray.render.artifacts.latents import convert_out_of_memory, load_clean_chunk, load_tensor, load_window, pack
from magi_ray.render.artifacts.provenance import device_name
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.tasks.denoise import Denoiser, Pack, RunStage
from magi_ray.sampling.noise import chunk_noise
from magi_ray.sampling.ranges import clean_chunks_needed
from magi_ray.sampling.sampler import Sampler, StageResult, drive
from magi_ray.sampling.state import WindowState, chunk_shape
from magi_ray.settings import Settings
from magi_ray.storage.store import Store
from magi_ray.timeline import SPATIAL_FACTOR


def load_denoiser(settings: Settings, store: Store, *, run_id: str = "") -> Denoiser:
    """A Denoiser with the DiT of ``settings``. Raises WeightsError."""
    return denoiser(settings, store, *load_networks(settings), run_id=run_id)


def load_networks(settings: Settings) -> tuple[DiT, SpecialTokenTable]:
    """What a Denoiser computes with. Raises WeightsError."""
    weights, engine, numeric = settings.weights, settings.engine, settings.numeric
    folder = published_folder(weights.dit, fp8=engine.fp8_quant, distill=engine.distill)
    dit = load_dit(settings.model, folder, device=numeric.device, attention=numeric.attention, fp8=engine.fp8_quant)
    return dit, SpecialTokenTable.load(weights.special_tokens)


def denoiser(settings: Settings, store: Store, dit: DiT, tokens: SpecialTokenTable, *, run_id: str = "") -> Denoiser:
    """A Denoiser of videos in ``store``."""
    device = device_name(settings.numeric.device)
    return Denoiser(store, partial(_begin_video, store, dit, tokens), run_id=run_id, device=device)


def _begin_video(store: Store, dit: DiT, tokens: SpecialTokenTable, plan: RowPlan, first_stage: int) -> RunStage:
    sampler = _sampler(store, dit, tokens, plan)
    latents = load_window(store, plan, first_stage - 1) if first_stage else {}
    needed = clean_chunks_needed(plan.timeline, sampler.ranges, first_stage)
    clean = {chunk: load_clean_chunk(store, plan, chunk) for chunk in needed}
    runtime = plan.settings.runtime
    height, width = runtime.video_size_h // SPATIAL_FACTOR, runtime.video_size_w // SPATIAL_FACTOR
    with convert_out_of_memory(f"Stage {first_stage} of job {plan.job_id}"):
        compute = partial(dit, cache=dit.new_cache(depth=sampler.cache_depth, height=height, width=width))
        for forward in sampler.start(WindowState(stage=first_stage, latents=latents), clean):
            compute(forward)

    def run_stage(stage: int) -> Generator[None, None, Pack]:
        steps = drive(sampler.run_stage(stage), compute)
        while True:
            try:
                with convert_out_of_memory(f"Stage {stage} of job {plan.job_id}"):
                    next(steps)
            except StopIteration as end:
                return partial(_pack, end.value)
            yield

    return run_stage


def _sampler(store: Store, dit: DiT, tokens: SpecialTokenTable, plan: RowPlan) -> Sampler:
    settings, runtime = plan.settings, plan.settings.runtime
    shape = chunk_shape(height=runtime.video_size_h, width=runtime.video_size_w)
    null = dit.y_embedder.null_caption_embedding
    return Sampler(
        timeline=plan.timeline,
        runtime=runtime,
        engine=settings.engine,
        captions=_Captions(store, plan, tokens),
        null_caption=null_caption(null, tokens, negative_prompt=settings.negative_prompt),
        noise=lambda chunk: chunk_noise(seed=runtime.seed, chunk=chunk, shape=shape),
        prefix=None if plan.prefix_digest is None else load_tensor(store, "prefix", plan.prefix_digest),
        controls=plan.controls,
        device=dit.device,
    )


def _pack(result: StageResult) -> Mapping[str, bytes]:
    payloads = {"state": pack({str(chunk): latent for chunk, latent in result.state.latents.items()})}
    if result.clean_chunk is not None:
        payloads["chunk"] = pack({"chunk": result.clean_chunk})
    return payloads


class _Captions:
    """Chunk → its caption with special tokens. Keeps those of one window: memory must not grow with the schedule."""

    def __init__(self, store: Store, plan: RowPlan, tokens: SpecialTokenTable) -> None:
        self._store, self._plan, self._tokens = store, plan, tokens
        self._kept: dict[int, Tensor] = {}

    def __call__(self, chunk: int) -> Tensor:
        if chunk not in self._kept:
            plan = self._plan
            self._kept[chunk] = prepend_special_tokens(
                load_tensor(self._store, "text", plan.caption_digests[chunk]),
                self._tokens,
                chosen=plan.settings.special_tokens,
                duration_index=plan.timeline.duration_index(chunk),
                max_length=plan.settings.model.caption_max_length,
            )
            self._kept.pop(chunk - plan.timeline.window_size, None)
        return self._kept[chunk]
