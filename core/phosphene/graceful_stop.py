"""Graceful stop: the first Ctrl-C ends optimisation after the current step, the second interrupts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass
class StopRequest:
    """Whether somebody has asked for no more, and where the work stood when it ended for that."""

    requested: bool = False
    stopped_at: str | None = None

    def request(self, *signal_and_frame: Any) -> None:
        """What the first Ctrl-C does; the next one interrupts."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


_stop_request: ContextVar[StopRequest | None] = ContextVar("phosphene_stop", default=None)


@contextmanager
def allow_early_stop() -> Iterator[StopRequest]:
    """Inside, Ctrl-C ends stoppable work early, with what it has so far."""
    stop = StopRequest()
    token = _stop_request.set(stop)
    try:
        yield stop
    finally:
        _stop_request.reset(token)


def stopped_early_at() -> str | None:
    """Where the work around this call stood when it was stopped early; None where it was not."""
    stop = _stop_request.get()
    return stop.stopped_at if stop else None


@contextmanager
def stoppable() -> Iterator[StopRequest]:
    """A loop of steps that looks at ``asked`` after each one; it takes at least one, so that it has a result.

    Only inside ``stopping_early``, in the main thread, and where nobody else listens for Ctrl-C.
    """
    stop = _stop_request.get()
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if stop is None or not usual or threading.current_thread() is not threading.main_thread():
        yield stop or StopRequest()
        return
    signal.signal(signal.SIGINT, stop.request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
