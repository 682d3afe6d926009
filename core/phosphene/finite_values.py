"""Checks that values are finite: one sum on the CPU, and no wait for another device until a call ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .errors import DivergenceError, ModelError


class NotFiniteError(ModelError):
    """Logits or features with NaN or infinity."""


class NonFiniteResultError(ModelError, DivergenceError):
    """A method's result with NaN or infinity, from inputs and weights that are finite."""


#: Checks whose outcome is not read yet, by what they check: the flag on its device, and the error to raise.
_Deferred = dict[tuple[str, torch.device], tuple[Tensor, Callable[[], Exception]]]
_deferred: ContextVar[_Deferred | None] = ContextVar("phosphene_deferred_checks", default=None)


@contextmanager
def defer_checks() -> Iterator[None]:
    """Inside, values on other devices than the CPU are checked at the first pass and when the block ends.

    To read a flag after every pass would make each pass wait for the device.
    """
    deferred: _Deferred = {}
    token = _deferred.set(deferred)
    try:
        yield
    finally:
        _deferred.reset(token)
    for is_finite, error in deferred.values():
        if not _read(is_finite):
            raise error()


def check_finite(values: Tensor, what: str, error: Callable[[], Exception]) -> None:
    """Raise ``error()`` where a value is NaN or infinite; ``what`` names the kind of value.

    Values that cannot be read (on the meta device, under ``torch.func`` or a tracer) and tensor subclasses
    are not checked.
    """
    if not values.is_floating_point() or not _is_readable(values):
        return
    with torch._C.DisableTorchFunction():  # modes that rewrite a network's operations do not concern these
        deferred = _deferred.get()
        if deferred is None or not _waits(values.device):
            if not all_finite(values):
                raise error()
            return
        key, is_finite = (what, values.device), values.isfinite().all()
        if key not in deferred:
            if not _read(is_finite):
                raise error()
            deferred[key] = (is_finite, error)
        else:
            deferred[key] = (deferred[key][0] & is_finite, error)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # A sum reads the memory once, ``isfinite`` three times; a sum of finite values that overflows is rare.
    values = values.detach()
    return math.isfinite(values.sum(dtype=torch.float32)) or bool(values.isfinite().all())


def _waits(device: torch.device) -> bool:
    """Whether reading a value waits for all operations that are queued on the device."""
    return device.type != "cpu"


def _read(flag: Tensor) -> bool:
    return bool(flag)


def contains_non_finite(value: object) -> bool:
    """Whether a tensor, or one in a mapping, a list or a network, has NaN or an infinite value."""
    match value:
        case Tensor():
            return value.is_floating_point() and _is_readable(value) and not all_finite(value)
        case torch.nn.Module():
            return contains_non_finite(value.state_dict())
        case Mapping():
            return any(map(contains_non_finite, value.values()))
        case tuple() | list():
            return any(map(contains_non_finite, value))
    return False


def _is_readable(values: Tensor) -> bool:
    """Whether it is a plain tensor with values, outside of transforms and tracers."""
    if type(values) not in (Tensor, torch.nn.Parameter) or values.is_meta:
        return False  # a FakeTensor is a subclass, too
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(values)
