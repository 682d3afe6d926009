"""``Cost``: how many images pass forward and backward through the model."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .base import FrozenModel


class Cost(FrozenModel):
    """How many images go forward and backward through the model, as expressions.

    The names in an expression are the method's parameters and ``images`` (how many are given, or
    made), ``height``, ``width`` (pixels), ``dataset`` (its size, of two their sum), ``styles`` (how many),
    ``stages`` (the model's) and ``channels`` (of the layer that a parameter names, else of the last with
    places; where a parameter ``channels`` lists some, how many, and None where it is None); ``ceil``,
    ``len``, ``min`` and ``max`` are known, and ``a or b`` is b where a is None.
    """

    forward: str
    backward: str = "0"

    def evaluate(self, params: Mapping[str, Any], **sizes: Any) -> tuple[int, int]:
        """The two numbers for given parameters and sizes; a size hides a parameter of its name."""
        names = {**_FUNCTIONS, **params, **sizes}
        return (_evaluate(self.forward, names), _evaluate(self.backward, names))

    def names(self) -> set[str]:
        """The parameters it speaks of."""
        return self._all_names() - {*_FUNCTIONS, *_SIZES}

    def depends_on(self, size: str) -> bool:
        """Whether it depends on this size, which the model must be asked for: "channels" or "stages"."""
        return size in self._all_names()

    def _all_names(self) -> set[str]:
        nodes = ast.walk(ast.parse(f"({self.forward}), ({self.backward})"))
        return {node.id for node in nodes if isinstance(node, ast.Name)}


_SIZES = ("images", "height", "width", "dataset", "styles", "stages", "channels")


_FUNCTIONS: dict[str, Any] = {"ceil": math.ceil, "len": len, "min": min, "max": max}


_ARITHMETIC = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.BoolOp, ast.Or),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv),
)


def _evaluate(expression: str, names: dict[str, Any]) -> int:
    tree = ast.parse(expression, mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, _ARITHMETIC):
            raise InputError(f"cost expression {expression!r}: {ast.unparse(node)!r} is no arithmetic")
    try:
        return math.ceil(eval(compile(tree, "cost", "eval"), {"__builtins__": {}}, names))
    except (NameError, TypeError, ArithmeticError) as error:
        raise InputError(f"cost expression {expression!r}: {error}") from error
