"""Backward rules for ReLU: guided backpropagation and the deconvolutional network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import ModelError
from ..torch_state import function_mode

#: ``rule(gradient, relu_gradient) -> gradient``: the gradient with respect to a ReLU's input, from the
#: gradient with respect to its output and from the usual gradient of ReLU, which is ``gradient`` where the
#: input is positive and 0 elsewhere.
BackwardRule = Callable[[Tensor, Tensor], Tensor]


def guided(gradient: Tensor, relu_gradient: Tensor) -> Tensor:
    """Guided backpropagation (Springenberg 2015): positive gradients where the input is positive."""
    return relu_gradient.clamp(min=0)


def deconvnet(gradient: Tensor, relu_gradient: Tensor) -> Tensor:
    """Deconvolutional network (Zeiler & Fergus 2014): positive gradients, whatever the input is."""
    return gradient.clamp(min=0)


class _RewrittenRelu(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, upper: float | None, in_place: bool, save_output: bool, rule: BackwardRule
    ) -> Tensor:
        output = x.clamp_(0, upper) if in_place else x.clamp(0, upper)
        ctx.save_for_backward(output if save_output else x)
        ctx.upper, ctx.rule = float("inf") if upper is None else upper, rule
        if in_place:
            ctx.mark_dirty(x)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        (saved,) = ctx.saved_tensors
        relu_gradient = torch.ops.aten.hardtanh_backward(gradient, saved, 0, ctx.upper)
        return ctx.rule(gradient, relu_gradient), None, None, None, None


#: Functions that are or may be a ReLU: their parameters in order, with defaults.
_CLAMP = {"input": None, "min": None, "max": None}


_RELUS: dict[str, dict[str, Any]] = {
    "relu": {"input": None, "inplace": False, "min": 0, "max": None},
    "relu6": {"input": None, "inplace": False, "min": 0, "max": 6},
    "hardtanh": {"input": None, "min": -1, "max": 1, "inplace": False},
    **dict.fromkeys(("clamp", "clip", "clamp_min"), _CLAMP),
}


class BackwardRewrite(TorchFunctionMode):
    """Rewrites and counts every ReLU, whichever function computes it; see ``rewrite_backward``."""

    def __init__(self, rule: BackwardRule) -> None:
        super().__init__()
        self.rule = rule
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        function_name = getattr(func, "__name__", "")
        if (defaults := _RELUS.get(function_name.removesuffix("_"))) is None:
            return func(*args, **kwargs)
        named = {name.removesuffix("_val"): value for name, value in kwargs.items()}
        arguments = defaults | dict(zip(defaults, args, strict=False)) | named
        x, low, high = arguments["input"], arguments["min"], arguments["max"]
        numbers = not isinstance(low, Tensor) and not isinstance(high, Tensor)
        # Clamping pixels to [0, 1] is not a ReLU, and without requires_grad the input does not depend on
        # the pixels (Swin V2's position bias).
        if not (numbers and low == 0 and high in (None, 6) and x.requires_grad):
            return func(*args, **kwargs)
        self.count += 1
        in_place = function_name.endswith("_") or arguments.get("inplace", False)
        # Save the tensor that autograd itself saves for this function: the network may overwrite the other.
        save_output = in_place or function_name == "relu"
        return _RewrittenRelu.apply(x, high, in_place, save_output, self.rule)


class rewrite_backward(function_mode):
    """Inside, ``rule`` replaces the backward pass of ReLU and ReLU6; no module is changed.

    The function calls themselves are intercepted, so it applies to modules, in-place, reused and functional
    ReLUs, tensor methods and clamps at 0. Yields the ``BackwardRewrite``. Raises ModelError at the end where
    no ReLU was called: the result would be the plain gradient under a wrong name.
    """

    def __init__(self, rule: BackwardRule) -> None:
        self.rewrite = BackwardRewrite(rule)
        super().__init__(self.rewrite)

    def __enter__(self) -> BackwardRewrite:
        super().__enter__()
        return self.rewrite

    def __exit__(self, *error: object) -> None:
        super().__exit__()
        if not any(error) and self.rewrite.count == 0:
            raise ModelError(
                f"the {getattr(self.rewrite.rule, '__name__', 'backward')} rule found no ReLU in this model "
                "(GELU and SiLU networks have none), so its result would be the plain gradient; "
                "use saliency, or a model with ReLUs"
            )
