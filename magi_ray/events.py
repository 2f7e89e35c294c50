"""What happens while a run is rendered, as values: said by workers, heard by the scheduler and by whoever watches."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class TaskKind(StrEnum):
    """The kinds of tasks, and of the workers that carry them out."""

    EMBED = "embed"
    DENOISE = "denoise"
    DECODE = "decode"
    FINISH = "finish"


@dataclass(frozen=True, kw_only=True)
class Task:
    """kind denoise: ``index`` is the first stage to compute; decode: the chunk; otherwise unused."""

    kind: TaskKind
    job_id: str
    index: int = 0


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """``step`` (from 1) of the ``steps`` forwards of ``stage`` is done, and took ``seconds``."""

    job_id: str
    stage: int
    step: int
    steps: int
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StageCommitted:
    """``stage`` of ``job_id`` is in the store; ``chunk`` is the one it completed, if any.

    seconds: that computing it took; 0 when it was there already.
    """

    job_id: str
    stage: int
    chunk: int | None
    seconds: float = 0.0
