"""The store of a simulated world: one shared in-memory server, and a client for each process, whose calls go wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

from magi_ray.errors import StoreUnavailable
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.store import Entry, open_at

from .world import Process, World

T = TypeVar("T")

# What can become of a call, and whether it applies to writes only: a read that draws such a fate is refused.
FATES = {
    "slow": False,  # answered after up to a minute
    "refused": False,  # 5xx, throttled, 409: nothing happened
    "lost": False,  # it happened, but the answer got lost
    "late": True,  # timed out, and lands later
    "torn": True,  # a put: a multipart upload that was never completed; another write: as late
    "stall before": True,  # the process stalls before the call
    "stall after": True,  # and after it, before it hears the answer
}


@dataclass
class Weather:
    """How often calls meet each fate. ``outage_until``: until then every call fails.  ``clear``: no call fails,
    whatever else is set."""

    fates: dict[str, float]
    outage_until: float = 0.0
    clear: bool = False

    @classmethod
    def of(cls, random: Random) -> Weather:
        """Anything from a quiet day to a storm."""
        storm = random.choice([0.0, 0.3, 1.0, 1.0, 3.0])
        most = {"slow": 0.02, "refused": 0.02, "lost": 0.02, "late": 0.01, "torn": 0.01}
        most |= {"stall before": 0.01, "stall after": 0.01}
        return cls({fate: storm * random.uniform(0, most[fate]) for fate in FATES})

    def fate(self, process: Process, writes: bool) -> str:
        world = process.world
        if self.clear:
            return ""
        if world.now < max(self.outage_until, process.cut_off_until):
            return "late" if writes and world.chance(0.05) else "refused"
        drawn = world.random.random()
        for fate, probability in self.fates.items():
            drawn -= probability
            if drawn < 0:
                return fate if writes or not FATES[fate] else "refused"
        return ""


class Server(MemoryStore):
    """``watch(key, data, by)`` is called before a ``Client`` writes an object (data) or deletes it (None); calls
    without a ``Client`` are not watched."""

    def __init__(self, world: World, watch: Callable[[str, bytes | None, Client], None]) -> None:
        super().__init__(clock=lambda: world.now)
        self.watch, self.caller = watch, None
        self.torn: dict[str, float] = {}
        self.calls = 0
        self.faults = 0
        self._world = world

    def _set(self, key: str, data: bytes) -> None:
        if self.caller is not None:
            self.watch(key, data, self.caller)
        super()._set(key, data)

    def delete(self, key: str) -> None:
        if self.caller is not None and key in self._objects:
            self.watch(key, None, self.caller)
        super().delete(key)

    def peek(self, key: str) -> bytes | None:
        """The stored bytes, for checks; not counted as a call."""
        return self._objects.get(key)

    def leftovers(self) -> Iterator[Entry]:
        return iter([Entry(key=key, size=1, age_s=self._world.now - begun) for key, begun in self.torn.items()])

    def sweep(self, name: str) -> None:
        self.torn.pop(name, None)


class Client:
    """What one process sees of the server. ``purpose``: what the process is doing, for the checks."""

    def __init__(
        self, server: Server, process: Process, weather: Weather, purpose: object, *, stall_s: Callable[[], float]
    ) -> None:
        self.server, self.process, self.weather, self.purpose, self.stall_s = server, process, weather, purpose, stall_s
        self.world = process.world

    @property
    def uri(self) -> str:
        return "simulated:"

    def put(self, key: str, data: bytes) -> None:
        self._call("put", key, lambda: self.server.put(key, data), writes=True)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._call("put_if_absent", key, lambda: self.server.put_if_absent(key, data), writes=True)

    def put_file(self, key: str, path: Path) -> None:
        self.put(key, path.read_bytes())

    def get(self, key: str) -> bytes:
        return self._call("get", key, lambda: self.server.get(key))

    def get_to_file(self, key: str, path: Path, *, start: int = 0) -> None:
        with open_at(path, start) as target:
            target.write(self.get(key)[start:])

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        return self._call("get_versioned", key, lambda: self.server.get_versioned(key))

    def swap(self, key: str, data: bytes, version: str) -> str | None:
        return self._call("swap", key, lambda: self.server.swap(key, data, version), writes=True)

    def exists(self, key: str) -> bool:
        return self._call("exists", key, lambda: self.server.exists(key))

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        found = self._call("list", prefix, lambda: [key for key in self.server.list(prefix) if key > after])
        return iter(found)

    def entries(self, prefix: str, after: str = "") -> Iterator[Entry]:
        found = self._call("entries", prefix, lambda: [e for e in self.server.entries(prefix) if e.key > after])
        return iter(found)

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda: self.server.delete(key), writes=True)

    def leftovers(self) -> Iterator[Entry]:
        return iter(self._call("leftovers", "", lambda: [*self.server.leftovers()]))

    def sweep(self, name: str) -> None:
        self._call("sweep", name, lambda: self.server.sweep(name), writes=True)

    def _call(self, verb: str, key: str, effect: Callable[[], T], *, writes: bool = False) -> T:
        world, process = self.world, self.process
        process.sleep(world.random.expovariate(50))
        fate = self.weather.fate(process, writes)
        self.server.calls += 1
        self.server.faults += bool(fate)
        if fate == "slow":
            process.sleep(world.random.uniform(1, 60))
        elif fate == "refused":
            raise self._unavailable(verb, key, fate)
        elif fate == "torn" and verb in ("put", "put_if_absent"):
            self.server.torn[f"{key} {world.now}"] = world.now
            raise self._unavailable(verb, key, fate)
        elif fate in ("late", "torn"):
            delay = world.random.choice([1, 10, 100, 10_000]) * world.random.random()
            world.after(delay, lambda: self._land(verb, key, effect))
            process.sleep(world.random.uniform(1, 60))
            raise self._unavailable(verb, key, fate)
        elif fate == "stall before":
            process.stall(self.stall_s())
            process.sleep(0)
        result = self._land(verb, key, effect)
        if fate == "stall after":
            process.stall(self.stall_s())
        process.sleep(world.random.expovariate(50))
        if fate == "lost":
            raise self._unavailable(verb, key, fate)
        return result

    def _land(self, verb: str, key: str, effect: Callable[[], T]) -> T:
        self.server.caller = self
        try:
            result = effect()
        except Exception as exc:
            self.world.note(self.process.name, verb, key, type(exc).__name__)
            raise
        finally:
            self.server.caller = None
        said = result if isinstance(result, (bool, str)) else ""
        self.world.note(self.process.name, verb, key, said)
        return result

    def _unavailable(self, verb: str, key: str, fate: str) -> StoreUnavailable:
        self.world.note(self.process.name, verb, key, fate)
        return StoreUnavailable(f"{verb} {key}: {fate}.")
