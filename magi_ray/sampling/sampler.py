"""The loop that turns noise into chunks: one visible sampler (spec §5).

Every stage begins by sending the chunk that just became clean through the model, so that its keys and values are
cached; then each forward advances every chunk of the window by its own step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from magi_ray.errors import NumericError
from magi_ray.sampling.guidance import branch_weights
from magi_ray.sampling.ranges import KVRanges, cache_depth, clean_chunks_needed, first_needed
from magi_ray.sampling.schedule import distilled_dt, time_grid
from magi_ray.sampling.state import WindowState
from magi_ray.sampling.window import chunks_under_way, forwards_per_stage
from magi_ray.settings import AS_THE_RUN, ChunkControl, EngineConfig, RuntimeConfig
from magi_ray.timeline import LATENTS_PER_CHUNK, Timeline

# A distilled model sends its oldest chunk through twice when it is nearly clean: velocity = this · seeing its history
# + the rest · seeing only itself.
_HISTORY_SHARE = 0.7


class Model(Protocol):
    """What the sampler calls. R chunks a forward; see ``magi_ray.models.dit.model.DiT``."""

    @property
    def device(self) -> torch.device: ...

    def tokens_per_chunk(self, height: int, width: int) -> int: ...

    def new_cache(self, *, depth: int, height: int, width: int) -> Any: ...

    def __call__(
        self,
        latents: Tensor,
        *,
        t: Tensor,
        captions: Sequence[Tensor],
        dropped: bool,
        chunks: Sequence[int],
        positions: Sequence[int],
        kv_ranges: Sequence[tuple[int, int]],
        cache: Any,
        store: bool = False,
        dt: float | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """Step ``step`` (from 0) of the ``steps`` of stage ``stage`` has been taken."""

    stage: int
    step: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a finished stage leaves behind.

    state: the window before the next stage.  finished: the chunk that became clean, if any, and ``clean_chunk`` its
    latents [1, 16, 6, h, w] float32 on the CPU (chunk 0 of a video prefix holds the prefix's frames, an image's chunk
    its first frame as integrated).
    """

    state: WindowState
    finished: int | None
    clean_chunk: Tensor | None


@dataclass(frozen=True, kw_only=True)
class ForwardRecord:
    """What an observer is told about a step: the clean chunk first where one is sent through, as the reference does.

    stage, step: −1, −1 for the pass over a video prefix.  timesteps, kv_ranges: one entry a chunk, ranges in tokens
    from the video's start.  velocity: guided, [chunks in flight, 16, 6, h, w], without the clean chunk.
    """

    stage: int
    step: int
    timesteps: tuple[float, ...]
    kv_ranges: tuple[tuple[int, int], ...]
    velocity: Tensor | None


@dataclass(frozen=True, kw_only=True)
class _Flight:
    """The window in one step. chunks: absolute numbers, oldest first.  t, delta: [R], and where the step leads."""

    stage: int
    step: int
    chunks: Sequence[int]
    controls: Sequence[ChunkControl]
    x: Tensor
    t: Tensor
    delta: Tensor
    captions: Sequence[Tensor]
    kv_ranges: Sequence[tuple[int, int]]


class Sampler:
    """Samples one video, stage by stage.

    captions: chunk → [n, caption_channels], special tokens in front; n = 0 stands for no caption.
    null_caption: [m, caption_channels], what a chunk without caption reads.
    prefix: latents [1, 16, T, h, w] of the image or video to start from, × scale_factor; T is timeline.prefix_latents.
    noise: chunk → [1, 16, 6, h, w].  height, width: of the latents.  Chunks are numbered from 0 without the prefix.
    controls: of the chunks that do otherwise than ``runtime``.  observe: is called once a step.
    """

    def __init__(
        self,
        *,
        model: Model,
        timeline: Timeline,
        runtime: RuntimeConfig,
        engine: EngineConfig,
        captions: Callable[[int], Tensor],
        null_caption: Tensor,
        noise: Callable[[int], Tensor],
        height: int,
        width: int,
        prefix: Tensor | None = None,
        controls: Mapping[int, ChunkControl] | None = None,
        observe: Callable[[ForwardRecord], None] | None = None,
    ) -> None:
        assert (0 if prefix is None else prefix.shape[2]) == timeline.prefix_latents
        self.model, self.timeline, self.runtime, self.engine = model, timeline, runtime, engine
        self.captions, self.noise, self.observe = captions, noise, observe
        self.null_caption = self._here(null_caption)
        self.prefix = None if prefix is None else self._here(prefix)
        self.controls = controls or {}
        self.ranges = KVRanges.of(runtime, self.controls, offset=timeline.offset)
        self.grid = time_grid(runtime.num_steps, shortcut_mode=engine.shortcut_mode)
        self.steps = forwards_per_stage(num_steps=runtime.num_steps, window_size=timeline.window_size)
        self.guided = runtime.cfg_number == 3
        self.tokens = model.tokens_per_chunk(height, width)
        self.cache = model.new_cache(depth=cache_depth(timeline, self.ranges), height=height, width=width)
        self.latents: dict[int, Tensor] = {}
        self.just_clean: Tensor | None = None

    def start(self, state: WindowState, clean: Mapping[int, Tensor]) -> None:
        """Stand before ``state.stage``, as if all earlier stages had just been run.

        clean: the clean latents of ``ranges.clean_chunks_needed(timeline, ranges, stage)``; more do no harm.
        The keys and values of earlier clean chunks come from the same clean passes as in an undisturbed run.
        """
        stage, offset = state.stage, self.timeline.offset
        assert set(state.latents) == set(chunks_under_way(self.timeline, stage))
        self.latents = {chunk: self._here(x) for chunk, x in state.latents.items()}
        needed = clean_chunks_needed(self.timeline, self.ranges, stage)
        # The last one is sent through by the stage itself.
        self.just_clean = self._here(clean[needed[-1]]) if needed else None
        for chunk in range(first_needed(self.timeline, self.ranges, stage), offset):
            self._cache_prefix_chunk(chunk)
        for chunk in needed[:-1]:
            self._cache_clean_chunk(chunk, self._here(clean[chunk]), dropped=self.guided)
        if stage == 0 and offset:
            spans = [self.ranges.prefix_chunk(chunk) for chunk in range(offset)]
            self._tell(-1, -1, [self.runtime.clean_t] * offset, spans, None)

    def run_stage(self, stage: int) -> Generator[StepDone, None, StageResult]:
        """The steps of ``stage``, a yield after each; returns what to commit. Stages run in order after ``start``.

        Raises NumericError when a velocity is not finite.
        """
        entering = self.timeline.entering(stage)
        if entering is not None:
            self.latents[entering] = self._here(self.noise(entering))
        for step in range(self.steps):
            flight = self._flight(stage, step)
            clean = stage - self.timeline.window_size if step == 0 else -1
            velocity = self._guided(flight, clean) if self.guided else self._unguided(flight, clean)
            self._check_finite(velocity, flight)
            self._report(flight, clean, velocity)
            moved = flight.x + velocity * flight.delta.view(-1, 1, 1, 1, 1)
            self.latents = dict(zip(self.timeline.window(stage), moved.split(1), strict=True))
            yield StepDone(stage=stage, step=step, steps=self.steps)
        return self._result(stage)

    # The two ways to a velocity.  clean: the chunk to send through first, −1 for none.

    def _guided(self, flight: _Flight, clean: int) -> Tensor:
        weights = [
            branch_weights(t, self.runtime, control)
            for t, control in zip(flight.t.tolist(), flight.controls, strict=True)
        ]
        text, previous, alone = (
            self._here(torch.tensor([getattr(w, name) for w in weights])).view(-1, 1, 1, 1, 1)
            for name in ("text", "previous", "alone")
        )
        nulls = [self.null_caption] * len(flight.chunks)
        velocity = torch.zeros_like(flight.x)
        if text.any():
            # Chunks of weight 0 stay in this forward: younger ones attend to them.
            if clean >= 0:
                self._cache_clean_chunk(clean, self.just_clean, dropped=False)
            velocity += text * self._forward(flight, captions=flight.captions, dropped=False)
        if clean >= 0:
            # Takes the place of the text branch's keys, and stays.
            self._cache_clean_chunk(clean, self.just_clean, dropped=True)
        if previous.any():
            velocity += previous * self._forward(flight, captions=nulls, dropped=True)
        isolated = [i for i, w in enumerate(weights) if w.alone]
        if isolated:
            velocity[isolated] += alone[isolated] * self.model(
                flight.x[isolated],
                t=flight.t[isolated],
                captions=nulls[: len(isolated)],
                dropped=True,
                chunks=isolated,
                positions=[0] * len(isolated),
                kv_ranges=[(i, i + 1) for i in isolated],
                cache=None,
            )
        return velocity

    def _unguided(self, flight: _Flight, clean: int) -> Tensor:
        if clean >= 0:
            self._cache_clean_chunk(clean, self.just_clean, dropped=False)
        # In double precision: the float32 nearest to 0.3 is greater than 0.3.
        nearly_clean = float(flight.t[0]) > self.engine.distill_nearly_clean_chunk_threshold
        if not (self.engine.distill and nearly_clean):
            return self._forward(flight, captions=flight.captions, dropped=False)
        beyond = flight.chunks[-1] + 1
        velocity = self.model(
            torch.cat([flight.x, flight.x[:1]]),
            t=torch.cat([flight.t, flight.t[:1]]),
            captions=[*flight.captions, flight.captions[0]],
            dropped=False,
            chunks=[*flight.chunks, beyond],
            positions=[*flight.chunks, beyond],
            kv_ranges=[*flight.kv_ranges, (beyond, beyond + 1)],
            cache=self.cache,
            dt=self._dt(flight.step),
        )
        with_history, by_itself = velocity[:1], velocity[-1:]
        return torch.cat([_HISTORY_SHARE * with_history + (1 - _HISTORY_SHARE) * by_itself, velocity[1:-1]])

    def _forward(self, flight: _Flight, *, captions: Sequence[Tensor], dropped: bool) -> Tensor:
        return self.model(
            flight.x,
            t=flight.t,
            captions=captions,
            dropped=dropped,
            chunks=flight.chunks,
            positions=flight.chunks,
            kv_ranges=flight.kv_ranges,
            cache=self.cache,
            dt=self._dt(flight.step),
        )

    # Clean passes: what they leave in the cache depends on the chunk's latents alone (and on the chunks it may see).

    def _cache_clean_chunk(self, chunk: int, x: Tensor | None, *, dropped: bool) -> None:
        assert x is not None
        absolute = self.timeline.offset + chunk
        self._cache(absolute, self._with_prefix(chunk, x), self.ranges.clean_chunk(absolute), dropped=dropped)

    def _cache_prefix_chunk(self, absolute: int) -> None:
        assert self.prefix is not None
        x = self.prefix[:, :, absolute * LATENTS_PER_CHUNK : (absolute + 1) * LATENTS_PER_CHUNK]
        self._cache(absolute, x, self.ranges.prefix_chunk(absolute), dropped=self.guided)

    def _cache(self, absolute: int, x: Tensor, kv_range: tuple[int, int], *, dropped: bool) -> None:
        self.model(
            x,
            t=self._here(torch.tensor([self.runtime.clean_t])),
            captions=[self.null_caption],
            dropped=dropped,
            chunks=[absolute],
            positions=[absolute],
            kv_ranges=[kv_range],
            cache=self.cache,
            store=True,
            dt=self._dt(0),
        )

    # Smaller parts.

    def _flight(self, stage: int, step: int) -> _Flight:
        window = self.timeline.window(stage)
        done = [(stage - chunk) * self.steps + step for chunk in window]
        captions = [self._here(self.captions(chunk)) for chunk in window]
        absolute = [self.timeline.offset + chunk for chunk in window]
        return _Flight(
            stage=stage,
            step=step,
            chunks=absolute,
            controls=[self.controls.get(chunk, AS_THE_RUN) for chunk in window],
            x=torch.cat([self._with_prefix(chunk, self.latents[chunk]) for chunk in window]),
            t=self._here(self.grid[done]),
            delta=self._here(self.grid[[k + 1 for k in done]] - self.grid[done]),
            captions=[caption if len(caption) else self.null_caption for caption in captions],
            kv_ranges=[self.ranges.in_flight(chunk, k) for chunk, k in zip(absolute, done, strict=True)],
        )

    def _with_prefix(self, chunk: int, x: Tensor) -> Tensor:
        """``x`` with the prefix's last, incomplete chunk over the start of chunk 0."""
        frames = self.timeline.prefix_latents_in_first_chunk
        if chunk != 0 or not frames:
            return x
        assert self.prefix is not None
        return torch.cat([self.prefix[:, :, -frames:], x[:, :, frames:]], dim=2)

    def _result(self, stage: int) -> StageResult:
        finished = self.timeline.finished(stage)
        clean = None
        if finished is not None:
            clean = self.latents.pop(finished)
            if self.timeline.prefix_latents > 1:
                clean = self._with_prefix(finished, clean)
            self.just_clean = clean
        kept = {chunk: x.cpu() for chunk, x in self.latents.items()}
        return StageResult(
            state=WindowState(stage=stage + 1, latents=kept),
            finished=finished,
            clean_chunk=None if clean is None else clean.cpu(),
        )

    def _check_finite(self, velocity: Tensor, flight: _Flight) -> None:
        if torch.isfinite(velocity).all():
            return
        broken = [c for c, v in zip(flight.chunks, velocity, strict=True) if not torch.isfinite(v).all()]
        names = ", ".join(str(chunk - self.timeline.offset) for chunk in broken)
        raise NumericError(
            f"The model gave NaN or infinity for chunk {names} in stage {flight.stage}, step {flight.step}.",
            remedy="Check the weights and params_dtype; bfloat16 does not overflow where float16 does.",
        )

    def _report(self, flight: _Flight, clean: int, velocity: Tensor) -> None:
        timesteps, spans = flight.t.tolist(), list(flight.kv_ranges)
        if clean >= 0:
            timesteps.insert(0, self.runtime.clean_t)
            spans.insert(0, self.ranges.clean_chunk(self.timeline.offset + clean))
        self._tell(flight.stage, flight.step, timesteps, spans, velocity)

    def _tell(
        self, stage: int, step: int, timesteps: Sequence[float], spans: Sequence[tuple[int, int]],
        velocity: Tensor | None,
    ) -> None:  # fmt: skip
        if self.observe is None:
            return
        self.observe(
            ForwardRecord(
                stage=stage,
                step=step,
                timesteps=tuple(timesteps),
                kv_ranges=tuple((first * self.tokens, end * self.tokens) for first, end in spans),
                velocity=velocity,
            )
        )

    def _dt(self, step: int) -> float | None:
        if not self.engine.distill:
            return None
        return distilled_dt(self.runtime.num_steps, step, shortcut_mode=self.engine.shortcut_mode)

    def _here(self, x: Tensor) -> Tensor:
        return x.to(self.model.device)
