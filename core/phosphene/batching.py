"""One memory budget: how many images go through a model at once, honoured by every method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

from .errors import InputError

if TYPE_CHECKING:
    from .models import Model

_max_batch: ContextVar[int | None] = ContextVar("phosphene_max_batch", default=None)

#: Larger batches no longer make a CPU faster, and results should not depend on the machine's memory.
_USUAL = 32
#: The share of free memory that activations may take.
_SHARE = 0.25


@contextmanager
def max_batch(size: int | None) -> Iterator[None]:
    """At most ``size`` images at once inside this block; None: as many as fit, up to 32."""
    if size is not None and size < 1:
        raise InputError(f"the batch size must be at least 1, not {size}")
    token = _max_batch.set(size if size is not None else _max_batch.get())
    try:
        yield
    finally:
        _max_batch.reset(token)


def batch_size(model: Model) -> int:
    """How many images to give the model at once: what was asked for, else what fits."""
    asked = _max_batch.get()
    if asked is not None:
        return asked
    values = sum(
        torch.Size(info.shape).numel() * info.calls
        for info in model.anatomy.layers.values()
        if info.shape is not None
    )
    # Twice: with gradients, every activation is met again on the way back.
    per_image = max(1, 2 * values * model.dtype.itemsize)
    size = _USUAL
    while size > 1 and size * per_image > _SHARE * _free_memory(model.device):
        size //= 2
    return size


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    import psutil

    return float(psutil.virtual_memory().available)
