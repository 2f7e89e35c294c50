"""One simulated run: what is to be rendered, what goes wrong, and whether every promise was kept."""

from __future__ import annotations

import json
import tempfile
import traceback
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

from magi_ray.errors import FailureClass, InputError, MagiRayError, ObjectDamaged, ObjectMissing, StoreUnavailable
from magi_ray.events import RowInventory, Task, TaskKind
from magi_ray.render.artifacts import commits, videos
from magi_ray.render.driving import session
from magi_ray.render.driving.requests import clear, request
from magi_ray.render.driving.scheduler import BUDGETS, ONE_OF_EACH, RowFailed
from magi_ray.render.plans import identity
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.runs.record import Run
from magi_ray.render.runs.submission import create
from magi_ray.render.upkeep import gc
from magi_ray.storage import keys
from magi_ray.storage.leases import BEAT_S, TTL_S, acquire
from magi_ray.storage.records import read_payload, verified_commit
from magi_ray.storage.retrying import RetryingStore
from magi_ray.storage.store import Store

from .drivers import Driver
from .material import ENCODER, NUM_RUNS, Contents, contents_of, run_of, segment_key
from .networks import Poison
from .server import Client, Server, Weather
from .world import Process, SimulatedSystem, World

MOST_DRIVERS = 200
MEMORY = "/dev/shm"
MISHAPS = {
    "worker dies": 4,
    "driver dies": 2,
    "stall": 4,
    "another driver": 2,
    "store outage": 2,
    "cut off": 2,
    "pause or cancel": 1,
}


@dataclass(frozen=True)
class Result:
    """How a seed went. ``wrong``: what was violated, '' for nothing."""

    seed: int
    digest: str
    calls: int
    faults: int
    trace: list[str]
    wrong: str


def simulate(seed: int) -> Result:
    """Never raises for faults of the simulated code: they are in ``wrong``."""
    world = World(seed)
    wrong = ""
    with (
        patch.object(uuid, "uuid4", lambda: uuid.UUID(int=world.random.getrandbits(128))),
        patch.object(tempfile, "tempdir", MEMORY if Path(MEMORY).is_dir() else None),  # small files, by the thousand
    ):
        simulation = Simulation(world)
        try:
            with _inventories_checked(simulation):
                world.run()
            simulation.check()
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is what this seed shows
            wrong = str(exc) if isinstance(exc, AssertionError) and str(exc) else f"seed {seed}: {exc!r}"
        finally:
            world.close()
    server = simulation.server
    return Result(seed, world.digest(), server.calls, server.faults + simulation.mishaps, world.trace, wrong)


@dataclass(eq=False)
class Attempt:
    """One try at denoising a row. late: steps computed after its lease must have been known to be lost.
    before: the stages that were there when it got the row."""

    process: Process
    plan: RowPlan
    late: int = 0
    completed: bool = False
    before: set[str] = field(default_factory=set)


class Simulation:
    def __init__(self, world: World) -> None:
        random = world.random
        self.world = world
        self.number = random.randrange(NUM_RUNS)
        self.run = run_of(self.number)
        self.nodes = [f"node{number}" for number in range(random.randint(1, 4))]
        self.step_s = random.choice([1.0, 4.0, 15.0])
        self.patience_s = random.choice([5.0, 30.0, 120.0, 120.0, 9 * 86400.0])
        self.silence_s = random.choice([60.0, 300.0, 900.0])
        self.unreachable = random.choice([0.0, 0.2, 0.7])
        self.weather = Weather.of(random)
        self.server = Server(world, self._written)
        self.poisons = [*self._draw_poisons()]
        self.drivers: list[Driver] = []
        self.ended: list[Driver] = []  # those that came to the end of the run
        self.attempts: list[Attempt] = []
        self.counts = {
            **ONE_OF_EACH,
            TaskKind.DENOISE: random.choice([1, 1, 2]),
            TaskKind.DECODE: random.choice([1, 1, 2]),
        }
        self.mishaps = 0
        self._stage_of = {
            key: (job_id, stage) for job_id, plan in self.run.plans.items() for stage, key in enumerate(plan.stage_keys)
        }
        # Of each row and stage: steps computed by those who held the row; and the stages that were ever committed.
        self._forwards: Counter[tuple[str, int]] = Counter()
        self._committed: set[tuple[str, int]] = set()
        self._holders: dict[str, tuple[int, float]] = {}  # by lease, of the run or a row: who took it last, and when
        self._payloads: dict[str, str] = {}  # digests, from the commits that name them
        self._collected: set[str] = set()
        self._records: dict[str, bytes] = {}
        self._needed = {
            digest
            for plan in self.run.plans.values()
            for digest in (*plan.stage_keys, *plan.caption_digests, plan.prefix_digest)
        } | {
            sha256(latent).hexdigest()
            for job_id in self.run.plans
            for latent in contents_of(self.number, job_id).chunks
        }
        self._looks_every_s = random.choice([5.0, 30.0, 120.0, 120.0, 9 * 86400.0])
        create(self.server, self.run, {})
        # No new mishaps or store faults from then on, so that the run must finish.
        forwards = sum(plan.timeline.num_stages * plan.forwards_per_stage for plan in self.run.plans.values())
        self._calm_at = (60.0 + forwards * self.step_s) * random.uniform(0.3, 4)
        for _ in range(random.choice([0, 2, 4, 8, 16])):
            world.after(self._calm_at * random.random(), self._mishap)
        world.after(self._calm_at, self._calm)
        if random.random() < 0.5:
            self._collections()
        self._operators()

    # What drivers and workers ask for -------------------------------------------------------------------------------

    def client(self, process: Process, purpose: str = "") -> RetryingStore:
        return RetryingStore(
            Client(self.server, process, self.weather, purpose, stall_s=self.stall_s),
            patience_s=self.patience_s,
            clock=process.clock,
            sleep=process.sleep,
            jitter=lambda longest_s: self.world.random.uniform(0, longest_s),
        )

    def attempt_begins(self, process: Process, plan: RowPlan) -> Attempt:
        self.attempts.append(Attempt(process, plan))
        return self.attempts[-1]

    def attempt_completed(self, attempt: Attempt) -> None:
        """It came to the end of its row; unless another has taken that meanwhile, nothing interrupted it."""
        holder, _ = self._holders[keys.row_lease(self.run.run_id, attempt.plan.job_id)]
        attempt.completed = holder == attempt.process.pid

    def row_taken(self, attempt: Attempt) -> None:
        attempt.before = attempt.before or {key for key in attempt.plan.stage_keys if self._is_whole(key)}

    def forward(self, attempt: Attempt, stage: int, step: int) -> None:
        """A step was computed. Later than TTL_S after another took its row, a worker may compute at most one step."""
        job_id, name = attempt.plan.job_id, attempt.process.name
        self.world.note(name, "computes", job_id, stage, step)
        holder, since = self._holders[keys.row_lease(self.run.run_id, job_id)]
        if holder == attempt.process.pid:
            self._forwards[job_id, stage] += 1
        elif self.world.now > since + TTL_S:
            attempt.late += 1
            if attempt.late > 1:
                self.world.fail(f"{name} goes on with {job_id}, which another has taken")
        if attempt.plan.stage_keys[stage] in attempt.before:
            self.world.fail(f"{name} computes stage {stage} of {job_id}, which was committed")

    def stages_there(self, plan: RowPlan) -> int:
        """How many stages of a video are committed, from the first on."""
        there = [self._is_whole(key) for key in plan.stage_keys]
        return [*there, False].index(False)

    def check_inventory(self, row: RowInventory, before: int) -> None:
        """``before``: the stages that were there when it was begun."""
        plan = self.run.plans[row.job_id]
        if not row.published and not before <= row.stages_done <= self.stages_there(plan):
            self.world.fail(f"{row.job_id} has {before} stages, but its inventory says {row.stages_done}")

    def stage_reported(self, worker: str, plan: RowPlan, stage: int) -> None:
        if not self._is_whole(plan.stage_keys[stage]):
            self.world.fail(f"{worker} says that stage {stage} of {plan.job_id} is committed, but it is not whole")

    def _is_whole(self, stage: str) -> bool:
        """False also when gc removed the payloads of a stalled writer, which then committed and died before repairing
        it."""
        return self._whole(keys.commit("stage", stage), self.server.peek(keys.commit("stage", stage)))

    def _whole(self, key: str, commit: bytes | None) -> bool:
        folder = key.removesuffix("commit.json")
        named = json.loads(commit)["payloads"].values() if commit else ()
        return commit is not None and all(self.server.peek(folder + payload["name"]) for payload in named)

    def check_expected(self, exc: Exception) -> None:
        """Only errors of magi-ray's own or of a ``Poison`` may occur, and none that says an object is missing or
        damaged."""
        ours = isinstance(exc, MagiRayError) and not isinstance(exc, ObjectMissing | ObjectDamaged)
        if not ours and str(exc) != "poisoned":
            trace = "".join(traceback.format_exception(exc))
            self.world.fail(f"{exc!r}\n{trace}")

    # What goes wrong -----------------------------------------------------------------------------------------------

    def _draw_poisons(self) -> Iterator[Poison]:
        random = self.world.random
        for job_id, plan in self.run.plans.items():
            if random.random() < 0.8:
                continue
            kind = random.choice(list(TaskKind))
            most = {TaskKind.DENOISE: plan.timeline.num_stages, TaskKind.DECODE: plan.timeline.num_chunks}.get(kind, 1)
            failure = random.choice(list(FailureClass))
            for_ever = random.random() < 0.6 and failure is not FailureClass.PREEMPTED
            budget = BUDGETS[failure]
            times = 10**9 if for_ever else 8 if budget is None else budget
            yield Poison(Task(kind=kind, job_id=job_id, index=random.randrange(most)), failure, times)

    def _mishap(self) -> None:
        random, world = self.world.random, self.world
        self.mishaps += 1
        drivers = [driver.process for driver in self.drivers if driver.process.alive and not driver.process.idle]
        workers = [
            process
            for process in world.processes.values()
            if process.alive and not process.idle and process not in drivers
        ]
        match random.choices([*MISHAPS], weights=[*MISHAPS.values()])[0]:
            case "worker dies" if workers:
                random.choice(workers).kill()
            case "driver dies" if drivers:
                random.choice(drivers).kill()
            case "stall" if workers + drivers:
                random.choice(workers + drivers).stall(self.stall_s())
            case "another driver":
                self._start_driver(take_over=world.chance(0.5))
            case "store outage":
                self.weather.outage_until = world.now + random.choice([20, 300]) * random.random()
            case "cut off" if workers + drivers:
                process = random.choice(workers + drivers)
                world.note(process.name, "is cut off from the store")
                process.cut_off_until = world.now + random.choice([20, 300]) * random.random()
            case "pause or cancel":
                what = random.choice(["pause", "cancel"])
                world.note("people", what)
                request(self.server, self.run.run_id, what)

    def stall_s(self) -> float:
        """From less than a lease's TTL to more than the minimum age of garbage."""
        return (
            self.world.random.choice([30, 120, 2 * self.silence_s, 6 * 3600, 10 * 86400]) * self.world.random.random()
        )

    def _calm(self) -> None:
        self.world.note("calm")
        self.weather.clear = True

    def _collections(self) -> None:
        """Adds an abandoned run to the store and schedules garbage collections."""
        random = self.world.random
        other = run_of((self.number + 1) % NUM_RUNS)
        create(self.server, other, {})
        system = Process(self.world, "somebody", "elsewhere").system
        for plan in other.plans.values():
            for key, caption in zip(plan.caption_digests, plan.captions, strict=True):
                pre_image = identity.text_pre_image(caption, plan.settings, plan.digests)
                commits.commit(self.server, "text", pre_image, {"text": Contents.text(key)}, seconds=1.0, system=system)
            pre_image = plan.pre_image(0)
            commits.commit(
                self.server, "stage", pre_image, {"state": b"a state", "chunk": b"a chunk"}, seconds=1.0, system=system
            )

        def collect_garbage() -> None:
            process = Process(self.world, f"gc{len(self.world.processes)}", random.choice(self.nodes))
            store = self.client(process, "gc")
            min_age_s = random.choice([600, 86400, gc.MIN_AGE_S])
            forget = [other.run_id] if self.world.chance(0.7) else []

            def work() -> None:
                with suppress(StoreUnavailable, InputError):
                    found = gc.collect(
                        store, gc.garbage(store, min_age_s=min_age_s, forget=forget, clock=process.clock)
                    )
                    self.world.note(process.name, "collects", found)

            process.start(work)

        for _ in range(random.randint(1, 4)):
            within_s = random.choice([self._calm_at, 2 * self._calm_at, 11 * 86400])
            self.world.after(within_s * random.random(), collect_garbage)

    def _operators(self) -> None:
        """They check now and then, and resume the run if no driver is at work, until everything that can be
        rendered is."""
        world = self.world
        if any(not self._failed(driver) or (driver.started_calm and driver.retry) for driver in self.ended):
            return
        active = any(
            driver.process.alive and not driver.thread.dead and driver.process.stalled_until <= world.now
            for driver in self.drivers
        )
        if not active and (self.weather.clear or not self.ended):
            clear(self.server, self.run.run_id)
            self._start_driver(take_over=world.chance(0.3))
        world.after(world.random.uniform(0, self._looks_every_s), self._operators)

    def _start_driver(self, *, take_over: bool) -> None:
        if len(self.drivers) >= MOST_DRIVERS:
            self.world.fail(f"{MOST_DRIVERS} drivers came, and the run is not done")
        calm = self.weather.clear
        driver = Driver(
            self,
            f"driver{len(self.drivers)}",
            take_over=take_over,
            retry=calm or self.world.chance(0.3),
            started_calm=calm,
        )
        self.world.note(driver.process.name, "starts", "and takes over" if take_over else "")
        self.drivers.append(driver)

    @staticmethod
    def _failed(driver: Driver) -> dict[str, RowFailed]:
        return {failed.job_id: failed for failed in driver.result.failed} if driver.result else {}

    # The books -----------------------------------------------------------------------------------------------------

    def _written(self, key: str, data: bytes | None, by: Client) -> None:
        if key.endswith("/commit.json"):
            self._commit_written(key, data, by)
        elif key in self._payloads:
            if data is None or sha256(data).hexdigest() != self._payloads[key]:
                self._fail(f"{by.process.name} {'deletes' if data is None else 'changes'} {key}, which is committed")
        elif key.startswith(keys.videos(self.run.run_id)):
            before = self._records.setdefault(key, data or b"")
            if data != before:
                self._fail(f"{by.process.name} {'deletes' if data is None else 'changes'} {key}, which is published")
        elif key.endswith("/lease.json") and data is not None:
            holder = json.loads(data)["holder"]
            if holder is not None and self._holders.get(key, (0, 0.0))[0] != holder["pid"]:
                self._holders[key] = holder["pid"], self.world.now
        elif data is None and by.purpose == "gc":
            self._collected.add(key)

    def _commit_written(self, key: str, data: bytes | None, by: Client) -> None:
        before = self.server.peek(key)
        if data is None and by.purpose == "gc" and not self._is_needed(key, before):
            return
        mends = before is not None and not self._whole(key, before)
        if before is not None and data != before and not (mends and data is not None):
            self._fail(f"{by.process.name} {'deletes' if data is None else 'changes'} the commit {key}")
        if data is not None and (before is None or mends):
            folder = key.removesuffix("commit.json")
            for payload in json.loads(before)["payloads"].values() if before else ():
                self._payloads.pop(folder + payload["name"], None)
            for payload in json.loads(data)["payloads"].values():
                name = folder + payload["name"]
                if self.server.peek(name) is None and name not in self._collected:
                    self._fail(f"{by.process.name} commits {key} before its payload {payload['name']}")
                self._payloads[name] = payload["sha256"]
            if stage := self._stage_of.get(key.split("/")[2]):
                self._committed.add(stage)

    def _is_needed(self, key: str, data: bytes | None) -> bool:
        """Whether this run reaches a commit."""
        pre_image = json.loads(data or b"{}").get("pre_image", {})
        return key.split("/")[2] in self._needed or pre_image.get("chunk", "") in self._needed

    def _fail(self, what: str) -> None:
        self.world.fail(what)

    # Afterwards ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        for check in (
            self.every_row_ends_in_done_or_failed_with_its_reason,
            self.every_commit_is_whole,
            self.every_video_is_whole_and_right,
            self.nothing_was_computed_twice_beyond_promise_2,
            self.no_lease_is_held_for_ever,
        ):
            check()

    def every_row_ends_in_done_or_failed_with_its_reason(self) -> None:
        # One that slept at its end says what was so when it led.
        failed_rows = self._failed(max(self.ended, key=lambda driver: driver.epoch))
        hopeless = {poison.at.job_id: poison.failure for poison in self.poisons if poison.times > 10**6}
        struck = {job for job in hopeless if next(p for p in self.poisons if p.at.job_id == job).times < 10**9}
        for job_id in self.run.plans:
            published = self.server.peek(keys.video_record(self.run.run_id, job_id)) is not None
            failed = failed_rows.get(job_id)
            if published == (failed is not None):
                self._fail(f"{job_id} is {'both' if published else 'neither'} published and failed")
            if failed and (job_id not in struck or failed.failure != hopeless[job_id] or not failed.message):
                self._fail(f"{job_id} failed though nothing was wrong with it: {failed}")

    def every_commit_is_whole(self) -> None:
        for name, digest in self._payloads.items():
            # An object that gc removed from under a stalled writer is remade when next needed.
            if name not in self._collected and sha256(self.server.peek(name) or b"").hexdigest() != digest:
                self._fail(f"{name} is gone, but its commit is there")

    def every_video_is_whole_and_right(self) -> None:
        store = self.server
        for job_id, plan in self.run.plans.items():
            record = self.server.peek(keys.video_record(self.run.run_id, job_id))
            if record is None:
                continue
            contents = contents_of(self.number, job_id)
            if self.server.peek(keys.video(self.run.run_id, job_id)) != contents.video:
                self._fail(f"the video of {job_id} is not what its plan gives")
            if videos.published(store, self.run.run_id, plan, reread=True) is None:
                self._fail(f"the video of {job_id} does not count as published")
            for stage, key in enumerate(plan.stage_keys):
                self._holds("stage", key, "state", contents.states[stage])
            for chunk, latent in enumerate(contents.chunks):
                self._holds("stage", plan.stage_keys[plan.timeline.finishing_stage(chunk)], "chunk", latent)
                self._holds("segment", segment_key(store, plan, chunk), "segment", Contents.segment(latent))
            for key in plan.caption_digests:
                self._holds("text", key, "text", Contents.text(key))

    def _holds(self, kind: keys.CommitKind, key: str, role: str, expected: bytes) -> None:
        found = verified_commit(self.server, kind, key)
        if found is None or read_payload(self.server, found, role) != expected:
            self._fail(f"{kind} {key} is not committed whole and right")

    def nothing_was_computed_twice_beyond_promise_2(self) -> None:
        """At most a stage and a step are lost for each interrupted attempt, and nothing else. Steps of a worker that
        has lost its row do not count."""
        for job_id, plan in self.run.plans.items():
            attempts = [attempt for attempt in self.attempts if attempt.plan.job_id == job_id]
            each = plan.forwards_per_stage
            wasted = sum(
                max(0, forwards - each * ((job_id, stage) in self._committed))
                for (row, stage), forwards in self._forwards.items()
                if row == job_id
            )
            interrupted = sum(not attempt.completed for attempt in attempts)
            if wasted > interrupted * (each + 1):
                self._fail(f"{wasted} forwards of {job_id} were wasted in {interrupted} interruptions")

    def no_lease_is_held_for_ever(self) -> None:
        for key in self.server.list(keys.run(self.run.run_id)):
            if key.endswith("/lease.json"):
                begun = self.world.now
                stranger = Process(self.world, "stranger", "elsewhere")
                acquire(self.server, key, stranger.owner, epoch=10**9, system=Patient(stranger)).release()
                if self.world.now - begun > TTL_S + BEAT_S:
                    self._fail(f"{key} was held long after everybody had gone")


class Patient(SimulatedSystem):
    """The system of an outsider that waits when all others are gone: its sleep only advances the clock."""

    def clock(self) -> float:
        return self._process.world.now

    def sleep(self, seconds: float) -> None:
        self._process.world.now += seconds


@contextmanager
def _inventories_checked(simulation: Simulation) -> Iterator[None]:
    """What a driver finds in the store is compared with what is there."""
    look, look_at_all = session.take_inventory, session.take_inventory_of_run

    def one(store: Store, run_id: str, plan: RowPlan, encoder: str) -> RowInventory:
        before = simulation.stages_there(plan)
        row = look(store, run_id, plan, encoder)
        simulation.check_inventory(row, before)
        return row

    def of_run(store: Store, run: Run, encoder: str, **options: Any) -> list[RowInventory]:
        before = {job_id: simulation.stages_there(plan) for job_id, plan in run.plans.items()}
        rows = look_at_all(store, run, encoder, **options)
        for row in rows:
            simulation.check_inventory(row, before[row.job_id])
        return rows

    with (
        patch.object(session, "take_inventory", one),
        patch.object(session, "take_inventory_of_run", of_run),
    ):
        yield


__all__ = ["ENCODER", "Result", "simulate"]
