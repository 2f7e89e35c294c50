"""Interface to the machine: time, threads, processes. A simulation passes its own."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from errno import EDQUOT, ENOSPC, EROFS
from multiprocessing.pool import ThreadPool
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, Self, TypeVar

import psutil

from magi_ray.errors import TemporaryFull
from magi_ray.settings import Frozen

S = TypeVar("S")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# Start times of one process, asked for twice, may differ by this much: the kernel rounds when it booted.
_START_TOLERANCE_S = 2.0
_TEMPORARY = "magi-ray-files-"
_TEMPORARY_MIN_AGE_S = 60.0  # a younger folder may be about to be locked


class Owner(Frozen):
    """A process that owns something. ``name``: of the worker or driver.  ``boot``: the machine's boot id and the
    process's pid namespace, '' where unknown.  ``started``: clock ticks after boot."""

    name: str
    host: str
    boot: str
    pid: int
    started: int

    @classmethod
    def here(cls, name: str) -> Self:
        """This process."""
        return cls(name=name, host=platform.node(), boot=_boot(), pid=os.getpid(), started=_started(psutil.Process()))

    def __str__(self) -> str:
        return f"{self.name} on {self.host} (process {self.pid})"


def gone(owner: Owner) -> bool:
    """Whether ``owner`` is known to be a dead process of this machine."""
    # Containers may share a boot id, and with it the host's name, but then not the namespace of pids.
    if not owner.boot or (owner.host, owner.boot) != (platform.node(), _boot()):
        return False
    try:
        process = psutil.Process(owner.pid)
        ended = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return ended or abs(_started(process) - owner.started) > _START_TOLERANCE_S * _ticks_per_second()
    except psutil.NoSuchProcess:
        return not psutil.pid_exists(owner.pid)  # else it is another user's, which the system hides
    except psutil.Error:
        return False


def local_time(unix: float) -> str:
    """A moment in ISO 8601, to the second, with the zone of this machine."""
    return datetime.fromtimestamp(unix).astimezone().isoformat(timespec="seconds")


class Background(Protocol[T_co]):
    """Work in another thread."""

    def result(self, within_s: float) -> T_co:
        """What the work returned. Raises what it raised, and TimeoutError if not done within ``within_s`` seconds."""
        ...


class Flag(Protocol):
    """As threading.Event."""

    def set(self) -> None: ...

    def wait(self, timeout: float) -> bool:
        """Whether it was set within ``timeout`` seconds."""
        ...


class System:
    """This machine. Stateless."""

    def clock(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def unix_time(self) -> float:
        """Seconds since 1970, for people to read. Never compared with another machine's."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def owner(self, name: str) -> Owner:
        """This process, under ``name``."""
        return Owner.here(name)

    def gone(self, owner: Owner) -> bool:
        """As the function ``gone``."""
        return gone(owner)

    def flag(self) -> Flag:
        return threading.Event()

    def start(self, work: Callable[[], T], *, name: str) -> Background[T]:
        """Runs ``work`` in a daemon thread called ``name``."""
        return _Thread(work, name)

    def map(self, call: Callable[[S], T], items: Iterable[S], *, at_once: int) -> Iterator[T]:
        """``call`` of every item, ``at_once`` of them in parallel; results in the order of the items."""
        if at_once == 1:
            yield from map(call, items)
            return
        with ThreadPool(at_once) as pool:  # daemon threads
            yield from pool.imap(call, items)


class _Thread(Generic[T]):
    def __init__(self, work: Callable[[], T], name: str) -> None:
        self._ended: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        threading.Thread(target=self._run, args=(work,), name=name, daemon=True).start()

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._ended.put((work(), None))
        except BaseException as exc:  # noqa: BLE001 - raised again by whoever waits
            self._ended.put((None, exc))

    def result(self, within_s: float) -> T:
        try:
            found, error = self._ended.get(timeout=within_s)
        except Empty:
            raise TimeoutError(f"not done after {within_s:g} s") from None
        if error is not None:
            raise error
        return found  # type: ignore[return-value]


@contextmanager
def telling_no_room() -> Iterator[None]:
    """Raises TemporaryFull for a full or read-only disk, met by what the block does with temporary files."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in (ENOSPC, EDQUOT, EROFS):
            raise
        raise no_room(exc.strerror or str(exc)) from exc


def no_room(what: str) -> TemporaryFull:
    """The error for a disk of temporary files that is full; ``what``: how that was noticed."""
    try:
        where = tempfile.gettempdir()
        found = os.statvfs(where)
        room = f"{found.f_bavail * found.f_frsize / 2**20:.1f} MiB and {found.f_favail} inodes are free in {where}"
    except OSError as exc:
        room = str(exc)
    remedy = "Free some space there, or set TMPDIR to a folder on another disk; what was committed is kept."
    return TemporaryFull(f"There is no room for temporary files on {platform.node()}: {what}; {room}.", remedy=remedy)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for temporary files (below TMPDIR) that lasts as long as the block, or until ``sweep_temporary`` once
    this process was killed. Raises TemporaryFull, also for what the block writes there."""
    try:
        tempfile.gettempdir()  # writes a file to try it out
    except FileNotFoundError as exc:
        raise no_room("none can be written") from exc
    with telling_no_room(), tempfile.TemporaryDirectory(prefix=_TEMPORARY, ignore_cleanup_errors=True) as name:
        in_use = os.open(name, os.O_RDONLY)
        try:
            fcntl.flock(in_use, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(in_use)


def sweep_temporary() -> None:
    """Delete the temporary folders of killed processes of this machine."""
    with suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*/"):
            with suppress(OSError):
                if time.time() - folder.stat().st_mtime > _TEMPORARY_MIN_AGE_S and not _in_use(folder):
                    shutil.rmtree(folder, ignore_errors=True)


def _in_use(folder: Path) -> bool:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _boot() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(process: psutil.Process) -> int:
    """Clock ticks after boot."""
    return round((process.create_time() - psutil.boot_time()) * _ticks_per_second())


def _ticks_per_second() -> int:
    return os.sysconf("SC_CLK_TCK")
