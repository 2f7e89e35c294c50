"""A store as a process sees it that is killed at its n-th call to it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from wrapping import StoreWrapper, T

from magi_ray.errors import StoreUnavailable
from magi_ray.storage.store import Store


class Death(BaseException):
    """Not an Exception: nothing may catch it and go on, as nothing catches SIGKILL."""


class CrashingStore(StoreWrapper):
    """Passes calls on to ``inner`` until the ``at``-th (from 0; None: never), which does or does not reach it.

    From then on this process is dead: whichever of its threads calls, nothing reaches the store any more.
    """

    def __init__(self, inner: Store, at: int | None = None, *, lands: bool = False) -> None:
        super().__init__(inner)
        self._at, self._lands = at, lands
        self._lock = threading.Lock()
        self.calls: list[str] = []
        self.dead = False

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
        with self._lock:
            dies = not self.dead and len(self.calls) == self._at
            if not self.dead:
                self.calls.append(f"{verb} {key}")
            self.dead = self.dead or dies
            if not self.dead:
                return call()
            if dies and self._lands:
                call()
        if threading.current_thread().name == "magi-ray-lease":
            raise StoreUnavailable("dead")  # it would try for ever, until the process has ended
        raise Death
