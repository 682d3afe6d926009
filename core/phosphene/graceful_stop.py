"""Graceful stop: the first Ctrl-C ends an optimisation after the current step, the second interrupts."""

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
    """Whether a stop was requested, and where the work ended because of it ("after 12 of 200 steps")."""

    requested: bool = False
    stopped_at: str | None = None

    def request(self, *signal_and_frame: Any) -> None:
        """The handler of SIGINT: the first requests a stop, the second raises KeyboardInterrupt."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


_stop_request: ContextVar[StopRequest | None] = ContextVar("phosphene_stop", default=None)


@contextmanager
def allow_early_stop() -> Iterator[StopRequest]:
    """Inside, Ctrl-C ends stoppable work early, with the result so far."""
    stop = StopRequest()
    token = _stop_request.set(stop)
    try:
        yield stop
    finally:
        _stop_request.reset(token)


def stopped_early_at() -> str | None:
    """Where the current run was stopped early; None if it was not."""
    stop = _stop_request.get()
    return stop.stopped_at if stop else None


@contextmanager
def stoppable() -> Iterator[StopRequest]:
    """For a loop of steps that checks ``requested`` after each, and so has a result after the first.

    It changes the handler of Ctrl-C only inside ``allow_early_stop``, in the main thread, and where no other
    handler is installed.
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
