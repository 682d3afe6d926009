"""The batch size: how many images pass through a model at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral
from typing import TYPE_CHECKING

import psutil
import torch

from ..errors import InputError, value_repr

if TYPE_CHECKING:
    from . import Model


_max_batch: ContextVar[int | None] = ContextVar("phosphene_max_batch", default=None)


#: Larger batches do not make a CPU faster, and results should not depend on the machine's memory.
_MAX_DEFAULT = 32


#: The share of the free memory that activations may use.
_MEMORY_SHARE = 0.25


@contextmanager
def max_batch(size: int | None) -> Iterator[None]:
    """At most ``size`` images at once inside this block; None: as many as fit, up to 32."""
    if size is not None and (isinstance(size, bool) or not isinstance(size, Integral)):
        raise InputError(f"the batch size must be an integer, not {value_repr(size)}")
    if size is not None and size < 1:
        raise InputError(f"the batch size must be at least 1, not {size}")
    token = _max_batch.set(size if size is not None else _max_batch.get())
    try:
        yield
    finally:
        _max_batch.reset(token)


def batch_limit() -> int | None:
    """The limit set by ``max_batch``; None where what fits is computed."""
    return _max_batch.get()


def batch_size(model: Model) -> int:
    """How many images to pass through the model at once: the limit set by ``max_batch``, else what fits."""
    if model.row_by_row:
        return 1
    if (limit := _max_batch.get()) is not None:
        return limit
    if not model.layers:
        return _MAX_DEFAULT  # a function's memory is unknown, and calling it only to find out may be costly
    layers = model.structure.layers.values()
    values = sum([math.prod(info.shape) * info.calls for info in layers if info.shape is not None])
    # Twice: in the backward pass there is a gradient for every activation.
    per_image = max(1, 2 * values * model.dtype.itemsize)
    fitting = max(1, int(_MEMORY_SHARE * _free_memory(model.device) / per_image))
    return min(_MAX_DEFAULT, 1 << (fitting.bit_length() - 1))


def _free_memory(device: torch.device) -> int:
    """Bytes that new tensors on a device may use."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    # What torch's allocator reserved and released is free as well: else a second run had smaller batches.
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reusable
