"""The loop that turns noise into chunks (spec §5). It computes no velocity itself: it yields the forwards to compute,
and is sent the velocities.

Every stage begins with the clean pass: the chunk that just became clean goes through the network, so that its keys and
values are cached. Then each step advances every chunk of the window by one step of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from magi_ray.errors import NumericError
from magi_ray.forward import Forward
from magi_ray.sampling.guidance import branch_shares
from magi_ray.sampling.ranges import KVRanges, cache_depth, clean_chunks_needed, first_needed
from magi_ray.sampling.schedule import distilled_dt, time_grid
from magi_ray.sampling.state import WindowState
from magi_ray.sampling.window import chunks_under_way, forwards_per_stage
from magi_ray.settings import AS_THE_RUN, ChunkControl, EngineConfig, RuntimeConfig
from magi_ray.timeline import LATENTS_PER_CHUNK, Timeline

# A distilled model computes its oldest chunk twice when it is nearly clean: velocity = this share · seeing its history
# + the rest · seeing only itself.
_HISTORY_SHARE = 0.7

Forwards = Sequence[Forward[Tensor]]
"""To be computed in this order if they use the same cache; none needs the velocity of another."""
Velocities = Sequence[Tensor]
"""One for each Forward, in the shape of its latents; those of forwards that write to the cache are ignored."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage commits.

    state: the window before the next stage.  finished: the chunk that became clean, if any; clean_chunk: its latents
    [1, 16, 6, h, w] float32 on the CPU (chunk 0 begins with the frames of a video prefix; behind an image its first
    frame is the sampled one).
    """

    state: WindowState
    finished: int | None
    clean_chunk: Tensor | None


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """The window before one step, R chunks, oldest first.

    clean: the chunk that just became clean, in the first step of a stage.  chunks: absolute numbers.
    x: [R, 16, 6, h, w].  t: [R].  delta: [R], the size of the step.  captions, kv_ranges: as in Forward.
    """

    stage: int
    step: int
    clean: int | None
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
    noise: chunk → [1, 16, 6, h, w].  Chunks are numbered from 0 without the prefix.
    controls: of the chunks that differ from ``runtime``.
    device: of the latents, the tensors of forwards, and the velocities.
    """

    def __init__(
        self,
        *,
        timeline: Timeline,
        runtime: RuntimeConfig,
        engine: EngineConfig,
        captions: Callable[[int], Tensor],
        null_caption: Tensor,
        noise: Callable[[int], Tensor],
        prefix: Tensor | None = None,
        controls: Mapping[int, ChunkControl] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        assert (0 if prefix is None else prefix.shape[2]) == timeline.prefix_latents
        self.timeline, self.runtime, self.engine = timeline, runtime, engine
        self.captions, self.noise, self.device = captions, noise, device
        self.null_caption = self._on_device(null_caption)
        self.prefix = None if prefix is None else self._on_device(prefix)
        self.controls = controls or {}
        self.ranges = KVRanges.of(runtime, self.controls, offset=timeline.offset)
        self.cache_depth = cache_depth(timeline, self.ranges)
        self.grid = time_grid(runtime.num_steps, shortcut_mode=engine.shortcut_mode)
        self.steps = forwards_per_stage(num_steps=runtime.num_steps, window_size=timeline.window_size)
        self.guided = runtime.cfg_number == 3
        self.latents: dict[int, Tensor] = {}
        self.just_clean: Tensor | None = None

    def start(self, state: WindowState, clean: Mapping[int, Tensor]) -> Iterator[Forward[Tensor]]:
        """Go to ``state.stage``, as if all earlier stages had just been run. Yields the forwards that fill a new cache
        of ``cache_depth`` chunks; nothing is sent back. To be exhausted before ``run_stage``.

        clean: the clean latents of ``ranges.clean_chunks_needed(timeline, ranges, stage)``; more do no harm.
        The keys and values of earlier clean chunks come from the same clean passes as in an undisturbed run.
        """
        stage = state.stage
        assert set(state.latents) == set(chunks_under_way(self.timeline, stage))
        self.latents = {chunk: self._on_device(x) for chunk, x in state.latents.items()}
        needed = clean_chunks_needed(self.timeline, self.ranges, stage)
        # The last one is sent through by the stage itself.
        self.just_clean = self._on_device(clean[needed[-1]]) if needed else None
        for chunk in range(first_needed(self.timeline, self.ranges, stage), self.timeline.offset):
            yield self._prefix_pass(chunk)
        for chunk in needed[:-1]:
            yield self._clean_pass(chunk, self._on_device(clean[chunk]), dropped=self.guided)

    def run_stage(self, stage: int) -> Generator[Forwards, Velocities, StageResult]:
        """Yields all forwards of each step and is sent their velocities; returns what to commit.

        Stages are run in order, after ``start``. Raises NumericError when a velocity is not finite.
        """
        entering = self.timeline.entering(stage)
        if entering is not None:
            self.latents[entering] = self._on_device(self.noise(entering))
        for step in range(self.steps):
            inputs = self._inputs(stage, step)
            velocity = yield from self._guided(inputs) if self.guided else self._unguided(inputs)
            self.advance(inputs, velocity)
        return self._result(stage)

    def advance(self, inputs: StepInputs, velocity: Tensor) -> None:
        """Take the step that begins with ``inputs``. velocity: guided, [R, 16, 6, h, w]. Raises NumericError."""
        self._require_finite(velocity, inputs)
        moved = inputs.x + velocity * inputs.delta.view(-1, 1, 1, 1, 1)
        self.latents = dict(zip(self.timeline.window(inputs.stage), torch.split(moved, 1), strict=True))

    # The two ways to a velocity.

    def _guided(self, inputs: StepInputs) -> Generator[Forwards, Velocities, Tensor]:
        shares = [
            branch_shares(t, self.runtime, control)
            for t, control in zip(inputs.t.tolist(), inputs.controls, strict=True)
        ]
        text, previous, alone = (
            self._on_device(torch.tensor([getattr(share, name) for share in shares])).view(-1, 1, 1, 1, 1)
            for name in ("text", "previous", "alone")
        )
        null_captions = [self.null_caption] * len(inputs.chunks)
        isolated = [i for i, share in enumerate(shares) if share.alone]

        # A branch whose share is 0 for all chunks is not computed.
        forwards: list[Forward[Tensor]] = []
        if text.any():
            # Chunks of share 0 stay in this forward: younger ones attend to them.
            forwards += self._just_clean_pass(inputs, dropped=False)
            forwards.append(self._whole_window(inputs, captions=inputs.captions, dropped=False))
        # Takes the place of the text branch's keys, and stays.
        forwards += self._just_clean_pass(inputs, dropped=True)
        if previous.any():
            forwards.append(self._whole_window(inputs, captions=null_captions, dropped=True))
        if isolated:
            forwards.append(self._isolated(inputs, isolated))

        velocities = yield from _velocities_of(forwards)
        velocity = torch.zeros_like(inputs.x)
        if text.any():
            velocity += text * next(velocities)
        if previous.any():
            velocity += previous * next(velocities)
        if isolated:
            velocity[isolated] += alone[isolated] * next(velocities)
        return velocity

    def _unguided(self, inputs: StepInputs) -> Generator[Forwards, Velocities, Tensor]:
        clean_pass = self._just_clean_pass(inputs, dropped=False)
        # Compared in double precision: the float32 nearest to 0.3 is greater than 0.3.
        nearly_clean = float(inputs.t[0]) > self.engine.distill_nearly_clean_chunk_threshold
        if not (self.engine.distill and nearly_clean):
            forward = self._whole_window(inputs, captions=inputs.captions, dropped=False)
            (velocity,) = yield from _velocities_of([*clean_pass, forward])
            return velocity
        (velocity,) = yield from _velocities_of([*clean_pass, self._oldest_twice(inputs)])
        with_history, by_itself = velocity[:1], velocity[-1:]
        return torch.cat([_HISTORY_SHARE * with_history + (1 - _HISTORY_SHARE) * by_itself, velocity[1:-1]])

    # Forwards of the window.

    def _whole_window(self, inputs: StepInputs, *, captions: Sequence[Tensor], dropped: bool) -> Forward[Tensor]:
        return Forward(
            latents=inputs.x, t=inputs.t, captions=captions, chunks=inputs.chunks, positions=inputs.chunks,
            kv_ranges=inputs.kv_ranges, dropped=dropped, dt=self._dt(inputs.step),
        )  # fmt: skip

    def _isolated(self, inputs: StepInputs, indices: Sequence[int]) -> Forward[Tensor]:
        """Some chunks of the window, without caption, each as if it were the first and only one of its video."""
        return Forward(
            latents=inputs.x[indices],
            t=inputs.t[indices],
            captions=[self.null_caption] * len(indices),
            chunks=indices,
            positions=[0] * len(indices),
            kv_ranges=[(i, i + 1) for i in indices],
            dropped=True,
            reads_cache=False,
        )

    def _oldest_twice(self, inputs: StepInputs) -> Forward[Tensor]:
        """The window and, behind it, its oldest chunk once more, seeing only itself."""
        beyond = inputs.chunks[-1] + 1
        return Forward(
            latents=torch.cat([inputs.x, inputs.x[:1]]),
            t=torch.cat([inputs.t, inputs.t[:1]]),
            captions=[*inputs.captions, inputs.captions[0]],
            chunks=[*inputs.chunks, beyond],
            positions=[*inputs.chunks, beyond],
            kv_ranges=[*inputs.kv_ranges, (beyond, beyond + 1)],
            dropped=False,
            dt=self._dt(inputs.step),
        )

    # Clean passes: what they cache depends only on the chunk's latents (and on the chunks it may see).

    def _just_clean_pass(self, inputs: StepInputs, *, dropped: bool) -> list[Forward[Tensor]]:
        """The pass of the chunk that just became clean, if there is one."""
        if inputs.clean is None:
            return []
        assert self.just_clean is not None
        return [self._clean_pass(inputs.clean, self.just_clean, dropped=dropped)]

    def _clean_pass(self, chunk: int, x: Tensor, *, dropped: bool) -> Forward[Tensor]:
        absolute = self.timeline.offset + chunk
        return self._caching(absolute, self._with_prefix(chunk, x), self.ranges.clean_chunk(absolute), dropped=dropped)

    def _prefix_pass(self, absolute: int) -> Forward[Tensor]:
        assert self.prefix is not None
        x = self.prefix[:, :, absolute * LATENTS_PER_CHUNK : (absolute + 1) * LATENTS_PER_CHUNK]
        return self._caching(absolute, x, self.ranges.prefix_chunk(absolute), dropped=self.guided)

    def _caching(self, absolute: int, x: Tensor, kv_range: tuple[int, int], *, dropped: bool) -> Forward[Tensor]:
        t = self._on_device(torch.tensor([self.runtime.clean_t]))
        return Forward(
            latents=x, t=t, captions=[self.null_caption], chunks=[absolute], positions=[absolute],
            kv_ranges=[kv_range], dropped=dropped, dt=self._dt(0), writes_cache=True,
        )  # fmt: skip

    # Smaller parts.

    def _inputs(self, stage: int, step: int) -> StepInputs:
        window = self.timeline.window(stage)
        done = [(stage - chunk) * self.steps + step for chunk in window]
        captions = [self._on_device(self.captions(chunk)) for chunk in window]
        absolute = [self.timeline.offset + chunk for chunk in window]
        return StepInputs(
            stage=stage,
            step=step,
            clean=self.timeline.finished(stage - 1) if step == 0 else None,
            chunks=absolute,
            controls=[self.controls.get(chunk, AS_THE_RUN) for chunk in window],
            x=torch.cat([self._with_prefix(chunk, self.latents[chunk]) for chunk in window]),
            t=self._on_device(self.grid[done]),
            delta=self._on_device(self.grid[[k + 1 for k in done]] - self.grid[done]),
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

    def _require_finite(self, velocity: Tensor, inputs: StepInputs) -> None:
        if torch.isfinite(velocity).all():
            return
        broken = [c for c, v in zip(inputs.chunks, velocity, strict=True) if not torch.isfinite(v).all()]
        names = ", ".join(str(chunk - self.timeline.offset) for chunk in broken)
        raise NumericError(
            f"The model gave NaN or infinity for chunk {names} in stage {inputs.stage}, step {inputs.step}.",
            remedy="Check the weights and params_dtype; bfloat16 does not overflow where float16 does.",
        )

    def _dt(self, step: int) -> float | None:
        if not self.engine.distill:
            return None
        return distilled_dt(self.runtime.num_steps, step, shortcut_mode=self.engine.shortcut_mode)

    def _on_device(self, x: Tensor) -> Tensor:
        return x.to(self.device)


def _velocities_of(forwards: Forwards) -> Generator[Forwards, Velocities, Iterator[Tensor]]:
    """The velocities of those forwards that are no clean passes."""
    velocities = yield forwards
    return iter([v for forward, v in zip(forwards, velocities, strict=True) if not forward.writes_cache])


def drive(
    stage: Generator[Forwards, Velocities, StageResult], compute: Callable[[Forward[Tensor]], Tensor]
) -> Generator[None, None, StageResult]:
    """Run a stage of ``Sampler.run_stage``, one forward at a time. Yields after each step; returns the result.

    compute: the velocity of a Forward; it keeps the cache.
    """
    forwards = next(stage)
    while True:
        velocities = [compute(forward) for forward in forwards]
        try:
            forwards = stage.send(velocities)
        except StopIteration as end:
            result: StageResult = end.value
            break
        yield
    yield
    return result
