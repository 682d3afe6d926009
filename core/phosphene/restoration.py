"""Settings that a call changes and restores: random states, hooks, gradient mode, torch's function modes.

Ctrl-C may arrive between any two instructions, also at the first one of an ``__exit__``, which then does not
run. So whatever is changed is first recorded for ``call_and_restore``, which restores it once more.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, TypeVar

import torch

T = TypeVar("T")

#: What the current call changed, the last last; each entry may be called repeatedly.
_changes: ContextVar[list[Callable[[], None]] | None] = ContextVar("phosphene_changes", default=None)


def record_change(restore: Callable[[], None]) -> None:
    """Record a change before it is made: ``restore`` is called at the end of the call, if not forgotten."""
    changes = _changes.get()
    if changes is not None:
        changes.append(restore)


def forget_change(restore: Callable[[], None]) -> None:
    """The change was restored."""
    changes = _changes.get()
    if changes is not None and restore in changes:
        changes.remove(restore)


def call_and_restore(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a copy of the context; afterwards all that it changed is as before.

    That is gradient mode, torch's function modes, context variables and every ``record_change``.
    """
    changes: list[Callable[[], None]] = []
    gradients, modes = torch.is_grad_enabled(), torch._C._len_torch_function_stack()
    context = copy_context()
    context.run(_changes.set, changes)
    try:
        try:
            return context.run(function, *args)
        finally:
            _restore(changes, gradients, modes)
    finally:  # again, because Ctrl-C may have ended the first at any instruction
        _restore(changes, gradients, modes)


def _restore(changes: list[Callable[[], None]], gradients: bool, modes: int) -> None:
    torch._C._set_grad_enabled(gradients)
    while torch._C._len_torch_function_stack() > modes:
        torch._C._pop_torch_function_stack()
    while changes:
        changes[-1]()
        changes.pop()


class Restoring:
    """A context manager whose ``close`` restores what ``open`` changed, wherever Ctrl-C arrives.

    ``close`` may be called repeatedly, and after a part of ``open``.
    """

    def open(self) -> None:
        """Make the change."""
        raise NotImplementedError

    def close(self) -> None:
        """Restore what was before."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        try:
            record_change(self.close)
            self.open()
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        finally:  # again, because Ctrl-C may have ended the first at any instruction
            self.close()
            forget_change(self.close)


# --- random states -----------------------------------------------------------------------------


def _random_devices() -> Iterator[tuple[ModuleType, int]]:
    """Every accelerator in use, as torch's module for its type and its index."""
    for module in (torch.cuda, torch.xpu):
        # An accelerator that was not used yet has no state, and asking for it would initialize the device.
        if module.is_initialized():
            yield from ((module, index) for index in range(module.device_count()))


def seed_generators(seed: int) -> None:
    """Seed torch's generators of the CPU and of every accelerator in use."""
    torch.default_generator.manual_seed(seed)
    for module, index in _random_devices():
        with module.device(index):
            module.manual_seed(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@dataclass(eq=False)
class fork_random_state(Restoring):
    """Inside the block, torch's random numbers may be drawn and seeded; afterwards all states are restored.

    The states are those of the CPU and of every accelerator in use.
    """

    _states: list[tuple[Callable[..., Any], tuple[Any, ...]]] = field(default_factory=list)

    def open(self) -> None:
        self._states.append((torch.set_rng_state, (torch.get_rng_state(),)))
        for module, index in _random_devices():
            self._states.append((module.set_rng_state, (module.get_rng_state(index), index)))
        if torch.backends.mps.is_available():
            self._states.append((torch.mps.set_rng_state, (torch.mps.get_rng_state(),)))

    def close(self) -> None:
        while self._states:
            restore, state = self._states[-1]
            restore(*state)
            self._states.pop()


# --- deterministic algorithms ----------------------------------------------------------------------

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def _deterministic_settings() -> dict[str, Any]:
    return {
        "enabled": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": torch.backends.cudnn.deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
        _CUBLAS: os.environ.get(_CUBLAS),
    }


def _set_deterministic(settings: dict[str, Any]) -> None:
    torch.use_deterministic_algorithms(settings["enabled"], warn_only=settings["warn_only"])
    torch.backends.cudnn.deterministic = settings["cudnn"]
    torch.backends.cudnn.benchmark = settings["benchmark"]
    if settings[_CUBLAS] is None:
        os.environ.pop(_CUBLAS, None)
    else:
        os.environ[_CUBLAS] = settings[_CUBLAS]


@dataclass(eq=False)
class deterministic_algorithms(Restoring):
    """Inside the block, torch uses deterministic CUDA kernels and warns where an operation has none.

    The settings are those of the process: the last of several threads to leave the block restores them.
    """

    enabled: bool = True

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _open: ClassVar[set[Restoring]] = set()
    _before: ClassVar[dict[str, Any]] = {}

    def open(self) -> None:
        if not self.enabled:
            return
        with self._lock:
            if not self._open:
                self._before.update(_deterministic_settings())
            self._open.add(self)
            # A user's own strict setting (warn_only=False) stays.
            strict = self._before["enabled"] and not self._before["warn_only"]
            workspace = self._before[_CUBLAS] or ":4096:8"
            _set_deterministic(
                {"enabled": True, "warn_only": not strict, "cudnn": True, "benchmark": False,
                 _CUBLAS: workspace}
            )  # fmt: skip

    def close(self) -> None:
        with self._lock:
            if self in self._open:
                if len(self._open) == 1:
                    _set_deterministic(self._before)
                self._open.discard(self)
