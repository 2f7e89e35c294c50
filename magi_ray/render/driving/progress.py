"""How far a run is: updated with its events, read by whoever displays it. No clock, no store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from pydantic import TypeAdapter

from magi_ray.events import Event, Inspected, RowInventory, StageCommitted, StepDone, TaskDone, TaskKind
from magi_ray.render.driving.scheduler import Command, RowFailed, RunTask


class Phase(StrEnum):
    WAITING = "waiting"
    EMBEDDING = "embedding"
    RENDERING = "rendering"
    FINISHING = "finishing"
    DONE = "done"
    FAILED = "failed"


@dataclass(kw_only=True)
class VideoProgress:
    """One video. ``step`` of ``steps``: denoising steps of the current stage. rendered_stages: stages computed by this
    driver; one computed twice counts twice."""

    job_id: str
    phase: Phase
    stages: int
    stages_done: int
    rendered_stages: int = 0
    steps: int
    step: int = 0
    chunks: int
    chunks_done: int
    message: str = ""

    @property
    def reused_stages(self) -> int:
        """Stages that were in the store already."""
        return max(0, self.stages_done - self.rendered_stages)

    @property
    def steps_total(self) -> int:
        return self.stages * self.steps

    @property
    def steps_done(self) -> int:
        return self.stages_done * self.steps + self.step


@dataclass(frozen=True, kw_only=True)
class Times:
    """elapsed_s: since this driver began; another may have before.  left_s: to denoise what is left,
    if all goes on as it did.  video_seconds_per_hour: of new video.  None: not known, or not yet."""

    elapsed_s: float | None = None
    left_s: float | None = None
    video_seconds_per_hour: float | None = None


@dataclass
class RunProgress:
    """All videos of a run, in the manifest's order."""

    run_id: str
    videos: dict[str, VideoProgress] = field(default_factory=dict)
    times: Times = Times()

    @classmethod
    def of(cls, run_id: str, rows: Sequence[RowInventory], steps: dict[str, int]) -> RunProgress:
        """The state ``rows`` describe. ``steps``: denoising steps per stage of each job."""
        progress = cls(run_id)
        for row in rows:
            progress.videos[row.job_id] = VideoProgress(
                job_id=row.job_id,
                phase=Phase.DONE if row.published else Phase.WAITING,
                stages=row.num_stages,
                stages_done=row.stages_done,
                steps=steps[row.job_id],
                chunks=row.num_chunks,
                chunks_done=row.num_chunks if row.published else len(row.segments_done),
            )
        return progress

    def note(self, happened: Event | Command) -> None:
        """Take note of an event or of a command that is about to be carried out."""
        match happened:
            case StepDone(job_id=job_id, stage=stage, step=step):
                video = self.videos[job_id]
                # The first step of a stage is done before the commit of the one before it is reported.
                video.stages_done, video.step = stage, step
                video.rendered_stages += step == happened.steps
            case StageCommitted(job_id=job_id, stage=stage):
                video = self.videos[job_id]
                if stage + 1 > video.stages_done:
                    video.stages_done, video.step = stage + 1, 0
            case RunTask(task=task):
                video = self.videos[task.job_id]
                match task.kind:
                    case TaskKind.EMBED:
                        video.phase = Phase.EMBEDDING
                    case TaskKind.DENOISE:
                        video.phase, video.stages_done, video.step = Phase.RENDERING, task.index, 0
                    case TaskKind.FINISH:
                        video.phase = Phase.FINISHING
                    case TaskKind.DECODE:
                        pass
            case TaskDone(task=task):
                video = self.videos[task.job_id]
                match task.kind:
                    case TaskKind.EMBED:
                        video.phase = Phase.WAITING
                    case TaskKind.DECODE:
                        # A segment that was committed before the row was inspected is counted already.
                        video.chunks_done = min(video.chunks, video.chunks_done + 1)
                    case TaskKind.FINISH:
                        video.phase = Phase.DONE
                    case TaskKind.DENOISE:
                        pass
            case Inspected(row=row):
                video = self.videos[row.job_id]
                video.chunks_done = row.num_chunks if row.published else len(row.segments_done)
                if row.published:
                    video.phase = Phase.DONE
            case RowFailed(job_id=job_id, message=message):
                self.videos[job_id].phase, self.videos[job_id].message = Phase.FAILED, message
            case _:
                pass

    def count(self, phase: Phase) -> int:
        return sum(video.phase is phase for video in self.videos.values())

    def as_json(self) -> dict[str, Any]:
        times = {name: None if value is None else round(value, 1) for name, value in asdict(self.times).items()}
        return {"run_id": self.run_id, "videos": [asdict(video) for video in self.videos.values()], **times}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> RunProgress:
        """Raises ValueError, KeyError for what ``as_json`` did not write."""
        videos = TypeAdapter(list[VideoProgress]).validate_python(content["videos"])
        times = Times(**{field.name: content.get(field.name) for field in fields(Times)})
        return cls(content["run_id"], {video.job_id: video for video in videos}, times)
