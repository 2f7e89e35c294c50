"""Denoise: the stages of a video, one after the other, each committed before it counts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from torch import Tensor

from magi_ray.errors import StoreError
from magi_ray.models.dit.model import load_dit
from magi_ray.models.files import published_folder
from magi_ray.models.text.special_tokens import SpecialTokenTable, null_caption, prepend_special_tokens
from magi_ray.render.durable import commit
from magi_ray.render.latents import load_clean_chunk, load_tensor, load_window, pack
from magi_ray.render.plan import RowPlan
from magi_ray.render.progress import StepDone
from magi_ray.render.scheduler import StageCommitted
from magi_ray.sampling.noise import chunk_noise
from magi_ray.sampling.ranges import KVRanges, clean_chunks_needed
from magi_ray.sampling.sampler import Sampler, StageResult
from magi_ray.sampling.state import WindowState, chunk_shape
from magi_ray.settings import Settings
from magi_ray.storage.store import Store
from magi_ray.timeline import SPATIAL_FACTOR

COMMIT_DEADLINE_S = 900.0


class Denoiser:
    """Holds the DiT; it stays loaded from one video to the next."""

    def __init__(self, settings: Settings, store: Store) -> None:
        weights, engine, numeric = settings.weights, settings.engine, settings.numeric
        folder = published_folder(weights.dit, fp8=engine.fp8_quant, distill=engine.distill)
        self._model = load_dit(settings.model, folder, device=numeric.device, attention=numeric.attention)
        self._tokens = SpecialTokenTable.load(weights.special_tokens)
        self._store = store

    def render(self, plan: RowPlan, first_stage: int) -> Iterator[StepDone | StageCommitted]:
        """Compute and commit the stages of ``plan`` from ``first_stage`` on; the ones before it are in the store.

        Writing a stage overlaps the first forward of the next one, never more: an interruption loses at most the
        num_steps / window_size forwards that no commit covers (docs/decisions/0003).
        Raises NumericError, StoreError (ObjectMissing, ObjectDamaged: an earlier stage cannot be read).
        """
        timeline = plan.timeline
        sampler = self._sampler(plan)
        latents = load_window(self._store, plan, first_stage - 1) if first_stage else {}
        needed = clean_chunks_needed(timeline, KVRanges.of(plan.settings.runtime), first_stage)
        clean = {chunk: load_clean_chunk(self._store, plan, chunk) for chunk in needed}
        sampler.start(WindowState(stage=first_stage, latents=latents), clean)
        writing: _Writing | None = None
        for stage in range(first_stage, timeline.num_stages):
            begun = time.monotonic()
            steps = sampler.run_stage(stage)
            while True:
                try:
                    step = next(steps)
                except StopIteration as finished:
                    result: StageResult = finished.value
                    break
                yield StepDone(job_id=plan.job_id, stage=stage, step=step.step + 1, steps=step.steps)
                if writing is not None:
                    yield writing.wait()
                    writing = None
            writing = self._write(plan, result, time.monotonic() - begun)
        if writing is not None:
            yield writing.wait()

    def _write(self, plan: RowPlan, result: StageResult, seconds: float) -> _Writing:
        stage = result.state.stage - 1
        payloads = {"state": pack({str(chunk): latent for chunk, latent in result.state.latents.items()})}
        if result.clean_chunk is not None:
            payloads["chunk"] = pack({"chunk": result.clean_chunk})
        return _Writing(
            lambda: commit(self._store, "stage", plan.pre_image(stage), payloads, seconds=seconds),
            StageCommitted(job_id=plan.job_id, stage=stage, chunk=result.finished),
        )

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
        )


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


class _Writing:
    """A commit under way on a daemon thread."""

    def __init__(self, write: Callable[[], object], event: StageCommitted) -> None:
        self._event = event
        self._error: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._write, args=(write,), name="magi-ray-commit", daemon=True).start()

    def _write(self, write: Callable[[], object]) -> None:
        try:
            write()
        except BaseException as exc:  # noqa: BLE001 - raised again in wait()
            self._error = exc
        finally:
            self._done.set()

    def wait(self) -> StageCommitted:
        """The event, once the commit is in the store. Raises what writing raised, StoreError past the deadline."""
        if not self._done.wait(COMMIT_DEADLINE_S):
            raise StoreError(
                f"Stage {self._event.stage} of job {self._event.job_id} was not written in {COMMIT_DEADLINE_S:.0f} s."
            )
        if self._error is not None:
            raise self._error
        return self._event
