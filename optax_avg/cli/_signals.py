"""Signals stop a command between two leaves, never while a result takes its name."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Stopped(BaseException):
    """A signal has come. Not an Exception, which the layers below would take."""


signals: list[int] = []
# A terminal that is closed sends the last one, which not all systems have.
NUMBERS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if hasattr(signal, name)
]


def _stop(number: int, frame: Any) -> None:
    """Stops at the next leaf, at a second signal at once.

    An exception that is raised here may be lost in a callback of another library.
    """
    _remember(number, frame)
    if len(signals) > 1:
        raise Stopped


def _remember(number: int, frame: Any) -> None:
    del frame
    signals.append(number)


def check_signals() -> None:
    """Stops if a signal has come."""
    if signals:
        raise Stopped


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Signals stop what runs in a block, but for those that are ignored (``nohup``)."""
    signals.clear()
    heard = [n for n in NUMBERS if signal.getsignal(n) != signal.SIG_IGN]
    with _handled_by(_stop, heard):
        yield


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Signals wait for the end of a block that must not be torn."""
    with _handled_by(_remember, [n for n in NUMBERS if signal.getsignal(n) == _stop]):
        yield


@contextlib.contextmanager
def _handled_by(handler: Any, numbers: list[int]) -> Iterator[None]:
    before = {n: signal.signal(n, handler) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
