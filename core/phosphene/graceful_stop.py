"""Graceful stop: Ctrl-C or SIGTERM ends an optimization after the current step, the second interrupts."""

from __future__ import annotations

import signal
import threading
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from .restoration import Restoring

#: The signals that request a stop, each with the handler that may be replaced.
_DEFAULT_HANDLERS: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


class Terminated(KeyboardInterrupt, SystemExit):
    """Raised by SIGTERM inside ``run``: an interrupt, and the exit code 143 where it is not caught."""

    code = 128 + signal.SIGTERM


@dataclass
class StopRequest:
    """Whether a stop was requested, and where the work ended because of it ("after 12 of 200 steps").

    ``exit_code`` is that of a command that was stopped: 130 by Ctrl-C, 143 by SIGTERM.
    """

    requested: bool = False
    stopped_at: str | None = None
    exit_code: int = 128 + signal.SIGINT

    def request(self, number: int = signal.SIGINT, frame: Any = None) -> None:
        """The handler of the signals: the first requests a stop, the second interrupts."""
        if self.requested:
            if number == signal.SIGTERM:
                self.terminate()
            raise KeyboardInterrupt
        self.requested, self.exit_code = True, 128 + number

    def terminate(self, *_: Any) -> None:
        """The handler of SIGTERM in work that cannot be stopped after a step."""
        self.exit_code = Terminated.code
        raise Terminated


_stop_request: ContextVar[StopRequest | None] = ContextVar("phosphene_stop", default=None)


class _Handlers(Restoring):
    """Other handlers of the signals inside the block, in the main thread; the earlier ones afterwards."""

    def __init__(self) -> None:
        self._earlier: dict[int, Any] = {}

    def _install(self, handlers: dict[int, Any], replaceable: tuple[Any, ...] = ()) -> None:
        """Install handlers where the default ones, or ``replaceable`` ones, are."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in handlers.items():
            earlier = signal.getsignal(number)
            if earlier is _DEFAULT_HANDLERS[number] or earlier in replaceable:
                self._earlier[number] = earlier
                signal.signal(number, handler)

    def close(self) -> None:
        for number, earlier in self._earlier.items():
            if signal.getsignal(number) is not earlier:
                signal.signal(number, earlier)


class allow_early_stop(_Handlers):
    """Inside, Ctrl-C and SIGTERM end stoppable work early, with the result so far.

    In other work both interrupt. Yields the ``StopRequest``, that of an outer block if there is one.
    """

    def open(self) -> None:
        self._outer = _stop_request.get()
        self.stop = self._outer or StopRequest()
        _stop_request.set(self.stop)
        self._install({signal.SIGTERM: self.stop.terminate})

    def close(self) -> None:
        super().close()
        if hasattr(self, "_outer"):
            _stop_request.set(self._outer)

    def __enter__(self) -> StopRequest:
        super().__enter__()
        return self.stop


def stopped_early_at() -> str | None:
    """Where the current run was stopped early; None if it was not."""
    stop = _stop_request.get()
    return stop.stopped_at if stop else None


class stoppable(_Handlers):
    """For a loop of steps that checks ``requested`` after each, and so has a result after the first.

    It changes the handlers of Ctrl-C and SIGTERM only inside ``allow_early_stop``, in the main thread, and
    where no other handler is installed. Yields the ``StopRequest``.
    """

    def open(self) -> None:
        self.stop = _stop_request.get() or StopRequest()
        if _stop_request.get() is not None:
            self._install(dict.fromkeys(_DEFAULT_HANDLERS, self.stop.request), (self.stop.terminate,))

    def __enter__(self) -> StopRequest:
        super().__enter__()
        return self.stop
