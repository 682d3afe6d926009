"""Progress of long work: bars in a terminal or a notebook, silence or a callback when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class ProgressEvent:
    """One step of some work: ``done`` of ``total`` (None where the total is not known), and how it stands."""

    description: str
    done: int
    total: int | None
    note: str = ""


#: None: bars where a person is watching; False: silence; a callable gets every event instead.
_reporter: ContextVar[bool | None | Callable[[ProgressEvent], None]] = ContextVar(
    "phosphene_progress", default=None
)


@contextmanager
def reporting(to: bool | None | Callable[[ProgressEvent], None]) -> Iterator[None]:
    """Choose where progress goes inside this block: True a bar, False nowhere, a callable; None as before."""
    token = _reporter.set(_reporter.get() if to is None else to)
    try:
        yield
    finally:
        _reporter.reset(token)


def progress(
    iterable: Iterable[T],
    description: str,
    total: int | None = None,
    *,
    note: Callable[[], str] | None = None,
) -> Iterator[T]:
    """Iterate, telling how far the work has come; ``note``, asked after every step, says how it stands.

    A bar is drawn only when standard error is a terminal (or in a notebook), and only for work
    that lasts longer than a second.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    reporter = _reporter.get()
    if callable(reporter):
        for done, item in enumerate(iterable, start=1):
            yield item
            reporter(ProgressEvent(description, done, total, note() if note else ""))
        return
    from tqdm.auto import tqdm  # imported late: it is not needed to list methods

    with tqdm(
        iterable,
        desc=description,
        total=total,
        disable=None if reporter is None else not reporter,
        leave=False,
        delay=1,
    ) as bar:
        for item in bar:
            yield item
            if note is not None and not bar.disable:
                bar.set_postfix_str(note(), refresh=False)
