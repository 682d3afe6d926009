"""Backward rules for ReLU: guided backpropagation and the deconvolutional network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import ModelError
from ..torch_state import function_mode
from .backward_calls import is_backward, run_backward
from .rectifiers import Rectifier, read_rectifier

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
    def forward(ctx: Any, x: Tensor, rectifier: Rectifier, rule: BackwardRule) -> Tensor:  # type: ignore[override]
        ctx.set_materialize_grads(False)  # behind a quantized layer there is no gradient, which is not 0
        upper = rectifier.upper
        output = x.clamp_(0, upper) if rectifier.in_place else x.clamp(0, upper)
        saved = {"input": x, "output": output}.get(rectifier.saves)
        # Of neither it is a copy, since the network may overwrite both.
        ctx.save_for_backward(x.clone() if saved is None else saved)
        ctx.upper, ctx.rule = float("inf") if upper is None else upper, rule
        if rectifier.in_place:
            ctx.mark_dirty(x)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        if gradient is None:
            return None, None, None
        (saved,) = ctx.saved_tensors
        relu_gradient = torch.ops.aten.hardtanh_backward(gradient, saved, 0, ctx.upper)
        return ctx.rule(gradient, relu_gradient), None, None


class BackwardRewrite(TorchFunctionMode):
    """Rewrites and counts every ReLU, whichever function computes it; see ``rewrite_backward``."""

    def __init__(self, rule: BackwardRule) -> None:
        super().__init__()
        self.rule = rule
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_backward(func):
            count = self.count
            gradients = run_backward(self, func, args, kwargs)
            self.count = count
            return gradients
        rectifier = read_rectifier(func, args, kwargs)
        # Without requires_grad the input does not depend on the pixels (Swin V2's position bias).
        if rectifier is None or not rectifier.input.requires_grad:
            return func(*args, **kwargs)
        if rectifier.clamp and rectifier.upper == 1:  # clamping pixels to [0, 1] is not a ReLU
            return func(*args, **kwargs)
        self.count += 1
        return _RewrittenRelu.apply(rectifier.input, rectifier, self.rule)


class rewrite_backward(function_mode):
    """Inside, ``rule`` replaces the backward pass of ReLU and ReLU6; no module is changed.

    The function calls themselves are intercepted, so it applies to modules, in-place, reused and functional
    ReLUs, tensor methods, clamps and thresholds at 0, the maximum with 0 and products with ``x > 0``, of any
    upper bound (``read_rectifier``). Yields the ``BackwardRewrite``. Unless ``required`` is false, raises
    ModelError at the end where no ReLU was called: the result would be the plain gradient under a wrong name.
    """

    def __init__(self, rule: BackwardRule, *, required: bool = True) -> None:
        self.rewrite, self.required = BackwardRewrite(rule), required
        super().__init__(self.rewrite)

    def __enter__(self) -> BackwardRewrite:
        super().__enter__()
        return self.rewrite

    def __exit__(self, *error: object) -> None:
        super().__exit__()
        if self.required and not any(error) and self.rewrite.count == 0:
            raise ModelError(
                f"the {getattr(self.rewrite.rule, '__name__', 'backward')} rule found no ReLU in this model "
                "(GELU and SiLU networks have none), so its result would be the plain gradient; "
                "use saliency, or lrp, which has rules for GELU, SiLU and attention"
            )
