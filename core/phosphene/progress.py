"""Progress of long work: bars in a terminal or notebook, silence, or a callback."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class ProgressEvent:
    """One step of some work: ``done`` of ``total`` (None where the total is not known), and how it stands."""

    description: str
    done: int
    total: int | None
    note: str = ""

    def as_json(self) -> str:
        """The event as a line of JSON, as ``--events`` tells it."""
        return json.dumps({"event": "progress", **asdict(self)}, ensure_ascii=False)


#: None: bars where a person is watching; True: bars; False: silence; a callable gets every event instead.
Reporter = bool | None | Callable[[ProgressEvent], None]


_reporter: ContextVar[Reporter] = ContextVar("phosphene_progress", default=None)


@contextmanager
def report_progress(to: Reporter) -> Iterator[None]:
    """Choose where progress goes inside this block; None leaves it as it was."""
    token = _reporter.set(_reporter.get() if to is None else to)
    try:
        yield
    finally:
        _reporter.reset(token)


def progress_bar(
    iterable: Iterable[T], description: str, total: int | None = None, *, note: Callable[[], str] = str
) -> Iterator[T]:
    """Iterate, telling how far the work has come; ``note``, asked after every step, says how it stands.

    A bar is drawn only when standard error is a terminal (or in a notebook), and only for work
    that lasts longer than a second.
    """
    from tqdm.auto import tqdm  # imported late: it is not needed to list methods

    reporter = _reporter.get()
    silent = callable(reporter) or (None if reporter is None else not reporter)
    with tqdm(iterable, description, total, disable=silent, leave=False, delay=1) as bar:
        for done, item in enumerate(bar, start=1):
            yield item
            if callable(reporter):
                total = None if bar.total is None else int(bar.total)
                reporter(ProgressEvent(description, done, total, note()))
            elif not bar.disable:
                bar.set_postfix_str(note(), refresh=False)
