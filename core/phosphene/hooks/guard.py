"""``guard``: eval mode and frozen parameters inside a block, restored afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .tap import active_taps

_lock = threading.Lock()


#: Flags that are False now: id of the module or parameter -> (itself, flag name, earlier value, its guards).
_frozen: dict[int, tuple[Any, str, bool, set[object]]] = {}


def _freeze(flags: list[tuple[Any, str]], guard: object) -> None:
    """Set the flags to False; record the earlier value of each and the guards that need it to be False."""
    with _lock:
        for owner, flag in flags:
            _frozen.setdefault(id(owner), (owner, flag, getattr(owner, flag), set()))[3].add(guard)
            setattr(owner, flag, False)


def _restore(flags: list[tuple[Any, str]], guard: object) -> None:
    """Restore the earlier values of the flags that no other guard needs to be False."""
    try:
        while flags:
            with _lock:
                owner, flag = flags[-1]
                if id(owner) in _frozen:
                    _, _, before, guards = _frozen[id(owner)]
                    guards.discard(guard)
                    if not guards:
                        del _frozen[id(owner)]
                        setattr(owner, flag, before)
            flags.pop()
    finally:
        if flags:  # after an exception (Ctrl-C), the remaining flags must be restored too
            flags.pop()
            _restore(flags, guard)


@contextmanager
def guard(*modules: nn.Module) -> Iterator[None]:
    """Modules in eval mode, parameters frozen, taps opened outside inactive, for the duration of the block.

    However the block is left, every training flag and ``requires_grad`` flag is restored. Guards nest,
    also across threads: the last one to be left restores the flags.
    """
    this_guard = object()
    with ExitStack() as stack:
        for module in modules:
            flags: list[tuple[Any, str]] = [(part, "training") for part in module.modules()]
            flags += [(p, "requires_grad") for p in module.parameters()]
            # Registered before the flags are set: Ctrl-C between the two lines must not leave them set.
            stack.callback(_restore, flags, this_guard)
            _freeze(flags, this_guard)
        stack.callback(active_taps.reset, active_taps.set(()))
        yield
