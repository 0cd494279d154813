"""Signals stop a command between two leaves, never while a result is renamed."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


class Stopped(BaseException):
    """A signal has arrived. Other libraries would catch it if it were an Exception."""


# Takes the number of a signal and the frame that it interrupted.
Handler = Callable[[int, FrameType | None], None]

signals: list[int] = []
# A terminal that closes sends SIGHUP, which not all systems have.
NUMBERS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if hasattr(signal, name)
]


def _stop(number: int, frame: FrameType | None) -> None:
    """Stops the command at the next leaf, or at once if it is the second signal.

    An exception that is raised here may be lost in a callback of another library, so
    the first signal is only remembered.
    """
    _remember(number, frame)
    if len(signals) > 1:
        raise Stopped


def _remember(number: int, frame: FrameType | None) -> None:
    del frame
    signals.append(number)


def check_signals() -> None:
    """Raises Stopped if a signal has arrived."""
    if signals:
        raise Stopped


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Signals stop the block, except those that are ignored, as under ``nohup``."""
    signals.clear()
    heard = [n for n in NUMBERS if signal.getsignal(n) != signal.SIG_IGN]
    with _handled_by(_stop, heard):
        yield


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Signals wait for the end of a block that must not be interrupted."""
    with _handled_by(_remember, [n for n in NUMBERS if signal.getsignal(n) == _stop]):
        yield


@contextlib.contextmanager
def _handled_by(handler: Handler, numbers: list[int]) -> Iterator[None]:
    before = {n: signal.signal(n, handler) for n in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
