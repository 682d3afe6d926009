"""What a method declares: inputs, parameters, references, cost, invariants and relations."""

from .cost import Cost
from .expressions import SIZES, Condition, Expression, ceil, either, length, maximum, minimum, param, size
from .invariants import Invariant, MapPerPixel, Nonnegative, PixelRange, SameShape, UnitRange, WithinBall
from .parameter_group import ParameterGroup
from .relations import (
    Agrees,
    Calls,
    Complete,
    Converges,
    Equivariant,
    InvariantTo,
    LinearIn,
    Localizes,
    Monotone,
    Relation,
    ScalesWith,
    ZeroWhen,
    assert_equal,
)
from .spec import Input, MethodSpec, Need, Reference, Role

__all__ = [
    "Agrees",
    "Calls",
    "Complete",
    "Condition",
    "Converges",
    "Cost",
    "Equivariant",
    "Expression",
    "Input",
    "Invariant",
    "InvariantTo",
    "LinearIn",
    "Localizes",
    "MapPerPixel",
    "MethodSpec",
    "Monotone",
    "Need",
    "Nonnegative",
    "ParameterGroup",
    "PixelRange",
    "Reference",
    "Relation",
    "Role",
    "SIZES",
    "SameShape",
    "ScalesWith",
    "UnitRange",
    "WithinBall",
    "ZeroWhen",
    "assert_equal",
    "ceil",
    "either",
    "length",
    "maximum",
    "minimum",
    "param",
    "size",
]
