"""What Ctrl-C, SIGTERM and a closed terminal do to a command that renders or follows a run."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, Self


@contextmanager
def terminated_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM and a closed terminal end the block as Ctrl-C does, with KeyboardInterrupt."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    with _handling((signal.SIGTERM, signal.SIGHUP), interrupt):
        yield


class DelayedInterrupts:
    """While the block runs, Ctrl-C, SIGTERM and a closed terminal raise KeyboardInterrupt only inside ``allowed``; what
    came before is raised as that begins. So no process is started and then forgotten."""

    def __init__(self) -> None:
        self._came = self._allowed = False
        self._handling = _handling((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), self._handle)

    def __enter__(self) -> Self:
        self._handling.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._handling.__exit__(*exc)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        try:
            self._allowed = True
            if self._came:
                raise KeyboardInterrupt
            yield
        finally:
            self._allowed = False

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._came = True
        if self._allowed:
            raise KeyboardInterrupt


@contextmanager
def _handling(numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """``handler`` for these signals while the block runs, but for those that whoever started us wants ignored."""
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
