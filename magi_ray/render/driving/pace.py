"""Pace: how fast a driver renders, and how long what is left will take. No store; the clock is an argument.

The unit is the chunk: in each stage, every chunk in flight has one of its ``window_size`` stages computed. What a chunk
costs depends on the device and on everything in ``_COST``; so rows that differ in these are measured apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from magi_ray.events import Event, StepDone
from magi_ray.render.driving.progress import Phase, RunProgress, Times, VideoProgress
from magi_ray.render.driving.scheduler import Command
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.settings import Frozen
from magi_ray.storage.records import digest
from magi_ray.timeline import FRAMES_PER_CHUNK

# Events come in bunches: what was measured in less time says little.
MEASURED_S = 2.0
# Of a stage's pre-image: the model and its weights, steps, guidance and ranges, dtype and threads, the size.
_COST = ("weights", "model", "sampling", "numeric", "size")


class Speed(Frozen):
    """What a driver has measured: ``chunks`` took ``seconds``, all workers together and decoding included.

    settings: ``cost_digest`` of the rows.  device: ``device_name`` of where they were denoised.
    """

    settings: str
    device: str
    chunks: float
    seconds: float


@dataclass
class _Measured:
    """Of rows with the same size and steps. The first step counts for neither: it loads and compiles."""

    plan: RowPlan
    device: str
    chunks: float = 0.0
    seconds: float = 0.0


class Pace:
    """plans: of the run, by job_id.  clock: seconds."""

    def __init__(self, plans: Mapping[str, RowPlan], clock: Callable[[], float]) -> None:
        self._plans, self._clock = plans, clock
        self._began = clock()
        self._last_step: float | None = None
        self._measured: dict[tuple[object, ...], _Measured] = {}
        self._video_s = 0.0

    def note(self, happened: Event | Command) -> None:
        """Take note of the steps that are computed; stages that were in the store have none."""
        if not isinstance(happened, StepDone):
            return
        now, before = self._clock(), self._last_step
        self._last_step = now
        if before is None:
            return
        plan = self._plans[happened.job_id]
        runtime, window = plan.settings.runtime, plan.timeline.window(happened.stage)
        chunks = len(window) / plan.timeline.window_size / happened.steps
        measured = self._measured.setdefault(_alike(plan), _Measured(plan=plan, device=happened.device))
        measured.chunks += chunks
        measured.seconds += now - before
        self._video_s += chunks * FRAMES_PER_CHUNK / runtime.fps

    def times(self, progress: RunProgress) -> Times:
        """As far as they can be known after what was noted."""
        elapsed_s = self._clock() - self._began
        if (seconds := self._seconds) < MEASURED_S:
            return Times(elapsed_s=elapsed_s)
        speed = 3600 * self._video_s / seconds
        return Times(elapsed_s=elapsed_s, left_s=self._left(progress), video_seconds_per_hour=speed)

    def speeds(self) -> list[Speed]:
        """For the plans of later runs."""
        return [
            Speed(settings=cost_digest(m.plan), device=m.device, chunks=m.chunks, seconds=m.seconds)
            for m in self._measured.values()
            if self._seconds >= MEASURED_S
        ]

    @property
    def begun(self) -> bool:
        """Whether any step was noted."""
        return self._last_step is not None

    @property
    def _seconds(self) -> float:
        return sum(measured.seconds for measured in self._measured.values())

    def _left(self, progress: RunProgress) -> float:
        """Seconds. Rows of a kind that was not measured yet are taken to cost in proportion to pixels and steps."""
        rates = {alike: measured.seconds / measured.chunks for alike, measured in self._measured.items()}
        mean = self._seconds / sum(m.chunks * _weight(m.plan) for m in self._measured.values())
        left = 0.0
        for video in progress.videos.values():
            if video.phase not in (Phase.DONE, Phase.FAILED):
                plan = self._plans[video.job_id]
                left += chunks_left(plan, video) * rates.get(_alike(plan), mean * _weight(plan))
        return left


def chunks_left(plan: RowPlan, video: VideoProgress) -> float:
    """What is left to denoise."""
    timeline = plan.timeline
    done = timeline.chunk_stages(video.stages_done)
    done_now = 0.0
    if video.step and video.stages_done < timeline.num_stages:
        done_now = len(timeline.window(video.stages_done)) * video.step / video.steps
    return timeline.num_chunks - (done + done_now) / timeline.window_size


def cost_digest(plan: RowPlan) -> str:
    """The same for rows whose chunks cost the same on the same device."""
    pre_image = plan.pre_image(0)
    return digest({name: pre_image[name] for name in _COST})


def seconds_per_chunk(speeds: Iterable[Speed], settings: str, device: str) -> float | None:
    """Of all that was measured on that kind of device with those settings; None if nothing was."""
    fitting = [speed for speed in speeds if (speed.settings, speed.device) == (settings, device)]
    chunks = sum(speed.chunks for speed in fitting)
    return sum(speed.seconds for speed in fitting) / chunks if chunks else None


def _alike(plan: RowPlan) -> tuple[object, ...]:
    """The same for rows of one run whose chunks cost the same."""
    runtime = plan.settings.runtime
    return runtime.video_size_h, runtime.video_size_w, runtime.num_steps


def _weight(plan: RowPlan) -> float:
    """Pixels × steps of a chunk."""
    runtime = plan.settings.runtime
    return runtime.video_size_h * runtime.video_size_w * runtime.num_steps
