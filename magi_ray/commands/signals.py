"""What Ctrl-C, SIGTERM and a closed terminal do to a command that renders or follows a run."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import NoReturn


@contextmanager
def terminated_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM and a closed terminal end the block as Ctrl-C does, with KeyboardInterrupt."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    with _handling((signal.SIGTERM, signal.SIGHUP), interrupt):
        yield


@contextmanager
def delayed_interrupts() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Yields ``allowed``: Ctrl-C, SIGTERM and a closed terminal raise KeyboardInterrupt only inside ``with allowed()``;
    one that came before is raised as that begins. So no process is started and then forgotten."""
    came = is_allowed = False

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = True
        if is_allowed:
            raise KeyboardInterrupt

    @contextmanager
    def allowed() -> Iterator[None]:
        nonlocal is_allowed
        try:
            is_allowed = True
            if came:
                raise KeyboardInterrupt
            yield
        finally:
            is_allowed = False

    with _handling((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), handle):
        yield allowed


@contextmanager
def _handling(numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """``handler`` for these signals while the block runs, except those that whoever started us wants ignored."""
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
