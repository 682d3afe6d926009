"""Reports of networks that are loaded with random weights; without torch, for the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

#: What is called with the URI of a network with random weights, because none were asked for.
_callback: ContextVar[Callable[[str], object] | None] = ContextVar("phosphene_random_weights", default=None)


@contextmanager
def report_random_weights(callback: Callable[[str], object]) -> Iterator[None]:
    """Inside, ``callback`` is called with the URI of every network that is loaded with random weights."""
    token = _callback.set(callback)
    try:
        yield
    finally:
        _callback.reset(token)


def has_random_weights(uri: str) -> None:
    """Report a network with random weights; without a callback nothing happens."""
    if (callback := _callback.get()) is not None:
        callback(uri)
