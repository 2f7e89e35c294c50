"""The network that denoising computes with: the DiT under the sampler, on one device."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from functools import partial

from torch import Tensor

from magi_ray.forward import Forward
from magi_ray.models.dit.model import DiT, load_dit
from magi_ray.models.files import published_folder
from magi_ray.models.text.special_tokens import SpecialTokenTable, null_caption, prepend_special_tokens
from magi_ray.render.artifacts.latents import convert_out_of_memory, load_clean_chunk, load_tensor, load_window, pack
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.tasks.denoise import Denoiser, Pack
from magi_ray.sampling.noise import chunk_noise
from magi_ray.sampling.ranges import clean_chunks_needed
from magi_ray.sampling.sampler import Sampler, StageResult, drive
from magi_ray.sampling.state import WindowState, chunk_shape
from magi_ray.settings import Settings
from magi_ray.storage.store import Store
from magi_ray.system import System
from magi_ray.timeline import SPATIAL_FACTOR


def load_denoiser(settings: Settings, store: Store, *, system: System = System()) -> Denoiser:
    """A Denoiser with the DiT of ``settings``. Raises WeightsError."""
    weights, engine, numeric = settings.weights, settings.engine, settings.numeric
    folder = published_folder(weights.dit, fp8=engine.fp8_quant, distill=engine.distill)
    dit = load_dit(settings.model, folder, device=numeric.device, attention=numeric.attention, fp8=engine.fp8_quant)
    network = DiTNetwork(dit, SpecialTokenTable.load(weights.special_tokens), store)
    return Denoiser(store, network, system=system)


class DiTNetwork:
    """A ``DenoiseNetwork``. The cache is made anew for each video."""

    def __init__(self, dit: DiT, tokens: SpecialTokenTable, store: Store) -> None:
        self._dit, self._tokens, self._store = dit, tokens, store

    def begin(self, plan: RowPlan, first_stage: int) -> SampledStages:
        """As ``DenoiseNetwork.begin``."""
        sampler = self._sampler(plan)
        latents = load_window(self._store, plan, first_stage - 1) if first_stage else {}
        needed = clean_chunks_needed(plan.timeline, sampler.ranges, first_stage)
        clean = {chunk: load_clean_chunk(self._store, plan, chunk) for chunk in needed}
        runtime = plan.settings.runtime
        with convert_out_of_memory(f"Stage {first_stage} of job {plan.job_id}"):
            cache = self._dit.new_cache(
                depth=sampler.cache_depth,
                height=runtime.video_size_h // SPATIAL_FACTOR,
                width=runtime.video_size_w // SPATIAL_FACTOR,
            )
            compute = partial(self._dit, cache=cache)
            for forward in sampler.start(WindowState(stage=first_stage, latents=latents), clean):
                compute(forward)
        return SampledStages(plan, sampler, compute)

    def _sampler(self, plan: RowPlan) -> Sampler:
        runtime = plan.settings.runtime
        shape = chunk_shape(height=runtime.video_size_h, width=runtime.video_size_w)
        prefix = None
        if plan.prefix_digest is not None:
            prefix = load_tensor(self._store, "prefix", plan.prefix_digest)
        return Sampler(
            timeline=plan.timeline,
            runtime=runtime,
            engine=plan.settings.engine,
            captions=_Captions(self._store, plan, self._tokens),
            null_caption=null_caption(
                self._dit.y_embedder.null_caption_embedding,
                self._tokens,
                negative_prompt=plan.settings.negative_prompt,
            ),
            noise=lambda chunk: chunk_noise(seed=runtime.seed, chunk=chunk, shape=shape),
            prefix=prefix,
            controls=plan.controls,
            device=self._dit.device,
        )


class SampledStages:
    """A ``VideoStages``. compute: gives the velocity of a Forward, and keeps the cache."""

    def __init__(self, plan: RowPlan, sampler: Sampler, compute: Callable[[Forward[Tensor]], Tensor]) -> None:
        self._plan, self._sampler, self._compute = plan, sampler, compute

    def run(self, stage: int) -> Generator[None, None, Pack]:
        """As ``VideoStages.run``."""
        steps = drive(self._sampler.run_stage(stage), self._compute)
        while True:
            try:
                with convert_out_of_memory(f"Stage {stage} of job {self._plan.job_id}"):
                    next(steps)
            except StopIteration as end:
                return partial(_pack, end.value)
            yield


def _pack(result: StageResult) -> Mapping[str, bytes]:
    payloads = {"state": pack({str(chunk): latent for chunk, latent in result.state.latents.items()})}
    if result.clean_chunk is not None:
        payloads["chunk"] = pack({"chunk": result.clean_chunk})
    return payloads


class _Captions:
    """Chunk → its caption with special tokens. Keeps a window's worth: memory must not grow with the schedule."""

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
