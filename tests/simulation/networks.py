"""What takes the place of networks and ffmpeg: it takes simulated time, fails as drawn from the seed, and makes
``Contents``."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from magi_ray.errors import (
    DeviceOutOfMemory,
    FailureClass,
    InputError,
    NumericError,
    StoreError,
    Superseded,
)
from magi_ray.events import StageCommitted, StepDone, Task, TaskKind
from magi_ray.render.artifacts.commits import chunk_commit, committed
from magi_ray.render.driving.worker import TaskBody
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.tasks.decode import Decoder
from magi_ray.render.tasks.denoise import Denoiser, Pack, RunStage
from magi_ray.render.tasks.embed import Embedder
from magi_ray.render.tasks.finish import Finisher
from magi_ray.storage.records import read_payload
from magi_ray.storage.store import Store

from .material import ENCODER, Contents
from .world import Process

if TYPE_CHECKING:
    from .play import Attempt, Simulation


@dataclass
class Poison:
    """What goes wrong with a row, whoever works on it, ``times`` times. ``at``: the task and its index."""

    at: Task
    failure: FailureClass
    times: int

    def strike(self, process: Process, task: Task) -> None:
        if task != self.at or not self.times:
            return
        self.times -= 1
        process.world.note(process.name, "is struck by", self.failure)
        match self.failure:
            case FailureClass.INFRASTRUCTURE:
                process.kill()
                process.raise_if_killed()
            case FailureClass.INPUT:
                raise InputError("poisoned")
            case FailureClass.NUMERIC:
                raise NumericError("poisoned")
            case FailureClass.OUT_OF_MEMORY:
                raise DeviceOutOfMemory("poisoned")
            case FailureClass.STORE:
                raise StoreError("poisoned")
            case FailureClass.PREEMPTED:
                raise Superseded("poisoned")
            case FailureClass.CODE:
                raise RuntimeError("poisoned")


class Networks:
    """Of one simulated worker: embeds, denoises, decodes and joins. ``attempt``: the current try at a video."""

    def __init__(self, simulation: Simulation, process: Process, store: Store) -> None:
        self.simulation, self.process, self.store = simulation, process, store
        self.attempt: Attempt | None = None

    def body(self, kind: TaskKind) -> TaskBody:
        """The production task body on simulated networks."""
        system, run_id = self.process.system, self.simulation.run.run_id
        match kind:
            case TaskKind.EMBED:
                return Poisoned(kind, Embedder(self.store, self, system=system), self)
            case TaskKind.DENOISE:
                return Denoiser(self.store, self.begin_video, system=system)
            case TaskKind.DECODE:
                return Poisoned(kind, Decoder(self.store, self.make_segment, encoder=ENCODER, system=system), self)
            case TaskKind.FINISH:
                return Poisoned(
                    kind, Finisher(self.store, run_id, encoder=ENCODER, joiner=self.join, system=system), self
                )

    def strike(self, kind: TaskKind, job_id: str, index: int) -> None:
        for poison in self.simulation.poisons:
            poison.strike(self.process, Task(kind=kind, job_id=job_id, index=index))

    def compute(self, shortest_s: float, longest_s: float) -> None:
        self.process.sleep(self.process.world.random.uniform(shortest_s, longest_s))

    # Embedding

    def embed_caption(self, plan: RowPlan, caption: str) -> bytes:
        self.compute(0.5, 5)
        return Contents.text(plan.caption_digests[plan.captions.index(caption)])

    def encode_prefix(self, plan: RowPlan) -> bytes:
        self.compute(0.5, 5)
        return Contents(plan).prefix()

    # Denoising

    def begin_video(self, plan: RowPlan, first_stage: int) -> RunStage:
        assert self.attempt is not None
        self.simulation.row_taken(self.attempt)
        return Stages(self, plan, self.attempt, self._state_before(plan, first_stage)).run

    def _state_before(self, plan: RowPlan, stage: int) -> bytes:
        if stage:
            return read_payload(self.store, committed(self.store, "stage", plan.stage_keys[stage - 1]), "state")
        if plan.prefix_digest is not None:
            return read_payload(self.store, committed(self.store, "prefix", plan.prefix_digest), "prefix")
        return b""

    # Decoding and joining

    def make_segment(self, plan: RowPlan, chunk: int, out: Path) -> None:
        latent = read_payload(self.store, chunk_commit(self.store, plan, chunk), "chunk")
        self.compute(0.5, 8)
        out.write_bytes(Contents.segment(latent))

    def join(self, plan: RowPlan, segments: Sequence[Path], out: Path) -> None:
        self.compute(0.5, 5)
        out.write_bytes(b"".join(path.read_bytes() for path in segments))


class Stages:
    """The stages of one video, in order."""

    def __init__(self, networks: Networks, plan: RowPlan, attempt: Attempt, state: bytes) -> None:
        self.networks, self.plan, self.attempt, self.state = networks, plan, attempt, state

    def run(self, stage: int) -> Generator[None, None, Pack]:
        plan, networks = self.plan, self.networks
        entering = plan.timeline.entering(stage)
        caption = b""
        if entering is not None:
            caption = read_payload(
                networks.store, committed(networks.store, "text", plan.caption_digests[entering]), "text"
            )
        for step in range(plan.forwards_per_stage):
            networks.compute(0.8 * networks.simulation.step_s, 1.2 * networks.simulation.step_s)
            networks.strike(TaskKind.DENOISE, plan.job_id, stage)
            networks.simulation.forward(self.attempt, stage, step)
            yield
        self.state = Contents.next_state(plan, stage, self.state, caption)
        payloads = {"state": self.state}
        if plan.timeline.finished(stage) is not None:
            payloads["chunk"] = Contents.chunk(self.state)
        return lambda: payloads


class Poisoned:
    """A task body that may fail as it starts."""

    def __init__(self, kind: TaskKind, body: TaskBody, networks: Networks) -> None:
        self.kind, self.body, self.networks = kind, body, networks

    def carry_out(self, plan: RowPlan, index: int) -> Iterator[StepDone | StageCommitted]:
        self.networks.strike(self.kind, plan.job_id, index)
        return self.body.carry_out(plan, index)
