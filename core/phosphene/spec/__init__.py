"""What a method declares: inputs, parameters, references, cost and invariants."""

from .cost import Cost
from .invariants import Invariant, MapPerPixel, Nonnegative, PixelRange, SameShape, UnitRange, WithinBall
from .spec import Input, MethodSpec, Need, Reference, Role

__all__ = [
    "Cost",
    "Input",
    "Invariant",
    "MapPerPixel",
    "MethodSpec",
    "Need",
    "Nonnegative",
    "PixelRange",
    "Reference",
    "Role",
    "SameShape",
    "UnitRange",
    "WithinBall",
]
