"""Who acts: drivers, and the workers they start. The loops are those of ``cluster/`` without Ray; the rest is real."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from magi_ray.errors import (
    DeviceOutOfMemory,
    FailureClass,
    InputError,
    NumericError,
    StoreError,
    Superseded,
    failure_class,
)
from magi_ray.events import StageCommitted, Task, TaskKind
from magi_ray.render.artifacts.commits import commit, committed, segment_pre_image
from magi_ray.render.driving.inventory import stages_done, take_stock
from magi_ray.render.driving.requests import requested
from magi_ray.render.driving.scheduler import (
    Abandon,
    CancelAsked,
    Event,
    Inspect,
    Inspected,
    NodesSeen,
    PauseAsked,
    Release,
    Replace,
    RowFailed,
    RowInventory,
    RunState,
    RunTask,
    Scheduler,
    TaskDone,
    TaskFailed,
    WorkerGone,
    WorkerReady,
)
from magi_ray.render.plans import identity
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.tasks.finish import FfmpegJoiner, Finisher
from magi_ray.storage import keys
from magi_ray.storage.epochs import become_driver, superseded
from magi_ray.storage.leases import BEAT_S, Lease, acquire, keep_beating
from magi_ray.storage.records import digest, read_payload, verified_commit
from magi_ray.storage.store import Store

from .material import ENCODER, Contents
from .world import Process, World

if TYPE_CHECKING:
    from .play import Simulation


@dataclass
class Poison:
    """What goes wrong with a row, whoever works on it, ``times`` times. ``at``: the task and its index."""

    at: Task
    failure: FailureClass
    times: int

    def strike(self, worker: Worker, task: Task) -> None:
        if task != self.at or not self.times:
            return
        self.times -= 1
        worker.process.world.note(worker.process.name, "is struck by", self.failure)
        match self.failure:
            case FailureClass.INFRASTRUCTURE:
                worker.process.kill()
                worker.process.breathe()
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


@dataclass(eq=False)
class Attempt:
    """One go at denoising a row. forwards: computed; astray: after another had taken the row.  won: stages whose commit
    it created.  before: the stages that were there when it got the row."""

    worker: str
    process: Process
    plan: RowPlan
    forwards: int = 0
    astray: int = 0
    won: int = 0
    completed: bool = False
    lease: Lease | None = None
    before: set[str] = field(default_factory=set)


class Worker:
    """One kind of work, one task at a time, as ``cluster/actors.py``. ``tell``: how the driver is told."""

    def __init__(self, of: Simulation, driver: Driver, kind: TaskKind, node: str, name: str) -> None:
        self.sim, self.driver, self.kind, self.node = of, driver, kind, node
        self.process = Process(of.world, name, node)
        self.abandoned: set[str] = set()
        self.stopping: set[str] = set()

    @property
    def world(self) -> World:
        return self.sim.world

    def load(self) -> None:
        def work() -> None:
            self.process.sleep(self.world.random.uniform(1, 20))
            self.tell(WorkerReady(worker=self.process.name, kind=self.kind, node=self.node))

        self.process.start(work)

    def tell(self, event: Event) -> None:
        """Events of one worker arrive in order, and none after its death was noticed."""
        self.world.after(0.05, lambda: self.driver.hear(self, event))

    def begin(self, plan: RowPlan, task: Task) -> None:
        def work() -> None:
            try:
                match self.kind:
                    case TaskKind.EMBED:
                        self._embed(self.sim.client(self.process), plan)
                    case TaskKind.DENOISE:
                        self._denoise(plan, task.index)
                    case TaskKind.DECODE:
                        self._decode(self.sim.client(self.process), plan, task)
                    case TaskKind.FINISH:
                        self._finish(self.sim.client(self.process), plan)
            except Exception as exc:  # noqa: BLE001 - as in the driver: sorted by class
                failed = TaskFailed(
                    worker=self.process.name, task=task, failure=failure_class(exc), message=str(exc) or repr(exc)
                )
                self.world.note(self.process.name, "fails at", task.kind, task.job_id, task.index, repr(exc)[:200])
                self.sim.unexpected(exc)
                self.tell(failed)
            else:
                self.tell(TaskDone(worker=self.process.name, task=task))

        self.world.note(self.process.name, "begins", task.kind, task.job_id, task.index)
        self.process.start(work)

    def _strike(self, kind: TaskKind, job_id: str, index: int = 0) -> None:
        for poison in self.sim.poisons:
            poison.strike(self, Task(kind=kind, job_id=job_id, index=index))

    def _embed(self, store: Store, plan: RowPlan) -> None:
        self._strike(TaskKind.EMBED, plan.job_id)
        for key, caption in sorted(set(zip(plan.caption_digests, plan.captions, strict=True))):
            if verified_commit(store, "text", key) is None:
                self.process.sleep(self.world.random.uniform(0.5, 5))
                image = identity.text_pre_image(caption, plan.settings, plan.digests)
                commit(store, "text", image, {"text": Contents.text(key)}, seconds=1.0)
        media, key = plan.media, plan.prefix_digest
        if media is not None and key is not None and verified_commit(store, "prefix", key) is None:
            self.process.sleep(self.world.random.uniform(0.5, 5))
            image = identity.prefix_pre_image(media.kind, media.sha256, plan.settings, plan.digests)
            commit(store, "prefix", image, {"prefix": Contents(plan).prefix()}, seconds=1.0)

    def _denoise(self, plan: RowPlan, first_stage: int) -> None:
        """As ``cluster.actors.DenoiseWorker`` around ``render.denoise.Denoiser``."""
        attempt = Attempt(self.process.name, self.process, plan)
        self.sim.attempts.append(attempt)
        store = self.sim.client(self.process, attempt)
        process = self.process
        lease = acquire(
            store,
            keys.row_lease(self.sim.run.run_id, plan.job_id),
            process.owner,
            epoch=self.driver.epoch,
            clock=process.clock,
            sleep=process.sleep,
            gone=process.gone,
        )
        self.sim.row_taken(attempt, lease)
        with keeping(process, lease):
            attempt.completed = self._stages(store, plan, first_stage, attempt, lease) and lease.valid

    def _stages(self, store: Store, plan: RowPlan, first_stage: int, attempt: Attempt, lease: Lease) -> bool:
        """Whether it came to the end: it may be told to stop."""
        timeline, process = plan.timeline, self.process
        writing: Writing | None = None
        state = b""
        known: int | None = None  # the stage that ``state`` is of
        for stage in range(first_stage, timeline.num_stages):
            if verified_commit(store, "stage", plan.stage_keys[stage]) is not None:
                if writing:
                    writing = self._written(writing)
                self._committed(plan, stage)
                continue
            if writing is None and known != stage - 1:
                state = self._state_before(store, plan, stage)
            entering = timeline.entering(stage)
            caption = b""
            if entering is not None:
                key = plan.caption_digests[entering]
                caption = read_payload(store, committed(store, "text", key), "text")
            for step in range(plan.forwards_per_stage):
                process.sleep(self.sim.step_s * self.world.random.uniform(0.8, 1.2))
                self._strike(TaskKind.DENOISE, plan.job_id, stage)
                self.sim.forward(attempt, stage, step)
                lease.check()
                if plan.job_id in self.abandoned:
                    return False
                if writing:
                    writing = self._written(writing)
                    lease.check()
                    if plan.job_id in self.stopping:
                        return False
            state, known = Contents.next_state(plan, stage, state, caption), stage
            payloads = {"state": state}
            if timeline.finished(stage) is not None:
                payloads["chunk"] = Contents.chunk(state)
            writing = Writing(process, store, plan, stage, payloads)
        if writing:
            self._written(writing)
        return True

    def _written(self, writing: Writing) -> None:
        self.process.join(writing.thread)
        if writing.error is not None:
            raise writing.error
        self._committed(writing.plan, writing.stage)

    def _committed(self, plan: RowPlan, stage: int) -> None:
        self.sim.reported(self.process.name, plan, stage)
        self.tell(StageCommitted(job_id=plan.job_id, stage=stage, chunk=plan.timeline.finished(stage)))

    def _state_before(self, store: Store, plan: RowPlan, stage: int) -> bytes:
        if stage:
            return read_payload(store, committed(store, "stage", plan.stage_keys[stage - 1]), "state")
        if plan.prefix_digest is not None:
            return read_payload(store, committed(store, "prefix", plan.prefix_digest), "prefix")
        return b""

    def _decode(self, store: Store, plan: RowPlan, task: Task) -> None:
        self._strike(TaskKind.DECODE, plan.job_id, task.index)
        image = segment_pre_image(store, plan, task.index, ENCODER)
        if verified_commit(store, "segment", digest(image)) is not None:
            return
        stage = plan.stage_keys[plan.timeline.finishing_stage(task.index)]
        chunk = read_payload(store, committed(store, "stage", stage), "chunk")
        self.process.sleep(self.world.random.uniform(0.5, 8))
        commit(store, "segment", image, {"segment": Contents.segment(chunk)}, seconds=1.0)

    def _finish(self, store: Store, plan: RowPlan) -> None:
        self._strike(TaskKind.FINISH, plan.job_id)
        self.process.sleep(self.world.random.uniform(0.5, 5))
        joiner = FfmpegJoiner(store)
        list(Finisher(store, self.sim.run.run_id, encoder=ENCODER, joiner=joiner).carry_out(plan))


class Writing:
    """A commit under way beside the next stage's first forward."""

    def __init__(self, process: Process, store: Store, plan: RowPlan, stage: int, payloads: dict[str, bytes]) -> None:
        self.plan, self.stage = plan, stage
        self.error: Exception | None = None

        def work() -> None:
            try:
                commit(store, "stage", plan.pre_image(stage), payloads, seconds=1.0)
            except Exception as exc:  # noqa: BLE001 - raised again by who waits for it
                self.error = exc

        self.thread = process.start(work)


class keeping:  # noqa: N801 - stands for leases.keeping, whose thread is one of the system's
    """``leases.keeping`` with a thread of the simulated process."""

    def __init__(self, process: Process, lease: Lease) -> None:
        self.process, self.lease, self.over = process, lease, False
        process.start(lambda: keep_beating(lease, self._wait))

    def _wait(self, seconds: float) -> bool:
        self.process.sleep(seconds)
        return self.over

    def __enter__(self) -> Lease:
        return self.lease

    def __exit__(self, *_: object) -> None:
        self.over = True
        self.lease.release()


class Driver:
    """``cluster/driver.py`` and ``render/session.py`` for one run. ``retry``: rows that failed before are tried again.

    ``state``: how it ended, None while it works or when it died or was superseded.
    """

    def __init__(self, of: Simulation, name: str, *, take_over: bool, retry: bool, started_calm: bool) -> None:
        self.sim, self.take_over, self.retry, self.started_calm = of, take_over, retry, started_calm
        self.process = Process(of.world, name, of.world.random.choice(of.nodes))
        self.epoch = 0
        self.state: RunState | None = None
        self.failed: dict[str, RowFailed] = {}
        self.workers: dict[str, Worker] = {}
        self._inbox: deque[tuple[Worker | None, Event]] = deque()
        self._pending: dict[str, tuple[Task | None, float]] = {}
        self._ready: set[str] = set()
        self._numbers = 0
        self._waits = False
        self.thread = self.process.start(self._work)
        # Ray ends the workers of a driver that died, if it reaches them.
        self.process.on_death.append(lambda: self._stop_workers(1 + of.world.random.expovariate(0.2)))

    @property
    def world(self) -> World:
        return self.sim.world

    def hear(self, worker: Worker, event: Event) -> None:
        if self.process.alive and self.workers.get(worker.process.name) is worker:
            self._inbox.append((worker, event))
            if self._waits:
                self.process.nudge(self.thread)

    def _work(self) -> None:
        process, run_id = self.process, self.sim.run.run_id
        store = self.sim.client(process)
        try:
            lease = become_driver(
                store,
                run_id,
                process.owner,
                take_over=self.take_over,
                clock=process.clock,
                sleep=process.sleep,
                gone=process.gone,
            )
            self.epoch = lease.epoch
            with keeping(process, lease):
                self._drive(store, lease)
        except (StoreError, Superseded) as exc:
            self.world.note(process.name, "gives up:", repr(exc)[:200])
            self.sim.unexpected(exc)
        finally:
            if process.alive:
                self._stop_workers(0.1)

    def _drive(self, store: Store, lease: Lease) -> None:
        run, random = self.sim.run, self.world.random
        rows = [self._take_stock(store, plan) for plan in run.plans.values()]
        if not self.retry:
            rows = [replace(row, failed=row.job_id in self.sim.failed and not row.published) for row in rows]
            self.failed = {row.job_id: self.sim.failed[row.job_id] for row in rows if row.failed}
        self.scheduler = Scheduler(rows)
        for kind in TaskKind:
            self._handle(store, NodesSeen(kind=kind, nodes=frozenset(self.sim.nodes)))
            if self.scheduler.needs(kind):
                for _ in range(random.choice([1, 1, 2]) if kind in (TaskKind.DENOISE, TaskKind.DECODE) else 1):
                    self._start_worker(kind)
        looked = self.process.clock()
        while not self.scheduler.finished:
            while self._inbox and not self.scheduler.finished:
                worker, event = self._inbox.popleft()
                if worker is None or self.workers.get(worker.process.name) is worker:
                    self._receive(store, worker, event)
            if self.scheduler.finished:
                break
            self._waits = True
            self.process.sleep(BEAT_S)
            self._waits = False
            lease.check()
            if self.process.clock() - looked >= BEAT_S:
                looked = self.process.clock()
                if superseded(store, run.run_id, self.epoch):
                    raise Superseded("Another driver has taken over.")
                match requested(store, run.run_id):
                    case "pause":
                        self._inbox.append((None, PauseAsked()))
                    case "cancel":
                        self._inbox.append((None, CancelAsked()))
            for name, (_, deadline) in list(self._pending.items()):
                if self.process.clock() > deadline and name in self.workers:
                    self._lost(store, self.workers[name], FailureClass.INFRASTRUCTURE, "silent for too long")
        lease.check()
        self.state = self.scheduler.state
        self.sim.failed = self.failed
        if self.state is RunState.DONE:
            self.sim.ended.append(self)
        self.world.note(self.process.name, "ends", self.state)

    def _receive(self, store: Store, worker: Worker | None, event: Event) -> None:
        if worker is not None:
            name = worker.process.name
            if isinstance(event, WorkerGone):
                self._lost(store, worker, event.failure, event.message)
                return
            if isinstance(event, WorkerReady | TaskDone | TaskFailed):
                self._pending.pop(name, None)
            elif name in self._pending:
                self._pending[name] = (self._pending[name][0], self.process.clock() + self.sim.silence_s)
        self._handle(store, event)

    def _lost(self, store: Store, worker: Worker, failure: FailureClass, message: str) -> None:
        name = worker.process.name
        task, _ = self._pending.get(name, (None, 0.0))
        self._stop_worker(name, 0.1)
        if name not in self._ready:
            self._start_worker(worker.kind)  # it died while it loaded
            return
        if task is not None and task.kind is TaskKind.DENOISE:
            plan = self.sim.run.plans[task.job_id]
            try:
                done = stages_done(store, plan)
            except StoreError:
                done = 0
            for stage in range(task.index, done):
                chunk = plan.timeline.finished(stage)
                self._handle(store, StageCommitted(job_id=task.job_id, stage=stage, chunk=chunk))
        self._handle(store, WorkerGone(worker=name, failure=failure, message=message))

    def _handle(self, store: Store, event: Event) -> None:
        if isinstance(event, WorkerReady):
            self._ready.add(event.worker)
        for command in self.scheduler.handle(event):
            match command:
                case RunTask(worker=name, task=task):
                    self._pending[name] = (task, self.process.clock() + self.sim.silence_s)
                    worker, plan = self.workers[name], self.sim.run.plans[task.job_id]
                    self.world.after(0.05, _if_alive(worker, worker.begin, plan, task))
                case Replace(kind=kind, worker=name, avoid=avoid):
                    if name is not None:
                        self._stop_worker(name, 0.1)
                    self._start_worker(kind, avoid)
                case Abandon(worker=name, job_id=job_id, to_stage_end=soon):
                    if name in self.workers:  # else it is gone, which the scheduler is told next
                        worker = self.workers[name]
                        (worker.stopping if soon else worker.abandoned).add(job_id)
                case Inspect(job_id=job_id):
                    self._inbox.append((None, Inspected(row=self._take_stock(store, self.sim.run.plans[job_id]))))
                case Release(kind=kind):
                    for name in [name for name, worker in self.workers.items() if worker.kind is kind]:
                        self._stop_worker(name, 0.1)
                case RowFailed():
                    self.world.note(self.process.name, "gives up", command.job_id, command.failure, command.message)
                    self.failed[command.job_id] = command

    def _take_stock(self, store: Store, plan: RowPlan) -> RowInventory:
        before = self.sim.stages_there(plan)
        row = take_stock(store, self.sim.run.run_id, plan, ENCODER)
        if not row.published and not before <= row.stages_done <= self.sim.stages_there(plan):
            self.world.fail(f"{plan.job_id} has {before} stages, but its inventory says {row.stages_done}")
        return row

    def _start_worker(self, kind: TaskKind, avoid: frozenset[str] = frozenset()) -> None:
        nodes = [node for node in self.sim.nodes if node not in avoid] or self.sim.nodes
        self._numbers += 1
        name = f"{self.process.name}/{kind}-{self._numbers}"
        worker = Worker(self.sim, self, kind, self.world.random.choice(nodes), name)
        self.workers[name] = worker

        def notice() -> None:
            failure = FailureClass.PREEMPTED if self.world.chance(0.3) else FailureClass.INFRASTRUCTURE
            gone = WorkerGone(worker=name, failure=failure, message="died")
            self.world.after(self.world.random.uniform(0.1, 10), lambda: self.hear(worker, gone))

        self._pending[name] = (None, self.process.clock() + self.sim.silence_s)
        worker.process.on_death.append(notice)
        worker.load()

    def _stop_worker(self, name: str, within_s: float) -> None:
        self._pending.pop(name, None)
        self._end(self.workers.pop(name).process, within_s)

    def _end(self, process: Process, within_s: float) -> None:
        """Kill it, unless it is out of reach: then it goes on for as long as it likes."""
        if not self.world.chance(self.sim.unreachable):
            self.world.after(self.world.random.uniform(0, within_s), process.kill)

    def _stop_workers(self, within_s: float) -> None:
        for name in list(self.workers):
            self._stop_worker(name, within_s)


def _if_alive(worker: Worker, call: Callable[..., None], *args: object) -> Callable[[], None]:
    def act() -> None:
        if worker.process.alive:
            call(*args)

    return act
