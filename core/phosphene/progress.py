"""Progress of long work: bars in a terminal or notebook, silence, or a callback."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from .errors import InputError, value_repr

T = TypeVar("T")


@dataclass(frozen=True)
class ProgressEvent:
    """One step of long work: ``done`` of ``total`` (None if unknown), with a ``note`` such as the loss."""

    description: str
    done: int
    total: int | None
    note: str = ""

    def as_json(self) -> str:
        """The event as a line of JSON, as ``--events`` prints it."""
        return json.dumps({"event": "progress", **asdict(self)}, ensure_ascii=False)


#: None: bars in a terminal or notebook; True: bars; False: none; a callable receives every event instead.
Reporter = bool | None | Callable[[ProgressEvent], None]


_reporter: ContextVar[Reporter] = ContextVar("phosphene_progress", default=None)


def check_reporter(to: Any) -> None:
    """Raise InputError for what is no ``Reporter``."""
    if to is not None and not isinstance(to, bool) and not callable(to):
        raise InputError(
            f"progress must be True, False, None or a function of a ProgressEvent, not {value_repr(to)}"
        )


@contextmanager
def report_progress(to: Reporter) -> Iterator[None]:
    """Choose where progress is reported inside this block; None leaves it unchanged."""
    check_reporter(to)
    token = _reporter.set(_reporter.get() if to is None else to)
    try:
        yield
    finally:
        _reporter.reset(token)


#: Seconds between two lines in a log.
LOG_SECONDS = 30


def log_line(description: str, done: int, total: float | None, seconds: float, note: str = "") -> str:
    """A line of progress for a log: ``attacking: 12/100, 1:05 elapsed, 7:56 left, loss 0.3``."""
    steps, rest = f"{done}", ""
    if total is not None:
        steps, rest = f"{done}/{int(total)}", f", {_duration(seconds * (total - done) / done)} left"
    return f"{description}: {steps}, {_duration(seconds)} elapsed{rest}{f', {note}' if note else ''}"


def _duration(seconds: float) -> str:
    """A duration as minutes and seconds, or with hours: 1:05, 2:00:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@functools.cache
def _bar_type() -> Any:
    """tqdm's bars without a monitor, which has a thread and an exit function."""
    from tqdm.auto import tqdm  # late: listing methods does not need it

    return type("Bar", (tqdm,), {"monitor_interval": 0})


def progress_bar(
    iterable: Iterable[T], description: str, total: int | None = None, *, note: Callable[[], str] = str
) -> Iterator[T]:
    """Iterate and report the progress; ``note`` is called after every step for a text such as the loss.

    A bar is drawn if standard error is a terminal, or in a notebook, and only after one second. Into a file
    or a pipe, such as the log of a batch job, a line is written every 30 seconds.
    """
    reporter = _reporter.get()
    silent = callable(reporter) or (None if reporter is None else not reporter)
    with _bar_type()(iterable, description, total, disable=silent, leave=False, delay=1, miniters=1) as bar:
        started = logged = time.monotonic()
        for done, item in enumerate(bar, start=1):
            yield item
            if reporter is None and bar.disable and (now := time.monotonic()) >= logged + LOG_SECONDS:
                line = log_line(description, done, bar.total, now - started, note())
                print(line, file=sys.stderr, flush=True)
                logged = now
            if callable(reporter):
                total = None if bar.total is None else int(bar.total)
                reporter(ProgressEvent(description, done, total, note()))
            elif not bar.disable:
                bar.set_postfix_str(note(), refresh=False)
