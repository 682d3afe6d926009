"""Tensors that the backward pass needs, saved in spite of ``torch.utils.checkpoint``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from .backward_calls import is_backward, run_backward


def _detached(tensor: Tensor) -> Tensor:
    """Without its graph: a function that saves its own output would refer to itself, and never be freed.

    autograd attaches the graph again when it reads the tensor.
    """
    return tensor.detach()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def save_tensors() -> AbstractContextManager[Any]:
    """Inside, the backward pass uses the tensors of the forward pass.

    A checkpoint would compute them again, in the backward pass: after a block in which a layer computes
    something else, that would be other tensors.
    """
    return saved_tensors_hooks(_detached, _same)


class SaveTensors(TorchFunctionMode):
    """Functions of torch save their tensors, inside checkpoints as well; see ``save_tensors``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_backward(func):
            return run_backward(self, func, args, kwargs or {})
        with save_tensors():
            return func(*args, **(kwargs or {}))
