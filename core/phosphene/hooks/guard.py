"""``guard``: eval mode and frozen parameters inside a block, restored afterwards."""

from __future__ import annotations

import threading
from typing import Any

from torch import nn

from ..errors import ModelError
from ..restoration import Restoring
from .tap import Tap, active_taps

#: Why a network under reentrant checkpoints has no gradients, after its name.
REENTRANT_CHECKPOINT = (
    "recomputes layers by torch.utils.checkpoint(..., use_reentrant=True), which allows no gradients with "
    "respect to images and layers; pass use_reentrant=False, or turn checkpointing off (in transformers: "
    "gradient_checkpointing_disable())"
)

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
    while flags:
        with _lock:
            owner, flag = flags[-1]
            if id(owner) in _frozen:
                _, _, before, guards = _frozen[id(owner)]
                guards.discard(guard)
                if not guards:
                    setattr(owner, flag, before)
                    del _frozen[id(owner)]
        flags.pop()


def is_reentrant_checkpoint(error: RuntimeError) -> bool:
    """Whether it is torch's error for ``autograd.grad`` through a reentrant checkpoint."""
    return "use_reentrant=True" in str(error)


class guard(Restoring):
    """Modules in eval mode, parameters frozen, taps opened outside inactive, for the duration of the block.

    However the block is left, every training flag and ``requires_grad`` flag is restored. Guards nest,
    also across threads: the last one to be left restores the flags.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules
        self._flags: list[tuple[Any, str]] = []
        self._taps: tuple[Tap, ...] | None = None

    def open(self) -> None:
        self._taps = active_taps.get()
        active_taps.set(())
        # Recorded before any flag is set, so that Ctrl-C in between leaves none set.
        self._flags += [(part, "training") for module in self._modules for part in module.modules()]
        self._flags += [(p, "requires_grad") for module in self._modules for p in module.parameters()]
        _freeze(self._flags, self)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        cause = error[1] if len(error) > 1 else None
        if isinstance(cause, RuntimeError) and is_reentrant_checkpoint(cause):
            names = " and ".join(dict.fromkeys(type(module).__name__ for module in self._modules))
            raise ModelError(f"{names} {REENTRANT_CHECKPOINT}") from cause

    def close(self) -> None:
        _restore(self._flags, self)
        if self._taps is not None:
            active_taps.set(self._taps)
            self._taps = None
