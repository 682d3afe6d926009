"""Everything that a call must leave as it was: of the model, of torch, of the process."""

from __future__ import annotations

import contextvars
import dis
import functools
import pickle
import random
import signal
import tempfile
import threading
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from phosphene.hooks import active_taps, guard, hook_lock
from phosphene.testing.observation import changes, state_of
from phosphene.torch_state import random_lock

_guard_module = __import__(guard.__module__, fromlist=["_frozen"])


def _is_free(lock: Any) -> bool:
    """Whether another thread could acquire a lock."""
    acquired = []

    def acquire() -> None:
        if lock.acquire(blocking=False):
            acquired.append(True)
            lock.release()

    thread = threading.Thread(target=acquire)
    thread.start()
    thread.join()
    return bool(acquired)


def _context() -> dict[str, Any]:
    """The values of Phosphene's context variables that differ from their defaults."""
    named = {var.name: value for var, value in contextvars.copy_context().items()}
    return {name: repr(value) for name, value in named.items() if name.startswith("phosphene") and value}


def settings() -> dict[str, Any]:
    """Settings of torch and of the process, by name."""
    return {
        "random state of torch": torch.get_rng_state().tolist(),
        "random state of Python": random.getstate(),
        "random state of NumPy": pickle.dumps(np.random.get_state()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "NumPy's errors": np.geterr(),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "taps": active_taps.get(),
        "frozen flags": list(_guard_module._frozen),
        "context": _context(),
        "locks": [_is_free(lock) for lock in (_guard_module._lock, hook_lock, random_lock)],
    }


def process_state() -> dict[str, Any]:
    """Threads, open files and temporary files, by name."""
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "open files": sorted((file.fd, file.path) for file in psutil.Process().open_files()),
        "temporary files": sorted(str(p) for p in Path(tempfile.gettempdir()).iterdir()),
    }


def network_state(model: Any) -> dict[str, Any]:
    """The model's state, with the kinds of hooks that ``state_of`` names by module."""
    return state_of(model)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of the settings that differ."""
    return [name for name in before if before[name] != after[name]]


@functools.cache
def with_exits(code: CodeType) -> set[int]:
    """Where a ``with`` statement calls ``__exit__(None, None, None)``: signals are not handled there."""
    instructions = list(dis.get_instructions(code))
    return {
        none.offset
        for n, none in enumerate(instructions[:-3])
        if all(i.opname == "LOAD_CONST" and i.argval is None for i in instructions[n : n + 3])
        and instructions[n + 3].opname in ("PRECALL", "CALL")
    }


def mixed_network() -> nn.Module:
    """Convolutions, some modules in training mode, some parameters frozen, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    network.eval()
    network[4].train()
    network[0].bias.requires_grad_(False)
    network[7].weight.grad = torch.ones_like(network[7].weight)
    return network


__all__ = [
    "changes",
    "differences",
    "mixed_network",
    "network_state",
    "process_state",
    "settings",
    "with_exits",
]
