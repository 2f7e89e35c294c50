"""Denoise: the stages of a video, one after the other, each committed before it counts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from queue import Empty, SimpleQueue

from torch import Tensor

from magi_ray.errors import StoreError
from magi_ray.events import StageCommitted, StepDone
from magi_ray.models.dit.model import load_dit
from magi_ray.models.files import published_folder
from magi_ray.models.text.special_tokens import SpecialTokenTable, null_caption, prepend_special_tokens
from magi_ray.render.artifacts.commits import commit
from magi_ray.render.artifacts.latents import convert_out_of_memory, load_clean_chunk, load_tensor, load_window, pack
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.sampling.noise import chunk_noise
from magi_ray.sampling.ranges import clean_chunks_needed
from magi_ray.sampling.sampler import Sampler, StageResult
from magi_ray.sampling.state import WindowState, chunk_shape
from magi_ray.settings import Settings
from magi_ray.storage.records import verified_commit
from magi_ray.storage.store import Store
from magi_ray.timeline import SPATIAL_FACTOR

COMMIT_DEADLINE_S = 900.0


class Denoiser:
    """Holds the DiT; it stays loaded from one video to the next."""

    def __init__(self, settings: Settings, store: Store) -> None:
        weights, engine, numeric = settings.weights, settings.engine, settings.numeric
        folder = published_folder(weights.dit, fp8=engine.fp8_quant, distill=engine.distill)
        self._model = load_dit(
            settings.model, folder, device=numeric.device, attention=numeric.attention, fp8=engine.fp8_quant
        )
        self._tokens = SpecialTokenTable.load(weights.special_tokens)
        self._store = store

    def render(self, plan: RowPlan, first_stage: int) -> Iterator[StepDone | StageCommitted]:
        """Compute and commit the stages of ``plan`` from ``first_stage`` on; the ones before it are in the store.

        A later stage that is there already (the one before it was damaged, or another run renders the same video) is
        reported, not computed.
        Writing a stage overlaps the first forward of the next one, never more: an interruption loses at most the
        num_steps / window_size forwards that no commit covers (docs/decisions/0003).
        Raises NumericError, StoreError (ObjectMissing, ObjectDamaged: an earlier stage cannot be read).
        """
        stage = first_stage
        while stage < plan.timeline.num_stages:
            if self._is_there(plan, stage):
                yield _committed(plan, stage)
                stage += 1
            else:
                stage = yield from self._render_span(plan, stage)

    def _is_there(self, plan: RowPlan, stage: int) -> bool:
        return verified_commit(self._store, "stage", plan.stage_keys[stage]) is not None

    def _render_span(self, plan: RowPlan, first_stage: int) -> Generator[StepDone | StageCommitted, None, int]:
        """Compute stages up to one that is there already; returns its number, or that of all stages."""
        timeline = plan.timeline
        sampler = self._sampler(plan)
        latents = load_window(self._store, plan, first_stage - 1) if first_stage else {}
        needed = clean_chunks_needed(timeline, sampler.ranges, first_stage)
        clean = {chunk: load_clean_chunk(self._store, plan, chunk) for chunk in needed}
        sampler.start(WindowState(stage=first_stage, latents=latents), clean)
        writer = _Writer()
        try:
            for stage in range(first_stage, timeline.num_stages):
                if stage > first_stage and self._is_there(plan, stage):
                    yield from writer.finish()
                    return stage
                begun = time.monotonic()
                steps = sampler.run_stage(stage)
                while True:
                    try:
                        with convert_out_of_memory(f"Stage {stage} of job {plan.job_id}"):
                            step = next(steps)
                    except StopIteration as finished:
                        result: StageResult = finished.value
                        break
                    yield StepDone(job_id=plan.job_id, stage=stage, step=step.step + 1, steps=step.steps)
                    yield from writer.finish()
                seconds = time.monotonic() - begun
                writer.start(partial(self._commit, plan, result, seconds), _committed(plan, stage))
            yield from writer.finish()
        finally:
            writer.close()
        return timeline.num_stages

    def _commit(self, plan: RowPlan, result: StageResult, seconds: float) -> None:
        payloads = {"state": pack({str(chunk): latent for chunk, latent in result.state.latents.items()})}
        if result.clean_chunk is not None:
            payloads["chunk"] = pack({"chunk": result.clean_chunk})
        commit(self._store, "stage", plan.pre_image(result.state.stage - 1), payloads, seconds=seconds)

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


def _committed(plan: RowPlan, stage: int) -> StageCommitted:
    return StageCommitted(job_id=plan.job_id, stage=stage, chunk=plan.timeline.finished(stage))


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


class _Writer:
    """Writes one commit at a time on a daemon thread; the thread is one for all stages of a video."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._event: StageCommitted | None = None
        threading.Thread(target=self._work, name="magi-ray-commit", daemon=True).start()

    def start(self, write: Callable[[], object], event: StageCommitted) -> None:
        """Begin to write; ``event`` is what ``finish`` reports. Only after the write before was finished."""
        assert self._event is None
        self._event = event
        self._waiting.put(write)

    def finish(self) -> Iterator[StageCommitted]:
        """The event of the write under way, if any, once it is in the store. Raises what writing raised."""
        if self._event is None:
            return
        event, self._event = self._event, None
        try:
            error = self._done.get(timeout=COMMIT_DEADLINE_S)
        except Empty:
            raise StoreError(
                f"Stage {event.stage} of job {event.job_id} was not written in {COMMIT_DEADLINE_S:.0f} s."
            ) from None
        if error is not None:
            raise error
        yield event

    def close(self) -> None:
        """Let the thread end once it has written what it was given."""
        self._waiting.put(None)

    def _work(self) -> None:
        while (write := self._waiting.get()) is not None:
            try:
                write()
            except BaseException as exc:  # noqa: BLE001 - raised again in finish()
                self._done.put(exc)
            else:
                self._done.put(None)
