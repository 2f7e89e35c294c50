"""TEMPORARY until the sampler's part is merged."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from magi_ray.models.dit.model import load_dit
from magi_ray.models.files import published_folder
from magi_ray.models.text.special_tokens import SpecialTokenTable, null_caption, prepend_special_tokens
from magi_ray.render.artifacts.latents import load_clean_chunk, load_tensor, load_window, pack, telling_out_of_memory
from magi_ray.render.tasks.denoise import Denoiser
from magi_ray.sampling.noise import chunk_noise
from magi_ray.sampling.ranges import clean_chunks_needed
from magi_ray.sampling.sampler import Sampler
from magi_ray.sampling.state import WindowState, chunk_shape
from magi_ray.timeline import SPATIAL_FACTOR


def load_denoiser(settings, store, *, system):
    return Denoiser(store, _Network(settings, store), system=system)


class _Network:
    def __init__(self, settings, store):
        weights, engine, numeric = settings.weights, settings.engine, settings.numeric
        folder = published_folder(weights.dit, fp8=engine.fp8_quant, distill=engine.distill)
        self._model = load_dit(
            settings.model, folder, device=numeric.device, attention=numeric.attention, fp8=engine.fp8_quant
        )
        self._tokens = SpecialTokenTable.load(weights.special_tokens)
        self._store = store

    def begin(self, plan, first_stage):
        sampler = self._sampler(plan)
        latents = load_window(self._store, plan, first_stage - 1) if first_stage else {}
        needed = clean_chunks_needed(plan.timeline, sampler.ranges, first_stage)
        clean = {chunk: load_clean_chunk(self._store, plan, chunk) for chunk in needed}
        sampler.start(WindowState(stage=first_stage, latents=latents), clean)
        return _Stages(sampler, plan)

    def _sampler(self, plan: RowPlan) -> Sampler:
        runtime = plan.settings.runtime
        height, width = runtime.video_size_h, runtime.video_size_w
        shape = chunk_shape(height=height, width=width)
        prefix = None
        if plan.prefix_digest is not None:
            prefix = load_tensor(self._store, "prefix", plan.prefix_digest)
        return Sampler(
            model=self._model,
            timeline=plan.timeline,
            runtime=runtime,
            engine=plan.settings.engine,
            captions=_Captions(self._store, plan, self._tokens),
            null_caption=null_caption(
                self._model.y_embedder.null_caption_embedding,
                self._tokens,
                negative_prompt=plan.settings.negative_prompt,
            ),
            noise=lambda chunk: chunk_noise(seed=runtime.seed, chunk=chunk, shape=shape),
            height=height // SPATIAL_FACTOR,
            width=width // SPATIAL_FACTOR,
            prefix=prefix,
            controls=plan.controls,
        )


class _Stages:
    def __init__(self, sampler, plan):
        self.sampler, self.plan = sampler, plan

    def run(self, stage):
        steps = self.sampler.run_stage(stage)
        while True:
            try:
                with telling_out_of_memory(f"Stage {stage} of job {self.plan.job_id}"):
                    next(steps)
            except StopIteration as finished:
                return partial(_payloads, finished.value)
            yield


def _payloads(result):
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
