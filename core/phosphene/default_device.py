"""The default device of new tensors: the CPU in the library's own code, the caller's in a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

#: The device of ``torch.set_default_device``, inside ``cpu_by_default``; None where it is the CPU.
_caller: ContextVar[torch.device | None] = ContextVar("phosphene_default_device", default=None)


@contextmanager
def cpu_by_default() -> Iterator[None]:
    """Inside, new tensors are on the CPU, whatever ``torch.set_default_device`` says.

    Random numbers are drawn on the CPU and then moved, so that they are the same on every device.
    """
    device = torch.get_default_device()
    if device.type == "cpu":
        yield
        return
    token = _caller.set(device)
    try:
        with torch.device("cpu"):
            yield
    finally:
        _caller.reset(token)


def default_device_of_caller() -> AbstractContextManager[object]:
    """Inside, the default device is the caller's again: a network may create tensors on it."""
    device = _caller.get()
    return nullcontext() if device is None else device
