"""What happens while a run is rendered, as values: said by workers, and by whoever looks at nodes, store and requests;
heard by the scheduler and by all who watch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from magi_ray.errors import FailureClass, MagiRayError


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
class RowInventory:
    """What the store holds of a row. ``failed``: it failed before, and is not to be tried again.

    embedded: captions and prefix are there.  stages_done: stages from the first on behind which denoising can go on.
    segments_done: chunks whose segment is there.
    """

    job_id: str
    priority: int
    num_stages: int
    num_chunks: int
    embedded: bool = False
    stages_done: int = 0
    segments_done: frozenset[int] = frozenset()
    published: bool = False
    failed: bool = False


# Of workers. An attempt is one go of one worker at one task; no two have the same number.


@dataclass(frozen=True, kw_only=True)
class WorkerPlaced:
    """A worker that was started has its place, and loads. ``node``: the id of the machine; ``log``: where it writes, as
    host:file, '' if unknown."""

    worker: str
    node: str = ""
    log: str = ""


@dataclass(frozen=True, kw_only=True)
class WorkerReady:
    """A worker has loaded. ``seconds``: that it took."""

    worker: str
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class WorkerGone:
    """A worker died, or never started; whatever it was doing failed with ``failure``.

    no_room: no node had room for it.  error: why no worker can start here, if that is known.
    """

    worker: str
    failure: FailureClass
    message: str
    log: str = ""
    no_room: bool = False
    error: MagiRayError | None = None


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


@dataclass(frozen=True, kw_only=True)
class TaskDone:
    """Everything the task asked for is in the store. ``seconds``: that the attempt took."""

    worker: str
    task: Task
    attempt: int
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TaskStopped:
    """The worker stopped as it was asked to, before the task was done."""

    worker: str
    task: Task
    attempt: int
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TaskFailed:
    """``log``: where the worker wrote."""

    worker: str
    task: Task
    attempt: int
    failure: FailureClass
    message: str
    log: str = ""
    seconds: float = 0.0


# Of the cluster, the store and people.


@dataclass(frozen=True, kw_only=True)
class NodesSeen:
    """The nodes that have what a worker of ``kind`` needs."""

    kind: TaskKind
    nodes: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What the store holds of a row, looked up now."""

    row: RowInventory


@dataclass(frozen=True, kw_only=True)
class PauseAsked:
    """Stop when what is being computed is committed."""


@dataclass(frozen=True, kw_only=True)
class CancelAsked:
    """Stop at once."""


WorkerEvent = WorkerPlaced | WorkerReady | WorkerGone | StepDone | StageCommitted | TaskDone | TaskStopped | TaskFailed
Event = WorkerEvent | NodesSeen | Inspected | PauseAsked | CancelAsked
