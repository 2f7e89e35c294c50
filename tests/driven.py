"""A sampler and the network that computes what it asks for, all in one place, every step remembered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from magi_ray.forward import Forward
from magi_ray.sampling.sampler import Sampler, StageResult, StepInputs, drive
from magi_ray.sampling.state import WindowState

START = WindowState(stage=0, latents={})


@dataclass(frozen=True, kw_only=True)
class Step:
    """What was asked for, and ``velocity``, what the sampler made of the answers: [chunks in flight, 16, 6, h, w]."""

    stage: int
    step: int
    forwards: tuple[Forward[Tensor], ...]
    velocity: Tensor

    @property
    def window(self) -> Forward[Tensor]:
        """The first forward of all chunks in flight."""
        return next(forward for forward in self.forwards if not forward.writes_cache)


class WatchedSampler(Sampler):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.velocities: list[tuple[StepInputs, Tensor]] = []

    def advance(self, inputs: StepInputs, velocity: Tensor) -> None:
        self.velocities.append((inputs, velocity))
        super().advance(inputs, velocity)


class Driven:
    """network: a DiT, or what stands in for it: ``new_cache(depth, height, width)``, and (forward, cache) → velocity.

    first: the forwards that filled the cache before the first stage.
    """

    def __init__(self, network: Any, *, height: int, width: int, **arguments: Any) -> None:
        self.network, self.sampler = network, WatchedSampler(**arguments)
        self.cache = network.new_cache(depth=self.sampler.cache_depth, height=height, width=width)
        self.first: list[Forward[Tensor]] = []
        self.steps: list[Step] = []
        self._forwards: list[Forward[Tensor]] = []

    def start(self, state: WindowState = START, clean: Mapping[int, Tensor] | None = None) -> None:
        for forward in self.sampler.start(state, clean or {}):
            self.network(forward, self.cache)
            self.first.append(forward)

    def run(self, stages: range) -> list[StageResult]:
        return [self.run_stage(stage) for stage in stages]

    def run_stage(self, stage: int) -> StageResult:
        steps = drive(self.sampler.run_stage(stage), self._compute)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                result: StageResult = end.value
                return result
            inputs, velocity = self.sampler.velocities[-1]
            asked, self._forwards = tuple(self._forwards), []
            self.steps.append(Step(stage=inputs.stage, step=inputs.step, forwards=asked, velocity=velocity))

    def _compute(self, forward: Forward[Tensor]) -> Tensor:
        self._forwards.append(forward)
        velocity: Tensor = self.network(forward, self.cache)
        return velocity
