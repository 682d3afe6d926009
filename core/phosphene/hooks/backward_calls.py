"""Backward passes inside a mode of torch's functions: checkpointed layers run again there."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..torch_state import function_mode


def _without_override(func: Any) -> FunctionType:
    """A copy of a function that does not pass itself to the active mode, which would then be inactive."""
    never = lambda *_: False
    overrides = {"has_torch_function": never, "has_torch_function_unary": never}
    copied = FunctionType(func.__code__, {**func.__globals__, **overrides}, argdefs=func.__defaults__)
    copied.__kwdefaults__ = func.__kwdefaults__
    return copied


_BACKWARD: dict[Any, FunctionType] = {
    func: _without_override(func) for func in (torch.autograd.grad, Tensor.backward)
}


def is_backward(func: Any) -> bool:
    """Whether a call computes gradients."""
    return func in _BACKWARD


def run_backward(mode: TorchFunctionMode, func: Any, args: Any, kwargs: Any) -> Any:
    """The call of ``is_backward``, with the mode active for the layers that run again in the backward pass.

    A layer under ``torch.utils.checkpoint`` must save the same tensors as in the forward pass.
    """
    with function_mode(mode):
        return _BACKWARD[func](*args, **kwargs)
