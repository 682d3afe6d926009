"""Settings of torch that a call changes and restores: gradients, function modes, random states, kernels."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .restoration import Restoring, current_changes

P = ParamSpec("P")


T = TypeVar("T")


def restored(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: the function is called by ``call_and_restore``."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return call_and_restore(function, *args, **kwargs)

    return call


def call_and_restore(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a copy of the context; afterwards all that it changed is as before.

    That is gradient mode, torch's function modes, context variables and every ``record_change``.
    """
    changes: list[Callable[[], None]] = []
    gradients, modes = torch.is_grad_enabled(), torch._C._len_torch_function_stack()
    context = copy_context()
    context.run(current_changes.set, changes)
    try:
        try:
            return context.run(function, *args, **kwargs)
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


class function_mode(Restoring):
    """A mode of torch's functions inside the block."""

    def __init__(self, mode: TorchFunctionMode) -> None:
        self.mode = mode

    def open(self) -> None:
        torch._C._push_on_torch_function_stack(self.mode)  # type: ignore[arg-type]

    def close(self) -> None:
        # By identity: a generator that Ctrl-C has ended may close it late, after ``call_and_restore``.
        while any(mode is self.mode for mode in _get_current_function_mode_stack()):
            torch._C._pop_torch_function_stack()


#: All threads share torch's generators: one thread at a time forks or seeds them. The lock is acquired
#: before any other lock.
random_lock = threading.RLock()


# --- random states -----------------------------------------------------------------------------


def _accelerators() -> list[ModuleType]:
    """Torch's modules for the types of accelerators in use.

    One that was not used yet has no random state, and asking for it would initialize the device.
    """
    return [module for module in (torch.cuda, torch.xpu) if module.is_initialized()]


def seed_generators(seed: int) -> None:
    """Seed torch's generators of the CPU and of every accelerator in use."""
    torch.default_generator.manual_seed(seed)
    for module in _accelerators():
        module.manual_seed_all(seed)
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
        for module in _accelerators():
            for index in range(module.device_count()):
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


# --- default device ------------------------------------------------------------------------------

#: The device of ``torch.set_default_device``, inside ``cpu_by_default``; None where it is the CPU.
_callers_device: ContextVar[torch.device | None] = ContextVar("phosphene_default_device", default=None)


class cpu_by_default(Restoring, ContextDecorator):
    """Inside, new tensors are on the CPU, whatever ``torch.set_default_device`` says; also a decorator.

    Random numbers are drawn on the CPU and then moved, so that they are the same on every device.
    """

    #: The mode, and the caller's device outside the block; None where the default is the CPU already.
    _mode: function_mode | None = None
    _outer_device: torch.device | None = None

    def _recreate_cm(self) -> cpu_by_default:
        return cpu_by_default()  # for each call of a decorated function

    def open(self) -> None:
        if (device := torch.get_default_device()).type != "cpu":
            self._outer_device = _callers_device.get()
            self._mode = function_mode(DeviceContext(torch.device("cpu")))
            _callers_device.set(device)
            self._mode.open()

    def close(self) -> None:
        if self._mode is not None:
            self._mode.close()
            _callers_device.set(self._outer_device)


def default_device_of_caller() -> AbstractContextManager[object]:
    """Inside, the default device is the caller's again: a network may create tensors on it."""
    device = _callers_device.get()
    return nullcontext() if device is None else device


# --- all settings that results depend on -----------------------------------------------------------


@dataclass(frozen=True)
class TorchSettings:
    """Torch's settings that results depend on bit by bit; ``apply`` them to compute the same elsewhere.

    Sums and convolutions depend on the number of threads, too.
    """

    threads: int
    gradients: bool
    dtype: torch.dtype
    device: torch.device
    matmul_precision: str
    autocast: dict[str, tuple[bool, torch.dtype]]
    deterministic: dict[str, Any]

    @classmethod
    def current(cls) -> TorchSettings:
        """Those of this process and thread; ``device`` is the caller's default device."""
        return cls(
            threads=torch.get_num_threads(),
            gradients=torch.is_grad_enabled(),
            dtype=torch.get_default_dtype(),
            device=_callers_device.get() or torch.get_default_device(),
            matmul_precision=torch.get_float32_matmul_precision(),
            autocast={
                kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in ("cpu", "cuda")
            },
            deterministic=_deterministic_settings(),
        )

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Compute with these settings inside the block, in which new tensors are on the CPU."""
        before = TorchSettings.current()
        with ExitStack() as stack:
            stack.callback(before._set)
            self._set()
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            for kind, (enabled, dtype) in self.autocast.items():
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled))
            if self.device.type != "cpu":
                stack.enter_context(self.device)
            stack.enter_context(cpu_by_default())
            yield

    def _set(self) -> None:
        """Set what belongs to the process."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.matmul_precision)
        _set_deterministic(self.deterministic)
