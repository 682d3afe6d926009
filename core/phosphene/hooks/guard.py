"""``guard``: eval mode and frozen parameters inside a block, restored afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .tap import active_taps

_lock = threading.Lock()


#: What is held still now: id -> (the thing, its flag's name, the flag before, who holds it).
_held: dict[int, tuple[Any, str, bool, set[object]]] = {}


def _hold(things: list[tuple[Any, str]], holder: object) -> None:
    with _lock:
        for thing, flag in things:
            _held.setdefault(id(thing), (thing, flag, getattr(thing, flag), set()))[3].add(holder)
            setattr(thing, flag, False)


def _release(things: list[tuple[Any, str]], holder: object) -> None:
    try:
        while things:
            with _lock:
                thing, flag = things[-1]
                if id(thing) in _held:
                    _, _, before, holders = _held[id(thing)]
                    holders.discard(holder)
                    if not holders:
                        del _held[id(thing)]
                        setattr(thing, flag, before)
            things.pop()
    finally:
        if things:  # an interruption must not strand the others
            things.pop()
            _release(things, holder)


@contextmanager
def guard(*modules: nn.Module) -> Iterator[None]:
    """A run's own room: the modules in eval mode, parameters frozen, no tap of another run in sight.

    However the block is left, every training flag and gradient flag is as it was. Guards nest,
    also across threads: the last one out restores.
    """
    holder = object()
    with ExitStack() as stack:
        for module in modules:
            things: list[tuple[Any, str]] = [(part, "training") for part in module.modules()]
            things += [(p, "requires_grad") for p in module.parameters()]
            # The way back is laid first: an interruption between the lines must not strand them.
            stack.callback(_release, things, holder)
            _hold(things, holder)
        stack.callback(active_taps.reset, active_taps.set(()))
        yield
