"""The scheduler: which worker does what next. Pure: no Ray, no clock, no store, no tensors.

``Scheduler.handle(event)`` takes one thing that happened and returns what to do about it. `cluster/driver.py` carries
the commands out on Ray, `render/local.py` in one process.

A row goes embed → denoise → finish; each chunk that denoising completes is decoded beside it. Denoising a row never
waits for its decoding: what waits for a decoder is a chunk number, since the latent itself lies in the store.

A row that failed on a node is not tried there again, and a node where several rows failed is left alone, as long as
there is another one. What the store turned out not to hold after all is looked up (``Inspect``) and made again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from heapq import heappop, heappush

from magi_ray.errors import FailureClass
from magi_ray.events import StageCommitted, Task, TaskKind


@dataclass(frozen=True, kw_only=True)
class RowInventory:
    """A row as the scheduler sees it, with what the store already holds of it. ``failed``: before, and not to be tried
    again."""

    job_id: str
    priority: int
    num_stages: int
    num_chunks: int
    embedded: bool = False
    stages_done: int = 0
    segments_done: frozenset[int] = frozenset()
    published: bool = False
    failed: bool = False


# Events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WorkerReady:
    """``node``: the id of the machine it is on."""

    worker: str
    kind: TaskKind
    node: str = ""


@dataclass(frozen=True, kw_only=True)
class WorkerGone:
    """A worker died; whatever it was doing failed with ``failure``. ``log``: where it wrote."""

    worker: str
    failure: FailureClass
    message: str
    log: str = ""


@dataclass(frozen=True, kw_only=True)
class NodesSeen:
    """The nodes that have what a worker of ``kind`` needs."""

    kind: TaskKind
    nodes: frozenset[str]


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
    log: str = ""


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


Event = (
    WorkerReady | WorkerGone | NodesSeen | StageCommitted | TaskDone | TaskFailed | Inspected | PauseAsked | CancelAsked
)


# Commands -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunTask:
    """Give ``task`` to the idle ``worker``."""

    worker: str
    task: Task


@dataclass(frozen=True, kw_only=True)
class Abandon:
    """``worker`` is to stop working on ``job_id`` soon: the row has failed elsewhere, or the run pauses, and then it
    goes on ``to_stage_end``."""

    worker: str
    job_id: str
    to_stage_end: bool = False


@dataclass(frozen=True, kw_only=True)
class Replace:
    """Start another worker of ``kind``, on none of the nodes ``avoid``; stop ``worker`` first, if one is named."""

    kind: TaskKind
    worker: str | None = None
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Look up what the store holds of ``job_id`` and report it with Inspected."""

    job_id: str


@dataclass(frozen=True, kw_only=True)
class Release:
    """No work of ``kind`` is left in this run, and none is being done; its workers may go."""

    kind: TaskKind


@dataclass(frozen=True, kw_only=True)
class RowFailed:
    """``job_id`` has used up its budget. ``index`` as in Task; ``stage``: the first that failed, None when joining did.
    ``log``: where its worker wrote."""

    job_id: str
    kind: TaskKind
    index: int
    stage: int | None
    failure: FailureClass
    message: str
    attempts: int
    log: str = ""


Command = RunTask | Abandon | Replace | Inspect | Release | RowFailed

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

# Failures of these classes may be the node's fault.
_OF_THE_NODE = {
    FailureClass.INFRASTRUCTURE,
    FailureClass.OUT_OF_MEMORY,
    FailureClass.CODE,
    FailureClass.NUMERIC,
}
# A node on which this many rows have failed is left alone.
ROWS_FAILED_ON_BAD_NODE = 3


class RunState(StrEnum):
    """How a run stands, in the words of `progress.json`."""

    RENDERING = "rendering"
    DONE = "done"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    BROKEN = "broken"


@dataclass
class _Row:
    """Progress of one row. ``running`` holds what workers are doing for it right now; ``redo``: the stage to go on from
    once the denoising under way has ended; ``avoid``: nodes on which it failed."""

    row: RowInventory
    order: tuple[int, int]
    embedded: bool
    stages_done: int
    segments: set[int]
    published: bool
    failed: bool = False
    running: set[Task] = field(default_factory=set)
    failures: Counter[tuple[Task, FailureClass]] = field(default_factory=Counter)
    avoid: set[str] = field(default_factory=set)
    redo: int | None = None

    @property
    def over(self) -> bool:
        return self.published or self.failed

    def needs(self, kind: TaskKind) -> bool:
        """Whether this row may still ask for work of ``kind``."""
        if self.over:
            return False
        match kind:
            case TaskKind.EMBED:
                return not self.embedded and self.stages_done < self.row.num_stages
            case TaskKind.DENOISE:
                return self.stages_done < self.row.num_stages
            case TaskKind.DECODE:
                return len(self.segments) < self.row.num_chunks
            case TaskKind.FINISH:
                return True


class Scheduler:
    """State of one run. Rows are taken by priority (higher first), then in the manifest's order.

    Sets of the rows that still need each kind of work are kept up to date, so that an event costs the same in a
    manifest of three rows and of a hundred thousand.
    """

    def __init__(self, rows: Sequence[RowInventory], *, max_failed_rows: int | None = None) -> None:
        self._rows: dict[str, _Row] = {}
        self._needing: dict[TaskKind, set[str]] = {kind: set() for kind in TaskKind}
        self._waiting: dict[TaskKind, list[tuple[tuple[int, int], int, Task]]] = {kind: [] for kind in TaskKind}
        self._queued: set[Task] = set()
        self._idle: dict[TaskKind, dict[str, None]] = {kind: {} for kind in TaskKind}
        self._busy: dict[str, Task] = {}
        self._kinds: dict[str, TaskKind] = {}
        self._node_of: dict[str, str] = {}
        self._nodes: dict[TaskKind, frozenset[str]] = dict.fromkeys(TaskKind, frozenset())
        self._failed_on: dict[str, set[str]] = {}
        self._released: set[TaskKind] = set()
        self._halted: RunState | None = None
        self._max_failed, self._rows_failed = max_failed_rows, 0
        for number, row in enumerate(rows):
            state = self._rows[row.job_id] = _Row(
                row=row,
                order=(-row.priority, number),
                embedded=row.embedded,
                stages_done=row.stages_done,
                segments=set(row.segments_done),
                published=row.published,
                failed=row.failed,
            )
            self._note(state)
            self._enqueue_what_is_left(state)

    @property
    def finished(self) -> bool:
        """Every row is published or failed and no worker is busy; or the run was halted and has come to rest."""
        if self._halted is RunState.CANCELLED:
            return True
        return not self._busy and (self._halted is not None or not self._needing[TaskKind.FINISH])

    @property
    def state(self) -> RunState:
        """Paused and the like only until the last row has ended all the same."""
        if not self._needing[TaskKind.FINISH] and not self._busy:
            return RunState.DONE
        return self._halted or RunState.RENDERING

    def needs(self, kind: TaskKind) -> bool:
        """Whether any row may still ask for work of ``kind``."""
        return self._halted is None and bool(self._needing[kind])

    def handle(self, event: Event) -> list[Command]:
        """Take note of ``event``; return what is to be done now."""
        commands: list[Command] = []
        match event:
            case WorkerReady(worker=worker, kind=kind, node=node):
                self._kinds[worker], self._node_of[worker] = kind, node
                self._idle[kind][worker] = None
            case NodesSeen(kind=kind, nodes=nodes):
                self._nodes[kind] = nodes
            case StageCommitted():
                self._committed(event)
            case TaskDone(worker=worker, task=task):
                self._free(worker)
                self._done(task)
            case TaskFailed(worker=worker, task=task):
                self._free(worker)
                self._failed(task, event, self._node_of[worker], commands)
            case WorkerGone():
                self._gone(event, commands)
            case Inspected(row=row):
                self._inspected(row)
            case PauseAsked():
                self._halt(RunState.PAUSED, commands)
            case CancelAsked():
                self._halted = RunState.CANCELLED
        if self._halted is None:
            self._assign(commands)
        self._release(commands)
        return commands

    # ---------------------------------------------------------------------------------------------------------

    def _enqueue_what_is_left(self, state: _Row) -> None:
        if state.over:
            return
        if state.needs(TaskKind.EMBED):
            self._enqueue(Task(kind=TaskKind.EMBED, job_id=state.row.job_id))
        else:
            self._enqueue_denoising(state)
        clean = state.row.num_chunks - (state.row.num_stages - state.stages_done)
        for chunk in range(clean):
            if chunk not in state.segments:
                self._enqueue(Task(kind=TaskKind.DECODE, job_id=state.row.job_id, index=chunk))
        self._finish_if_complete(state)

    def _committed(self, event: StageCommitted) -> None:
        state = self._rows[event.job_id]
        state.stages_done = max(state.stages_done, event.stage + 1)
        self._note(state)
        if event.chunk is not None and event.chunk not in state.segments and not state.over:
            self._enqueue(Task(kind=TaskKind.DECODE, job_id=event.job_id, index=event.chunk))

    def _done(self, task: Task) -> None:
        state = self._rows[task.job_id]
        match task.kind:
            case TaskKind.EMBED:
                state.embedded = True
                self._enqueue_denoising(state)
            case TaskKind.DECODE:
                state.segments.add(task.index)
                self._finish_if_complete(state)
            case TaskKind.FINISH:
                state.published = True
            case TaskKind.DENOISE:
                # Its stages were noted one by one.
                self._go_back(state)
                self._enqueue_denoising(state)
        self._note(state)

    def _gone(self, event: WorkerGone, commands: list[Command]) -> None:
        lost = self._busy.get(event.worker)
        self._free(event.worker)
        kind, node = self._forget(event.worker)
        if lost is not None:
            self._failed(lost, event, node, commands)
        if self.needs(kind):
            commands.append(Replace(kind=kind, avoid=self._avoided_by_next(kind)))

    def _failed(self, task: Task, event: TaskFailed | WorkerGone, node: str, commands: list[Command]) -> None:
        state, failure = self._rows[task.job_id], event.failure
        if state.over:
            return
        if task.kind is TaskKind.DENOISE:
            self._go_back(state)
            if not state.needs(TaskKind.DENOISE):
                return  # every stage was committed before it failed
            # Denoising goes on behind what was committed meanwhile, not where the lost attempt began.
            task = Task(kind=TaskKind.DENOISE, job_id=task.job_id, index=state.stages_done)
        if node and failure in _OF_THE_NODE:
            state.avoid.add(node)
            self._failed_on.setdefault(node, set()).add(task.job_id)
        state.failures[task, failure] += 1
        budget = BUDGETS[failure]
        if budget is None or state.failures[task, failure] <= budget:
            if failure is FailureClass.STORE:
                # Perhaps something it read is damaged or gone, and must be made again first.
                commands.append(Inspect(job_id=task.job_id))
            elif task.kind is TaskKind.DENOISE:
                self._enqueue_denoising(state)
            else:
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
                stage=_stage_of(task, state.row),
                failure=failure,
                message=event.message,
                attempts=sum(count for (failed, _), count in state.failures.items() if failed == task),
                log=event.log,
            )
        )
        self._rows_failed += 1
        if self._max_failed is not None and self._rows_failed > self._max_failed:
            self._halt(RunState.BROKEN, commands)

    def _inspected(self, row: RowInventory) -> None:
        state = self._rows[row.job_id]
        if state.over:
            return
        state.embedded, state.segments, state.published = row.embedded, set(row.segments_done), row.published
        if any(task.kind is TaskKind.DENOISE for task in state.running):
            # What it has reached is not lost: denoising passes over the stages that are whole.
            state.redo = row.stages_done if row.stages_done < state.stages_done else None
        else:
            state.stages_done = row.stages_done
        self._note(state)
        self._enqueue_what_is_left(state)

    def _go_back(self, state: _Row) -> None:
        if state.redo is not None:
            state.stages_done, state.redo = state.redo, None
            self._note(state)

    def _halt(self, why: RunState, commands: list[Command]) -> None:
        self._halted = self._halted or why
        commands += [
            Abandon(worker=worker, job_id=task.job_id, to_stage_end=True)
            for worker, task in self._busy.items()
            if task.kind is TaskKind.DENOISE
        ]

    def _finish_if_complete(self, state: _Row) -> None:
        if not state.over and len(state.segments) == state.row.num_chunks:
            self._enqueue(Task(kind=TaskKind.FINISH, job_id=state.row.job_id))

    def _note(self, state: _Row) -> None:
        for kind, needing in self._needing.items():
            if state.needs(kind):
                needing.add(state.row.job_id)
            else:
                needing.discard(state.row.job_id)

    def _enqueue_denoising(self, state: _Row) -> None:
        # Queued without its stage, which may change before it is given to a worker.
        if state.needs(TaskKind.DENOISE) and not any(task.kind is TaskKind.DENOISE for task in state.running):
            self._enqueue(Task(kind=TaskKind.DENOISE, job_id=state.row.job_id))

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

    def _forget(self, worker: str) -> tuple[TaskKind, str]:
        """TaskKind and node of an idle worker that is to be no more."""
        kind = self._kinds.pop(worker)
        del self._idle[kind][worker]
        return kind, self._node_of.pop(worker)

    def _assign(self, commands: list[Command]) -> None:
        for kind in TaskKind:
            idle, waiting = self._idle[kind], self._waiting[kind]
            passed_over = []
            while idle and waiting:
                entry = heappop(waiting)
                task = entry[-1]
                state = self._rows[task.job_id]
                if not self._is_due(task, state):
                    self._queued.discard(task)
                    continue
                avoid = self._avoided(state, kind)
                worker = next((name for name in idle if self._node_of[name] not in avoid), None)
                if worker is None:
                    passed_over.append(entry)
                    continue
                self._queued.discard(task)
                if kind is TaskKind.DENOISE:
                    task = replace(task, index=state.stages_done)
                del idle[worker]
                self._busy[worker] = task
                state.running.add(task)
                commands.append(RunTask(worker=worker, task=task))
            for entry in passed_over:
                heappush(waiting, entry)
            if passed_over and idle:
                # It sits where what waits must not go.
                worker = next(iter(idle))
                self._forget(worker)
                commands.append(Replace(kind=kind, worker=worker, avoid=self._avoided_by_next(kind)))

    def _release(self, commands: list[Command]) -> None:
        """Let go of the workers that no row needs any more; call for one again when what it made turned out lost."""
        working = {task.kind for task in self._busy.values()}
        for kind in TaskKind:
            if self.needs(kind):
                if kind in self._released:
                    self._released.remove(kind)
                    commands.append(Replace(kind=kind, avoid=self._avoided_by_next(kind)))
            elif kind not in self._released and kind not in working:
                self._released.add(kind)
                for worker in list(self._idle[kind]):
                    self._forget(worker)
                commands.append(Release(kind=kind))

    def _is_due(self, task: Task, state: _Row) -> bool:
        """Whether a queued task is still wanted, and its time has come; else it will be queued again in time."""
        if not state.needs(task.kind):
            return False
        match task.kind:
            case TaskKind.DENOISE:
                return not state.needs(TaskKind.EMBED)
            case TaskKind.DECODE:
                return task.index not in state.segments
            case TaskKind.FINISH:
                return len(state.segments) == state.row.num_chunks
            case TaskKind.EMBED:
                return True

    def _avoided(self, state: _Row, kind: TaskKind) -> frozenset[str]:
        """The nodes that ``state`` must not be given to; none if there is no other node."""
        bad = {node for node, rows in self._failed_on.items() if len(rows) >= ROWS_FAILED_ON_BAD_NODE}
        avoid = frozenset(state.avoid | bad)
        return frozenset() if self._nodes[kind] <= avoid else avoid

    def _avoided_by_next(self, kind: TaskKind) -> frozenset[str]:
        for _, _, task in self._waiting[kind][:1]:
            return self._avoided(self._rows[task.job_id], kind)
        return frozenset()


def _stage_of(task: Task, row: RowInventory) -> int | None:
    """The stage that failed: the one that could not begin or be computed, or whose chunk could not be decoded."""
    match task.kind:
        case TaskKind.EMBED:
            return row.stages_done
        case TaskKind.DENOISE:
            return task.index
        case TaskKind.DECODE:
            return task.index + row.num_stages - row.num_chunks
        case TaskKind.FINISH:
            return None
