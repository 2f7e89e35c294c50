"""A world in one thread: processes that interleave wherever they wait, a clock that jumps, one random generator.

A process is a few greenlets. It gives way whenever it sleeps, and every call to the store sleeps, so the code under
test runs unchanged and any two processes can meet at any call. A process that was killed never runs again: what its
``finally`` blocks would still do when the world is torn down reaches neither the store nor anybody else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Generic, NoReturn, TypeVar

from greenlet import getcurrent, greenlet

from magi_ray.system import Owner, System

MOST_EVENTS = 400_000

S = TypeVar("S")
T = TypeVar("T")


class Killed(BaseException):
    """Not an Exception: the code under test must not get to handle its own death."""


class Violation(AssertionError):
    """A promise was broken."""


class World:
    """``now``: seconds since the beginning, hidden from processes: each has a clock of its own."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.now = 0.0
        self.trace: list[str] = []
        self.processes: dict[int, Process] = {}
        self.violation: Violation | None = None
        self.hub = getcurrent()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def note(self, *words: object) -> None:
        self.trace.append(f"{self.now:.6f} " + " ".join(map(str, words)))

    def digest(self) -> str:
        """Of all that happened."""
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()

    def fail(self, what: str) -> NoReturn:
        """A promise is broken. The code under test may catch what this raises; ``run`` raises it again."""
        self.violation = self.violation or Violation(f"seed {self.seed}, at {self.now:.3f} s: {what}")
        raise self.violation

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        heappush(self._due, (self.now + seconds, next(self._numbers), call))

    def run(self) -> None:
        """Until nothing is left to happen."""
        for _ in range(MOST_EVENTS):
            if not self._due:
                return
            self.now, _, call = heappop(self._due)
            call()
            if self.violation is not None:
                raise self.violation
        self.fail(f"no end after {MOST_EVENTS} events: something loops for ever")

    def close(self) -> None:
        """Unwind every thread that is still suspended."""
        for process in self.processes.values():
            process.alive = False
        for process in self.processes.values():
            for thread in process.threads:
                if thread and not thread.dead:
                    with suppress(Violation):  # already recorded
                        thread.throw(Killed)


class Thread(greenlet):
    """``sleeps``: a counter, so that a stale wake-up is ignored."""

    sleeps = 0


class Process:
    """``stalled_until``: like SIGSTOP, it does nothing till then, but its clock goes on. ``cut_off_until``: it does not
    reach the store till then."""

    def __init__(self, world: World, name: str, host: str) -> None:
        self.world, self.name, self.host = world, name, host
        self.alive = True
        self.stalled_until = self.cut_off_until = 0.0
        self.threads: list[Thread] = []
        self.on_death: list[Callable[[], None]] = []
        self.system = SimulatedSystem(self)
        self.pid = len(world.processes) + 1
        world.processes[self.pid] = self
        # Machines agree neither on the time of day nor on when time began.
        self._began = world.random.uniform(-1e7, 1e7)

    @property
    def owner(self) -> Owner:
        return Owner(name=self.name, host=self.host, boot=f"boot of {self.host}", pid=self.pid, started=self.pid)

    @property
    def idle(self) -> bool:
        return all(thread.dead for thread in self.threads)

    def clock(self) -> float:
        return self.world.now + self._began

    def gone(self, owner: Owner) -> bool:
        """``magi_ray.system.gone``, as seen from this process's machine."""
        return owner.host == self.host and not self.world.processes[owner.pid].alive

    def start(self, work: Callable[[], None]) -> Thread:
        """Do ``work`` in a thread of this process."""

        def body() -> None:
            with suppress(Killed):
                work()

        self.threads = [thread for thread in self.threads if not thread.dead]
        # The hub, not the starter: switching to the parent must return to `World.run`.
        thread = Thread(body, self.world.hub)
        self.threads.append(thread)
        self._wake_after(0.0, thread)
        return thread

    def sleep(self, seconds: float) -> None:
        self.raise_if_killed()
        thread = getcurrent()
        self._wake_after(seconds, thread)
        thread.parent.switch()
        self.raise_if_killed()

    def nudge(self, thread: Thread) -> None:
        """Wake a thread of this process before its time."""
        self._wake_after(0.0, thread, thread.sleeps)

    @property
    def current(self) -> Thread:
        """The thread that runs now, which must be one of this process."""
        thread = getcurrent()
        assert isinstance(thread, Thread)
        return thread

    def raise_if_killed(self) -> None:
        if not self.alive:
            raise Killed

    def kill(self) -> None:
        """-9."""
        if self.alive:
            self.alive = False
            self.world.note(self.name, "dies")
            for call in self.on_death:
                call()

    def stall(self, seconds: float) -> None:
        if self.alive:
            self.world.note(self.name, f"stalls for {seconds:.0f} s")
            self.stalled_until = max(self.stalled_until, self.world.now + seconds)

    def _wake_after(self, seconds: float, thread: Thread, sleep: int | None = None) -> None:
        if sleep is None:
            thread.sleeps += 1
            sleep = thread.sleeps

        def wake() -> None:
            if not self.alive or thread.sleeps != sleep:
                return  # dead, or nudged meanwhile
            if self.world.now < self.stalled_until:
                self.world.after(self.stalled_until - self.world.now, wake)
            else:
                thread.sleeps += 1
                thread.switch()

        self.world.after(seconds, wake)


class SimulatedSystem(System):
    """The machine as a simulated process sees it: threads are greenlets, and waiting is what makes time pass."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def clock(self) -> float:
        return self._process.clock()

    def unix_time(self) -> float:
        return self._process.clock()

    def sleep(self, seconds: float) -> None:
        self._process.sleep(seconds)

    def owner(self, name: str) -> Owner:
        return self._process.owner.model_copy(update={"name": name})

    def gone(self, owner: Owner) -> bool:
        return self._process.gone(owner)

    def flag(self) -> SimulatedFlag:
        return SimulatedFlag(self._process)

    def start(self, work: Callable[[], T], *, name: str) -> SimulatedBackground[T]:
        return SimulatedBackground(self._process, work)

    def map(self, call: Callable[[S], T], items: Iterable[S], *, at_once: int) -> Iterator[T]:
        return map(call, items)


class SimulatedFlag:
    def __init__(self, process: Process) -> None:
        self._process, self._up = process, False
        self._waiting: list[Thread] = []

    def set(self) -> None:
        self._up = True
        for thread in self._waiting:
            self._process.nudge(thread)

    def wait(self, timeout: float) -> bool:
        if not self._up:
            self._waiting.append(self._process.current)
            self._process.sleep(timeout)
            self._waiting.remove(self._process.current)
        return self._up


class SimulatedBackground(Generic[T]):
    def __init__(self, process: Process, work: Callable[[], T]) -> None:
        self._process, self._work = process, work
        self._ended = SimulatedFlag(process)
        self._found: T | None = None
        self._error: Exception | None = None
        process.start(self._run)

    def _run(self) -> None:
        try:
            self._found = self._work()
        except Exception as exc:  # noqa: BLE001 - raised again by whoever waits
            self._error = exc
        self._ended.set()

    def result(self, within_s: float) -> T:
        if not self._ended.wait(within_s):
            raise TimeoutError(f"not done after {within_s:g} s")
        if self._error is not None:
            raise self._error
        return self._found  # type: ignore[return-value]
