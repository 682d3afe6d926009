"""``Cost``: how many images pass forward and backward through the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from ..errors import InputError
from .base import FrozenModel
from .expressions import Constant, Expression, Printed, expression


def _read(value: Any) -> Expression:
    return Printed(value) if isinstance(value, str) else expression(value)


_Count = Annotated[Expression, BeforeValidator(_read), PlainSerializer(str, return_type=str)]


class Cost(FrozenModel):
    """How many images pass forward and backward through the model, as expressions.

    An expression is built from numbers, the method's parameters (``param.steps``) and the sizes of a call:
    ``size.images`` (how many are passed in, or synthesized), ``size.height`` and ``size.width`` (pixels),
    ``size.dataset`` (its length, of two their sum), ``size.styles`` (how many style images), ``size.frames``
    (of a video), ``size.checkpoints`` (how many, 0 without any), ``size.stages`` (the model's stages, to be
    counted with ``length``) and ``size.channels`` (of the layer that a parameter names, of several the most,
    else of the last feature map, or of the stages where a parameter is called ``layers``; where a parameter
    ``channels`` lists some, how many, and None where it is None),
    ``size.attention_layers`` and ``size.attention_heads`` (how many the model has). Beside ``+ - * / //``
    there are ``ceil``, ``length``, ``minimum``, ``maximum`` and ``either(a, b)``, which is b where a is
    None::

        Cost(forward=size.images * (param.steps + 2), backward=size.images * param.steps)
    """

    forward: _Count = Constant(0)
    backward: _Count = Constant(0)

    def evaluate(self, params: Mapping[str, Any], **sizes: Any) -> tuple[int, int]:
        """Forward and backward passes for these parameters and sizes. Raises InputError if one is missing."""
        try:
            forward, backward = (math.ceil(e.evaluate(params, sizes)) for e in (self.forward, self.backward))
        except (TypeError, ValueError, ArithmeticError) as error:
            raise InputError(
                f"the cost {self.forward}, {self.backward} cannot be evaluated: {error}"
            ) from error
        return forward, backward

    def names(self) -> set[str]:
        """Names of the parameters that it depends on."""
        return self.forward.names() | self.backward.names()

    def depends_on(self, *sizes: str) -> bool:
        """Whether it depends on one of these sizes, such as "channels"."""
        return not self._sizes.isdisjoint(sizes)

    @cached_property
    def _sizes(self) -> set[str]:
        return self.forward.sizes() | self.backward.sizes()
