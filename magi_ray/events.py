"""Events of a run, as values: sent by workers, or found by the driver when it looks at nodes, store and requests; read
by the scheduler and by observers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from magi_ray.errors import FailureClass, MagiRayError


class TaskKind(StrEnum):
    """The kinds of tasks, and of the workers that carry them out.

    A new kind needs: a task body (render/tasks/) and its actor (cluster/actors.py); its place in the order of work
    (render/driving/scheduler.py), what is left of it (inventory.py) and how it shows (progress.py); if it commits
    something, its kind of commit (storage/keys.py), its identity (render/plans/) and its upkeep (render/upkeep/).
    """

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
class PublishedVideo:
    """A published video, as its record says; None: the magi-ray that wrote it did not say so.

    render_seconds: that computing its stages and segments took, in all drivers of the run.  forwards_spent: denoising
    steps of the stages that the run computed for it.  forwards_reused: of those that other rows or runs had computed.
    """

    sha256: str
    render_seconds: float | None = None
    forwards_spent: int | None = None
    forwards_reused: int | None = None


@dataclass(frozen=True, kw_only=True)
class RowInventory:
    """What the store holds of a row.

    embedded: captions and prefix are there.  stages_done: the number of leading stages after which denoising can
    go on.  segments_done: chunks whose segment is there.  failed: it failed before and is not to be tried again.
    video: if it is published.
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
    video: PublishedVideo | None = None


# From workers. An attempt is one worker's try at one task; every attempt has its own number.


@dataclass(frozen=True, kw_only=True)
class WorkerPlaced:
    """A started worker has been placed and is loading. ``node``: the machine's id; ``log``: its log file, as host:file,
    '' if unknown."""

    worker: str
    node: str = ""
    log: str = ""


@dataclass(frozen=True, kw_only=True)
class WorkerReady:
    """A worker accepts tasks. It loaded in ``seconds``; 0: it loads with its first task."""

    worker: str
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class WorkerGone:
    """A worker died, was silent for too long, or could not start; its task failed with ``failure``.

    no_room: no node had room for it.  error: magi-ray's own error from loading, which ends the run.
    """

    worker: str
    failure: FailureClass
    message: str
    log: str = ""
    no_room: bool = False
    error: MagiRayError | None = None


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """``step`` (from 1) of the ``steps`` denoising steps of ``stage`` is done, after ``seconds``, on ``device``."""

    job_id: str
    stage: int
    step: int
    steps: int
    seconds: float = 0.0
    device: str = ""


@dataclass(frozen=True, kw_only=True)
class StageCommitted:
    """``stage`` of ``job_id`` is in the store; ``chunk``: the one that is clean now, if any.

    seconds: what computing it took; 0 if it was in the store already, or its worker was lost.
    """

    job_id: str
    stage: int
    chunk: int | None
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _AttemptEnded:
    """``seconds``: what the attempt took."""

    worker: str
    task: Task
    attempt: int
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TaskDone(_AttemptEnded):
    """Everything the task asked for is in the store."""


@dataclass(frozen=True, kw_only=True)
class TaskStopped(_AttemptEnded):
    """The worker stopped early, as asked. What it committed stays."""


@dataclass(frozen=True, kw_only=True)
class TaskFailed(_AttemptEnded):
    """The task failed. ``log``: the worker's log file, as in ``WorkerPlaced``."""

    failure: FailureClass
    message: str
    log: str = ""


# From the cluster, the store and users.


@dataclass(frozen=True, kw_only=True)
class NodesSeen:
    """The nodes large enough for a worker of ``kind``, busy or not."""

    kind: TaskKind
    nodes: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What the store holds of a row, read just now."""

    row: RowInventory


@dataclass(frozen=True, kw_only=True)
class PauseAsked:
    """Stop denoising after the next commit of each stage, let other tasks end, and begin nothing."""


@dataclass(frozen=True, kw_only=True)
class CancelAsked:
    """Stop now, whatever is being computed."""


WorkerEvent = WorkerPlaced | WorkerReady | WorkerGone | StepDone | StageCommitted | TaskDone | TaskStopped | TaskFailed
Event = WorkerEvent | NodesSeen | Inspected | PauseAsked | CancelAsked
