"""The scheduler: which worker does what next. Pure: no Ray, no clock, no store, no tensors.

``Scheduler.handle(event)`` takes one thing that happened and returns what to do about it. `cluster/driver.py` carries
the commands out on Ray, `render/local.py` in one process.

A row goes embed → denoise → finish; each chunk that denoising completes is decoded beside it. Denoising a row never
waits for its decoding: what waits for a decoder is a chunk number, since the latent itself lies in the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from heapq import heappop, heappush

from magi_ray.errors import FailureClass


class Kind(StrEnum):
    """The kinds of work, and of workers."""

    EMBED = "embed"
    DENOISE = "denoise"
    DECODE = "decode"
    FINISH = "finish"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row as the scheduler sees it, with what the store already holds of it."""

    job_id: str
    priority: int
    num_stages: int
    num_chunks: int
    embedded: bool = False
    stages_done: int = 0
    segments_done: frozenset[int] = frozenset()
    published: bool = False


@dataclass(frozen=True, kw_only=True)
class Task:
    """kind denoise: ``index`` is the first stage to compute; decode: the chunk; otherwise unused."""

    kind: Kind
    job_id: str
    index: int = 0


# Events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WorkerReady:
    worker: str
    kind: Kind


@dataclass(frozen=True, kw_only=True)
class WorkerGone:
    """A worker died; whatever it was doing failed with ``failure``."""

    worker: str
    failure: FailureClass
    message: str


@dataclass(frozen=True, kw_only=True)
class StageCommitted:
    """``stage`` of ``job_id`` is in the store; ``chunk`` is the one it completed, if any."""

    job_id: str
    stage: int
    chunk: int | None


@dataclass(frozen=True, kw_only=True)
class TaskDone:
    worker: str
    task: Task


@dataclass(frozen=True, kw_only=True)
class TaskFailed:
    worker: str
    task: Task
    failure: FailureClass
    message: str


Event = WorkerReady | WorkerGone | StageCommitted | TaskDone | TaskFailed


# Commands -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Run:
    """Give ``task`` to the idle ``worker``."""

    worker: str
    task: Task


@dataclass(frozen=True, kw_only=True)
class Abandon:
    """``worker`` is to stop working on ``job_id`` soon: the row has failed elsewhere."""

    worker: str
    job_id: str


@dataclass(frozen=True, kw_only=True)
class Replace:
    """Start another worker of ``kind``."""

    kind: Kind


@dataclass(frozen=True, kw_only=True)
class Release:
    """No work of ``kind`` is left in this run, and none is being done; its workers may go."""

    kind: Kind


@dataclass(frozen=True, kw_only=True)
class RowFailed:
    """``job_id`` has used up its budget. ``index`` as in Task."""

    job_id: str
    kind: Kind
    index: int
    failure: FailureClass
    message: str
    attempts: int


Command = Run | Abandon | Replace | Release | RowFailed

# How often one task may fail in each class before its row does. None: as often as it likes. Denoising that got further
# is another task, so that a long video does not use up its budget over days of small mishaps.
BUDGETS: Mapping[FailureClass, int | None] = {
    FailureClass.PREEMPTED: None,
    FailureClass.INFRASTRUCTURE: 5,
    FailureClass.STORE: 5,
    FailureClass.OUT_OF_MEMORY: 1,
    FailureClass.INPUT: 0,
    FailureClass.CODE: 1,
    FailureClass.NUMERIC: 1,
}


@dataclass
class _Row:
    """Progress of one row. ``running`` holds what workers are doing for it right now."""

    row: Row
    order: tuple[int, int]
    embedded: bool
    stages_done: int
    segments: set[int]
    published: bool
    failed: bool = False
    running: set[Task] = field(default_factory=set)
    failures: Counter[tuple[Task, FailureClass]] = field(default_factory=Counter)

    @property
    def over(self) -> bool:
        return self.published or self.failed

    def needs(self, kind: Kind) -> bool:
        """Whether this row may still ask for work of ``kind``."""
        if self.over:
            return False
        match kind:
            case Kind.EMBED:
                return not self.embedded and self.stages_done < self.row.num_stages
            case Kind.DENOISE:
                return self.stages_done < self.row.num_stages
            case Kind.DECODE:
                return len(self.segments) < self.row.num_chunks
            case Kind.FINISH:
                return True


class Scheduler:
    """State of one run. Rows are taken by priority (higher first), then in the manifest's order.

    Sets of the rows that still need each kind of work are kept up to date, so that an event costs the same in a
    manifest of three rows and of a hundred thousand.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows: dict[str, _Row] = {}
        self._needing: dict[Kind, set[str]] = {kind: set() for kind in Kind}
        self._waiting: dict[Kind, list[tuple[tuple[int, int], int, Task]]] = {kind: [] for kind in Kind}
        self._queued: set[Task] = set()
        self._idle: dict[Kind, dict[str, None]] = {kind: {} for kind in Kind}
        self._busy: dict[str, Task] = {}
        self._kinds: dict[str, Kind] = {}
        self._released: set[Kind] = set()
        for number, row in enumerate(rows):
            state = self._rows[row.job_id] = _Row(
                row=row,
                order=(-row.priority, number),
                embedded=row.embedded,
                stages_done=row.stages_done,
                segments=set(row.segments_done),
                published=row.published,
            )
            self._note(state)
            if state.over:
                continue
            if state.needs(Kind.EMBED):
                self._enqueue(Task(kind=Kind.EMBED, job_id=row.job_id))
            elif state.needs(Kind.DENOISE):
                self._enqueue(Task(kind=Kind.DENOISE, job_id=row.job_id, index=state.stages_done))
            clean = row.num_chunks - (row.num_stages - state.stages_done)
            for chunk in range(clean):
                if chunk not in state.segments:
                    self._enqueue(Task(kind=Kind.DECODE, job_id=row.job_id, index=chunk))
            self._finish_if_complete(state)

    @property
    def finished(self) -> bool:
        """Every row is published or failed, and no worker is busy."""
        return not self._needing[Kind.FINISH] and not self._busy

    def needs(self, kind: Kind) -> bool:
        """Whether any row may still ask for work of ``kind``."""
        return bool(self._needing[kind])

    def handle(self, event: Event) -> list[Command]:
        """Take note of ``event``; return what is to be done now."""
        commands: list[Command] = []
        match event:
            case WorkerReady(worker=worker, kind=kind):
                self._kinds[worker] = kind
                self._idle[kind][worker] = None
            case StageCommitted():
                self._committed(event)
            case TaskDone(worker=worker, task=task):
                self._free(worker)
                self._done(task)
            case TaskFailed(worker=worker, task=task):
                self._free(worker)
                self._failed(task, event.failure, event.message, commands)
            case WorkerGone(worker=worker):
                lost = self._busy.get(worker)
                self._free(worker)
                kind = self._kinds.pop(worker)
                del self._idle[kind][worker]
                if lost is not None:
                    self._failed(lost, event.failure, event.message, commands)
                if self.needs(kind):
                    commands.append(Replace(kind=kind))
        self._assign(commands)
        working = {task.kind for task in self._busy.values()}
        for kind in Kind:
            if kind not in self._released and kind not in working and not self.needs(kind):
                self._released.add(kind)
                commands.append(Release(kind=kind))
        return commands

    # ---------------------------------------------------------------------------------------------------------

    def _committed(self, event: StageCommitted) -> None:
        state = self._rows[event.job_id]
        state.stages_done = max(state.stages_done, event.stage + 1)
        self._note(state)
        if event.chunk is not None and event.chunk not in state.segments and not state.over:
            self._enqueue(Task(kind=Kind.DECODE, job_id=event.job_id, index=event.chunk))

    def _done(self, task: Task) -> None:
        state = self._rows[task.job_id]
        match task.kind:
            case Kind.EMBED:
                state.embedded = True
                if state.needs(Kind.DENOISE):
                    self._enqueue(Task(kind=Kind.DENOISE, job_id=task.job_id, index=state.stages_done))
            case Kind.DECODE:
                state.segments.add(task.index)
                self._finish_if_complete(state)
            case Kind.FINISH:
                state.published = True
            case Kind.DENOISE:
                pass  # its stages were noted one by one
        self._note(state)

    def _failed(self, task: Task, failure: FailureClass, message: str, commands: list[Command]) -> None:
        state = self._rows[task.job_id]
        if state.over:
            return
        if task.kind is Kind.DENOISE:
            if not state.needs(Kind.DENOISE):
                return  # every stage was committed before it failed
            # Denoising goes on behind what was committed meanwhile, not where the lost attempt began.
            task = Task(kind=Kind.DENOISE, job_id=task.job_id, index=state.stages_done)
        state.failures[task, failure] += 1
        budget = BUDGETS[failure]
        if budget is None or state.failures[task, failure] <= budget:
            self._enqueue(task)
            return
        state.failed = True
        self._note(state)
        commands += [
            Abandon(worker=worker, job_id=task.job_id)
            for worker, other in self._busy.items()
            if other.job_id == task.job_id
        ]
        commands.append(
            RowFailed(
                job_id=task.job_id,
                kind=task.kind,
                index=task.index,
                failure=failure,
                message=message,
                attempts=sum(count for (failed, _), count in state.failures.items() if failed == task),
            )
        )

    def _finish_if_complete(self, state: _Row) -> None:
        if not state.over and len(state.segments) == state.row.num_chunks:
            self._enqueue(Task(kind=Kind.FINISH, job_id=state.row.job_id))

    def _note(self, state: _Row) -> None:
        for kind, needing in self._needing.items():
            if state.needs(kind):
                needing.add(state.row.job_id)
            else:
                needing.discard(state.row.job_id)

    def _enqueue(self, task: Task) -> None:
        state = self._rows[task.job_id]
        if task not in state.running and task not in self._queued:
            self._queued.add(task)
            heappush(self._waiting[task.kind], (state.order, task.index, task))

    def _free(self, worker: str) -> None:
        task = self._busy.pop(worker, None)
        if task is not None:
            self._rows[task.job_id].running.discard(task)
        self._idle[self._kinds[worker]][worker] = None

    def _assign(self, commands: list[Command]) -> None:
        for kind in Kind:
            idle, waiting = self._idle[kind], self._waiting[kind]
            while idle and waiting:
                _, _, task = heappop(waiting)
                self._queued.discard(task)
                state = self._rows[task.job_id]
                if state.over:
                    continue
                worker = next(iter(idle))
                del idle[worker]
                self._busy[worker] = task
                state.running.add(task)
                commands.append(Run(worker=worker, task=task))
