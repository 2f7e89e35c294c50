"""The scheduler: which workers there are, and which does what next. Pure: no Ray, no clock, no store, no tensors.

``Scheduler.handle(event)`` takes one thing that happened and returns the commands to carry out now; ``loop.py`` does.

A row goes embed → denoise → finish; each chunk that denoising completes is decoded beside it. Denoising a row never
waits for its decoding: a queued decode is only a chunk number, the latent is in the store.

A row is not tried again on a node where a task of it failed in a way that may be the node's fault, and a node where
several rows had such failures gets no more work, as long as there is another one. After an error of the store the row
is looked up there (``Inspect``), and what is missing is made again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from heapq import heappop, heappush

from magi_ray.errors import FailureClass, MagiRayError, StoreUnwritable, WorkerLost
from magi_ray.events import (
    CancelAsked,
    Event,
    Inspected,
    NodesSeen,
    PauseAsked,
    RowInventory,
    StageCommitted,
    StepDone,
    Task,
    TaskDone,
    TaskFailed,
    TaskKind,
    TaskStopped,
    WorkerGone,
    WorkerPlaced,
    WorkerReady,
)

# Commands -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StartWorker:
    """Start a worker of ``kind`` under the name ``worker``, on none of the nodes ``avoid``."""

    worker: str
    kind: TaskKind
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class StopWorker:
    """End ``worker`` now, whatever it is doing. Its later events are ignored."""

    worker: str


@dataclass(frozen=True, kw_only=True)
class RunTask:
    """Give ``task`` to the idle ``worker``, as attempt number ``attempt``."""

    worker: str
    task: Task
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Abandon:
    """Ask ``worker`` to stop denoising in ``attempt``: after the current step, or with ``to_stage_end`` after the next
    commit of a stage. Tasks of other kinds run to their end."""

    worker: str
    attempt: int
    to_stage_end: bool = False


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Look up what the store holds of ``job_id`` and report it with Inspected."""

    job_id: str


@dataclass(frozen=True, kw_only=True)
class RowFailed:
    """``job_id`` has used up its budget. ``index`` as in Task; ``stage``: the first affected, None if finishing failed.
    ``log``: where its worker wrote."""

    job_id: str
    kind: TaskKind
    index: int
    stage: int | None
    failure: FailureClass
    message: str
    attempts: int
    log: str = ""


@dataclass(frozen=True, kw_only=True)
class EndRun:
    """Give the run up: workers of some kind cannot start, or nothing can be written."""

    error: MagiRayError


Command = StartWorker | StopWorker | RunTask | Abandon | Inspect | RowFailed | EndRun

# How many failures of each class a task may have; the next one fails its row. None: any number. Denoising that got
# further is another task, so that a long video does not use up its budget over days of small mishaps.
BUDGETS: Mapping[FailureClass, int | None] = {
    FailureClass.PREEMPTED: None,
    FailureClass.INFRASTRUCTURE: 5,
    FailureClass.STORE: 5,
    FailureClass.UNWRITABLE: None,  # it ends the run
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
# A node where tasks of this many rows have failed gets no more work.
ROWS_FAILED_ON_BAD_NODE = 3
# When this many workers of a kind have failed to start, one after the other, the run is given up.
MAX_FAILED_STARTS = 3
# A short run is mostly start-up, so decoders begin to load once a denoiser is ready, and finishers once a decoder is.
_STARTS_AFTER = {TaskKind.DECODE: TaskKind.DENOISE, TaskKind.FINISH: TaskKind.DECODE}
ONE_OF_EACH: Mapping[TaskKind, int] = dict.fromkeys(TaskKind, 1)
_LOGGED_EVENTS = 60


class RunState(StrEnum):
    """How a run stands, in the words of `progress.json`. done: every video is.  failed: no row is left to render, but
    some have failed.  broken: stopped because too many had."""

    RENDERING = "rendering"
    DONE = "done"
    FAILED = "failed"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    BROKEN = "broken"


@dataclass
class _Row:
    """Progress of one row. ``running``: what workers are doing for it now; ``inspecting``: an Inspect is pending;
    ``redo``: the stage to go on from once the denoising under way has ended; ``avoid``: nodes on which it failed."""

    row: RowInventory
    order: tuple[int, int]
    embedded: bool
    stages_done: int
    segments: set[int]
    published: bool
    failed: bool = False
    running: set[Task] = field(default_factory=set)
    inspecting: bool = False
    failures: Counter[tuple[Task, FailureClass]] = field(default_factory=Counter)
    avoid: set[str] = field(default_factory=set)
    redo: int | None = None

    @property
    def ended(self) -> bool:
        return self.published or self.failed

    def needs(self, kind: TaskKind) -> bool:
        """Whether this row may still ask for work of ``kind``."""
        if self.ended:
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


@dataclass
class _Worker:
    """``task``: what it is doing, as attempt number ``attempt``; it is idle when it is ``ready`` and has none."""

    kind: TaskKind
    avoid: frozenset[str]
    node: str = ""
    ready: bool = False
    task: Task | None = None
    attempt: int = 0


class Scheduler:
    """State of one run. Rows are taken by priority (higher first), then in the manifest's order.

    workers: how many of each kind there are to be.  max_failed_rows: if more fail, the run stops.
    Sets of the rows that still need each kind of work are kept up to date, so that an event costs the same in a
    manifest of three rows and of a hundred thousand.
    """

    def __init__(
        self,
        rows: Sequence[RowInventory],
        *,
        workers: Mapping[TaskKind, int] = ONE_OF_EACH,
        max_failed_rows: int | None = None,
    ) -> None:
        self._rows: dict[str, _Row] = {}
        self._needing: dict[TaskKind, set[str]] = {kind: set() for kind in TaskKind}
        self._waiting: dict[TaskKind, list[tuple[tuple[int, int], int, Task]]] = {kind: [] for kind in TaskKind}
        self._queued: set[Task] = set()
        self._wanted = workers
        self._workers: dict[str, _Worker] = {}
        self._idle: dict[TaskKind, dict[str, None]] = {kind: {} for kind in TaskKind}
        self._count, self._busy, self._started = Counter[TaskKind](), Counter[TaskKind](), Counter[TaskKind]()
        self._attempts = 0
        self._loaded: set[TaskKind] = set()
        self._failed_starts = Counter[TaskKind]()
        self._nodes: dict[TaskKind, frozenset[str]] = dict.fromkeys(TaskKind, frozenset())
        self._full_nodes: dict[TaskKind, frozenset[str]] = dict.fromkeys(TaskKind, frozenset())
        self._failed_on: dict[str, set[str]] = {}
        self._halted: RunState | None = None
        self._max_failed, self._rows_failed = max_failed_rows, 0
        self._log: deque[tuple[Event | None, list[Command]]] = deque(maxlen=_LOGGED_EVENTS)
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
            self._update_needs(state)
            self._enqueue_remaining(state)

    @property
    def finished(self) -> bool:
        """Every row is published or failed, or the run was halted, and no worker is busy; or the run was cancelled."""
        if self._halted is RunState.CANCELLED:
            return True
        return not self._busy.total() and (self._halted is not None or not self._needing[TaskKind.FINISH])

    @property
    def state(self) -> RunState:
        """DONE or FAILED once every row has ended, even if a pause was asked for."""
        if not self._needing[TaskKind.FINISH] and not self._busy.total():
            return RunState.FAILED if any(row.failed for row in self._rows.values()) else RunState.DONE
        return self._halted or RunState.RENDERING

    def task_of(self, worker: str) -> Task | None:
        """What ``worker`` is doing."""
        found = self._workers.get(worker)
        return None if found is None else found.task

    def start(self) -> list[Command]:
        """The commands a run begins with."""
        return self._decide(None, [])

    def handle(self, event: Event) -> list[Command]:
        """Take note of ``event``; return what is to be done now."""
        commands: list[Command] = []
        match event:
            case StepDone():
                return commands  # for observers
            case WorkerPlaced(worker=worker, node=node):
                self._workers[worker].node = node
            case WorkerReady(worker=worker):
                self._ready(worker)
            case WorkerGone():
                self._gone(event, commands)
            case NodesSeen(kind=kind, nodes=nodes):
                self._nodes[kind] = nodes
            case StageCommitted():
                self._committed(event)
            case TaskDone(worker=worker):
                self._done(self._free(worker, event.attempt))
            case TaskStopped(worker=worker):
                self._stopped(self._free(worker, event.attempt))
            case TaskFailed(worker=worker):
                node = self._workers[worker].node
                self._failed(self._free(worker, event.attempt), event, node, commands)
            case Inspected(row=row):
                self._inspected(row)
            case PauseAsked():
                self._halt(RunState.PAUSED, commands)
            case CancelAsked():
                self._halted = RunState.CANCELLED
        return self._decide(event, commands)

    def _decide(self, event: Event | None, commands: list[Command]) -> list[Command]:
        if self._halted is None:
            self._assign(commands)
        self._adjust_workers(commands)
        self._log.append((event, commands))
        return commands

    # Rows ----------------------------------------------------------------------------------------------------

    def _enqueue_remaining(self, state: _Row) -> None:
        if state.ended:
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
        self._update_needs(state)
        if event.chunk is not None and event.chunk not in state.segments and not state.ended:
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
                self._apply_redo(state)
                self._enqueue_denoising(state)
        self._update_needs(state)

    def _stopped(self, task: Task) -> None:
        state = self._rows[task.job_id]
        self._apply_redo(state)
        self._enqueue_denoising(state)

    def _failed(self, task: Task, event: TaskFailed | WorkerGone, node: str, commands: list[Command]) -> None:
        state, failure = self._rows[task.job_id], event.failure
        if state.ended:
            return
        if failure is FailureClass.UNWRITABLE:
            # It would fail row after row, and the run's own records cannot be written either. No row is charged.
            commands.append(EndRun(error=StoreUnwritable(event.message)))
        if task.kind is TaskKind.DENOISE:
            self._apply_redo(state)
            if not state.needs(TaskKind.DENOISE):
                return  # every stage was committed before it failed
            # Denoising goes on after the last stage committed meanwhile, not where the lost attempt began.
            task = Task(kind=TaskKind.DENOISE, job_id=task.job_id, index=state.stages_done)
        if node and failure in _OF_THE_NODE:
            state.avoid.add(node)
            self._failed_on.setdefault(node, set()).add(task.job_id)
        state.failures[task, failure] += 1
        budget = BUDGETS[failure]
        if budget is None or state.failures[task, failure] <= budget:
            if failure is FailureClass.STORE:
                # Perhaps something it read is damaged or gone, and must be made again first.
                state.inspecting = True
                commands.append(Inspect(job_id=task.job_id))
            elif task.kind is TaskKind.DENOISE:
                self._enqueue_denoising(state)
            else:
                self._enqueue(task)
            return
        state.failed = True
        self._update_needs(state)
        commands += self._abandon(lambda other: other.job_id == task.job_id, to_stage_end=False)
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
        state.inspecting = False
        if state.ended:
            return
        state.embedded, state.segments, state.published = row.embedded, set(row.segments_done), row.published
        if any(task.kind is TaskKind.DENOISE for task in state.running):
            # No progress is lost: denoising skips the stages that are intact.
            state.redo = row.stages_done if row.stages_done < state.stages_done else None
        else:
            state.stages_done = row.stages_done
        self._update_needs(state)
        self._enqueue_remaining(state)

    def _apply_redo(self, state: _Row) -> None:
        if state.redo is not None:
            state.stages_done, state.redo = state.redo, None
            self._update_needs(state)

    def _halt(self, why: RunState, commands: list[Command]) -> None:
        if self._halted is None:
            self._halted = why
            commands += self._abandon(lambda task: task.kind is TaskKind.DENOISE, to_stage_end=True)

    def _abandon(self, which: Callable[[Task], bool], *, to_stage_end: bool) -> list[Command]:
        return [
            Abandon(worker=name, attempt=worker.attempt, to_stage_end=to_stage_end)
            for name, worker in self._workers.items()
            if worker.task is not None and which(worker.task)
        ]

    def _finish_if_complete(self, state: _Row) -> None:
        if not state.ended and len(state.segments) == state.row.num_chunks:
            self._enqueue(Task(kind=TaskKind.FINISH, job_id=state.row.job_id))

    def _update_needs(self, state: _Row) -> None:
        for kind, needing in self._needing.items():
            if state.needs(kind):
                needing.add(state.row.job_id)
            else:
                needing.discard(state.row.job_id)

    # The queue -----------------------------------------------------------------------------------------------

    def _enqueue_denoising(self, state: _Row) -> None:
        # Queued without its stage, which may change before it is given to a worker.
        if state.needs(TaskKind.DENOISE) and not any(task.kind is TaskKind.DENOISE for task in state.running):
            self._enqueue(Task(kind=TaskKind.DENOISE, job_id=state.row.job_id))

    def _enqueue(self, task: Task) -> None:
        state = self._rows[task.job_id]
        if task not in state.running and task not in self._queued:
            self._queued.add(task)
            heappush(self._waiting[task.kind], (state.order, task.index, task))

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
                name = next((name for name in idle if self._workers[name].node not in avoid), None)
                if name is None:
                    passed_over.append(entry)
                    continue
                self._queued.discard(task)
                if kind is TaskKind.DENOISE:
                    task = replace(task, index=state.stages_done)
                commands.append(self._give(name, task, state))
            for entry in passed_over:
                heappush(waiting, entry)
            if passed_over and idle:
                # It is on a node that everything waiting must avoid.
                self._stop(next(iter(idle)), commands)
                self._start(kind, commands)

    def _give(self, name: str, task: Task, state: _Row) -> RunTask:
        worker = self._workers[name]
        self._attempts += 1
        worker.task, worker.attempt = task, self._attempts
        del self._idle[task.kind][name]
        self._busy[task.kind] += 1
        state.running.add(task)
        return RunTask(worker=name, task=task, attempt=worker.attempt)

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

    # Workers -------------------------------------------------------------------------------------------------

    def _needs(self, kind: TaskKind) -> bool:
        """Whether any row may still ask for work of ``kind``."""
        return self._halted is None and bool(self._needing[kind])

    def _adjust_workers(self, commands: list[Command]) -> None:
        """Start the workers that are missing, stop those that no row needs any more."""
        for kind in TaskKind:
            if self._needs(kind):
                before = _STARTS_AFTER.get(kind)
                if before is None or before in self._loaded or not self._needs(before):
                    for _ in range(self._wanted[kind] - self._count[kind]):
                        self._start(kind, commands)
            elif self._count[kind] and not self._busy[kind]:
                for name in [name for name, worker in self._workers.items() if worker.kind is kind]:
                    self._stop(name, commands)

    def _start(self, kind: TaskKind, commands: list[Command]) -> None:
        name, avoid = f"{kind}-{self._started[kind]}", self._avoided_by_next(kind)
        self._started[kind] += 1
        self._count[kind] += 1
        self._workers[name] = _Worker(kind, avoid)
        commands.append(StartWorker(worker=name, kind=kind, avoid=avoid))

    def _stop(self, name: str, commands: list[Command]) -> None:
        self._forget(name)
        commands.append(StopWorker(worker=name))

    def _forget(self, name: str) -> _Worker:
        worker = self._workers.pop(name)
        self._count[worker.kind] -= 1
        self._idle[worker.kind].pop(name, None)
        return worker

    def _ready(self, name: str) -> None:
        worker = self._workers[name]
        worker.ready = True
        self._idle[worker.kind][name] = None
        self._loaded.add(worker.kind)
        self._failed_starts[worker.kind] = 0

    def _free(self, name: str, attempt: int) -> Task:
        """The worker is idle again; what it was doing."""
        worker = self._workers[name]
        task = worker.task
        assert task is not None, self._with_log(f"{name} is idle, but reported attempt {attempt}")
        assert worker.attempt == attempt, self._with_log(f"{name} works on {worker.attempt}, but reported {attempt}")
        worker.task = None
        self._busy[worker.kind] -= 1
        self._rows[task.job_id].running.discard(task)
        self._idle[worker.kind][name] = None
        return task

    def _gone(self, event: WorkerGone, commands: list[Command]) -> None:
        worker = self._workers[event.worker]
        lost = None if worker.task is None else self._free(event.worker, worker.attempt)
        self._forget(event.worker)
        if lost is not None:
            self._failed(lost, event, worker.node, commands)
        elif not worker.ready:
            self._failed_start(worker, event, commands)

    def _failed_start(self, worker: _Worker, event: WorkerGone, commands: list[Command]) -> None:
        kind = worker.kind
        if event.no_room and worker.avoid:
            # There is no room elsewhere: then a node to avoid is better than none.
            self._full_nodes[kind] = self._nodes[kind] - worker.avoid
            return
        self._failed_starts[kind] += 1
        if event.error is not None:
            commands.append(EndRun(error=event.error))
        elif self._failed_starts[kind] >= MAX_FAILED_STARTS:
            lost = WorkerLost(
                f"{MAX_FAILED_STARTS} {kind} workers failed to start, one after the other. The last: {event.message}",
                remedy="Look at the worker's log under /tmp/ray/session_latest/logs.",
            )
            commands.append(EndRun(error=lost))

    def _avoided(self, state: _Row, kind: TaskKind) -> frozenset[str]:
        """The nodes that ``state`` must not be given to; none if there is no other node."""
        bad = {node for node, rows in self._failed_on.items() if len(rows) >= ROWS_FAILED_ON_BAD_NODE}
        avoid = frozenset(state.avoid | bad)
        return frozenset() if self._nodes[kind] - self._full_nodes[kind] <= avoid else avoid

    def _avoided_by_next(self, kind: TaskKind) -> frozenset[str]:
        for _, _, task in self._waiting[kind][:1]:
            return self._avoided(self._rows[task.job_id], kind)
        return frozenset()

    # For tests -----------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raises AssertionError, with the last events, when the state contradicts itself. Looks at every row."""
        for contradiction in (*self._contradictions_of_workers(), *self._contradictions_of_rows()):
            raise AssertionError(self._with_log(contradiction))

    def _contradictions_of_workers(self) -> Iterator[str]:
        for kind in TaskKind:
            of_kind = {name: worker for name, worker in self._workers.items() if worker.kind is kind}
            busy = {name for name, worker in of_kind.items() if worker.task is not None}
            idle = {name for name, worker in of_kind.items() if worker.ready and worker.task is None}
            if idle != self._idle[kind].keys():
                yield f"idle {kind} workers: {idle}, listed: {self._idle[kind]}"
            if len(busy) != self._busy[kind] or len(of_kind) != self._count[kind]:
                yield f"{len(busy)} of {len(of_kind)} {kind} workers work, counted: {self._busy} of {self._count}"
            if len(of_kind) > self._wanted[kind]:
                yield f"{len(of_kind)} {kind} workers, wanted: {self._wanted[kind]}"
            if of_kind and not busy and not self._needs(kind):
                yield f"no row needs {kind}, but {set(of_kind)} are there"
        attempts = [worker.attempt for worker in self._workers.values() if worker.task is not None]
        if len(attempts) != len(set(attempts)):
            yield f"two attempts have one number: {attempts}"

    def _contradictions_of_rows(self) -> Iterator[str]:
        queued = {task for waiting in self._waiting.values() for _, _, task in waiting}
        if queued != self._queued:
            yield f"queued: {queued}, listed: {self._queued}"
        doing: dict[str, set[Task]] = {}
        for worker in self._workers.values():
            if worker.task is not None:
                doing.setdefault(worker.task.job_id, set()).add(worker.task)
        waits = {task.job_id for task in queued}
        for job_id, state in self._rows.items():
            running = doing.get(job_id, set())
            if running != state.running:
                yield f"{running} is done for {job_id}, listed: {state.running}"
            if sum(task.kind is TaskKind.DENOISE for task in running) > 1:
                yield f"two workers denoise {job_id}: {running}"
            if not 0 <= state.stages_done <= state.row.num_stages:
                yield f"{job_id} has {state.stages_done} of {state.row.num_stages} stages"
            if not (state.ended or running or state.inspecting or job_id in waits):
                yield f"{job_id} is unfinished, but neither queued, running nor inspected"
            for kind in TaskKind:
                if state.needs(kind) != (job_id in self._needing[kind]):
                    yield f"{job_id} needs {kind}: {state.needs(kind)}, listed: {self._needing[kind]}"

    def _with_log(self, what: str) -> str:
        events = "\n".join(f"  {event or 'start'}\n    → {commands}" for event, commands in self._log)
        return f"{what}. The last events, and what was decided:\n{events}"


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
