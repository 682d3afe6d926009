"""What a method declares: inputs, parameters, references, cost and invariants."""

from .cost import Cost
from .expressions import SIZES, Condition, Expression, ceil, either, length, maximum, minimum, param, size
from .invariants import Invariant, MapPerPixel, Nonnegative, PixelRange, SameShape, UnitRange, WithinBall
from .parameter_group import ParameterGroup
from .spec import Input, MethodSpec, Need, Reference, Role

__all__ = [
    "Condition",
    "Cost",
    "Expression",
    "Input",
    "Invariant",
    "MapPerPixel",
    "MethodSpec",
    "Need",
    "Nonnegative",
    "ParameterGroup",
    "PixelRange",
    "Reference",
    "Role",
    "SIZES",
    "SameShape",
    "UnitRange",
    "WithinBall",
    "ceil",
    "either",
    "length",
    "maximum",
    "minimum",
    "param",
    "size",
]
