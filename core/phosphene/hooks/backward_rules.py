"""Backward rules for ReLU: guided backpropagation and deconvolutional network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import ModelError

#: ``rule(gradient, passed) -> gradient``: what goes back through a ReLU; ``passed`` is what it would itself
#: let through, the gradient where it was open.
BackwardRule = Callable[[Tensor, Tensor], Tensor]


def guided(gradient: Tensor, passed: Tensor) -> Tensor:
    """Guided backpropagation (Springenberg 2015): only positive gradients through open gates."""
    return passed.clamp(min=0)


def deconvnet(gradient: Tensor, passed: Tensor) -> Tensor:
    """Deconvolutional network (Zeiler & Fergus 2014): only positive gradients, gates ignored."""
    return gradient.clamp(min=0)


class _RewrittenRelu(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, upper: float | None, in_place: bool, keep_output: bool, rule: BackwardRule
    ) -> Tensor:
        output = x.clamp_(0, upper) if in_place else x.clamp(0, upper)
        ctx.save_for_backward(output if keep_output else x)
        ctx.upper, ctx.rule = float("inf") if upper is None else upper, rule
        if in_place:
            ctx.mark_dirty(x)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        passed = torch.ops.aten.hardtanh_backward(gradient, kept, 0, ctx.upper)
        return ctx.rule(gradient, passed), None, None, None, None


#: Calls that are or may be a ReLU: their arguments in order, with what they mean when left out.
_CLAMP = {"input": None, "min": None, "max": None}


_RELUS: dict[str, dict[str, Any]] = {
    "relu": {"input": None, "inplace": False, "min": 0, "max": None},
    "relu6": {"input": None, "inplace": False, "min": 0, "max": 6},
    "hardtanh": {"input": None, "min": -1, "max": 1, "inplace": False},
    **dict.fromkeys(("clamp", "clip", "clamp_min"), _CLAMP),
}


class BackwardRewrite(TorchFunctionMode):
    """Counts and rewrites every ReLU, however it is spelled; see ``rewrite_backward``."""

    def __init__(self, rule: BackwardRule) -> None:
        super().__init__()
        self.rule = rule
        self.caught = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        spelling = getattr(func, "__name__", "")
        if (usual := _RELUS.get(spelling.removesuffix("_"))) is None:
            return func(*args, **kwargs)
        named = {name.removesuffix("_val"): value for name, value in kwargs.items()}
        given = usual | dict(zip(usual, args, strict=False)) | named
        x, low, high = given["input"], given["min"], given["max"]
        plain = not isinstance(low, Tensor) and not isinstance(high, Tensor)
        # Pixels kept in [0, 1] are no ReLU, and one that no gradient reaches is not on the way from
        # the pixels (Swin V2's position bias).
        if not (plain and low == 0 and high in (None, 6) and x.requires_grad):
            return func(*args, **kwargs)
        self.caught += 1
        in_place = spelling.endswith("_") or given.get("inplace", False)
        # What autograd keeps itself of such a call, so that the network writes into the other one alone.
        keep_output = in_place or spelling == "relu"
        return _RewrittenRelu.apply(x, high, in_place, keep_output, self.rule)


@contextmanager
def rewrite_backward(rule: BackwardRule) -> Iterator[BackwardRewrite]:
    """Inside, gradients pass through ReLU and ReLU6 by ``rule``; no module is touched.

    In-place, reused, functional and method-call ReLUs all obey, also those written as a clamp, since
    the calls themselves are caught. Leaving without having caught one raises ModelError: the result
    would be the plain gradient under a wrong name.
    """
    with BackwardRewrite(rule) as rewrite:
        yield rewrite
    if rewrite.caught == 0:
        raise ModelError(
            f"the {getattr(rule, '__name__', 'backward')} rule found no ReLU in this model "
            "(GELU and SiLU networks have none), so its result would be the plain gradient; "
            "use saliency, or a model with ReLUs"
        )
