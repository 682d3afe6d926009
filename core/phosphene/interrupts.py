"""Ctrl-C in work whose half is worth having: the first one asks it to stop soon, the second breaks it off."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass
class Stop:
    """Whether somebody has asked for no more, and where the work stood when it ended for that."""

    asked: bool = False
    told: str | None = None

    def ask(self, *signal_and_frame: Any) -> None:
        """What the first Ctrl-C does; the next one interrupts."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


_stop: ContextVar[Stop | None] = ContextVar("phosphene_stop", default=None)


@contextmanager
def stopping_early() -> Iterator[Stop]:
    """Inside, Ctrl-C ends stoppable work early, with what it has so far."""
    stop = Stop()
    token = _stop.set(stop)
    try:
        yield stop
    finally:
        _stop.reset(token)


def stopped() -> str | None:
    """Where the work around this call stood when it was stopped early; None where it was not."""
    stop = _stop.get()
    return stop.told if stop else None


@contextmanager
def stoppable() -> Iterator[Stop]:
    """A loop of steps that looks at ``asked`` after each one; it takes at least one, so that it has a result.

    Only inside ``stopping_early``, in the main thread, and where nobody else listens for Ctrl-C.
    """
    stop = _stop.get()
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if stop is None or not usual or threading.current_thread() is not threading.main_thread():
        yield stop or Stop()
        return
    signal.signal(signal.SIGINT, stop.ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
