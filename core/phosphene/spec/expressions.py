"""Expressions over a method's parameters and a call's sizes, which evaluate and print themselves.

``size.images * (param.steps + 2)`` is a tree of additions and multiplications. It prints as
``images * (steps + 2)`` and evaluates to a number for the parameters and sizes of a call.
"""

from __future__ import annotations

import math
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .base import FrozenModel

#: What a cost may depend on beside the method's parameters; see ``Cost``.
SIZES = (
    *("images", "height", "width", "dataset", "styles", "frames", "checkpoints"),
    *("stages", "channels", "attention_layers", "attention_heads"),
)
#: Those that are lengths of inputs, 0 without the input: dataset, styles, frames and checkpoints.
LENGTHS = SIZES[3:7]
_OPERATORS: dict[str, tuple[int, Callable[[Any, Any], Any]]] = {
    "or": (0, lambda a, b: b if a is None else a),
    "+": (1, operator.add),
    "-": (1, operator.sub),
    "*": (2, operator.mul),
    "/": (2, operator.truediv),
    "//": (2, operator.floordiv),
}


#: The largest number in an expression, and how deep expressions nest.
_LARGEST, _MOST_NESTED = 2**63, 200


def _length(items: Any, default: Any = None) -> Any:
    return len(items) if items is not None or default is None else default


_FUNCTIONS: dict[str, Callable[..., Any]] = {"ceil": math.ceil, "len": _length, "min": min, "max": max}


class Expression(ABC):
    """An arithmetic expression: combine with ``+ - * / //`` and numbers; equal where it prints the same."""

    #: How tightly it binds: an operand of a lower precedence is printed in parentheses.
    precedence: int = 3
    #: How many expressions are nested in it.
    _depth: int = 1

    @abstractmethod
    def evaluate(self, params: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
        """The value for these parameters and sizes. Raises InputError where one is missing."""

    @abstractmethod
    def names(self) -> set[str]:
        """Names of the parameters that it depends on."""

    @abstractmethod
    def sizes(self) -> set[str]:
        """Names of the sizes that it depends on."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __add__(self, other: Operand) -> Expression:
        return Operation("+", self, expression(other))

    def __radd__(self, other: Operand) -> Expression:
        return Operation("+", expression(other), self)

    def __sub__(self, other: Operand) -> Expression:
        return Operation("-", self, expression(other))

    def __rsub__(self, other: Operand) -> Expression:
        return Operation("-", expression(other), self)

    def __mul__(self, other: Operand) -> Expression:
        return Operation("*", self, expression(other))

    def __rmul__(self, other: Operand) -> Expression:
        return Operation("*", expression(other), self)

    def __truediv__(self, other: Operand) -> Expression:
        return Operation("/", self, expression(other))

    def __rtruediv__(self, other: Operand) -> Expression:
        return Operation("/", expression(other), self)

    def __floordiv__(self, other: Operand) -> Expression:
        return Operation("//", self, expression(other))

    def __rfloordiv__(self, other: Operand) -> Expression:
        return Operation("//", expression(other), self)


#: Operand of an arithmetic operation on expressions.
Operand = Expression | int | float


@dataclass(frozen=True, eq=False)
class Constant(Expression):
    """A number."""

    value: float

    def evaluate(self, params: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
        return self.value

    def names(self) -> set[str]:
        return set()

    def sizes(self) -> set[str]:
        return set()

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, eq=False)
class Parameter(Expression):
    """The value of one of the method's parameters."""

    name: str

    def evaluate(self, params: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
        if self.name not in params:
            raise InputError(f"the parameter {self.name!r} is needed to evaluate a cost")
        return params[self.name]

    def names(self) -> set[str]:
        return {self.name}

    def sizes(self) -> set[str]:
        return set()

    def is_true(self) -> Condition:
        """The condition that this parameter is true, or anything but None, 0 or empty."""
        return Condition(parameter=self.name)

    def one_of(self, *values: str) -> Condition:
        """The condition that this parameter is one of these values."""
        return Condition(parameter=self.name, values=values)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Size(Expression):
    """One of ``SIZES``: how many images, how large, how many channels."""

    name: str

    def evaluate(self, params: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
        if self.name not in sizes:
            raise InputError(f"the size {self.name!r} is needed to evaluate a cost")
        return sizes[self.name]

    def names(self) -> set[str]:
        return set()

    def sizes(self) -> set[str]:
        return {self.name}

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Operation(Expression):
    """Two operands and the operator between them."""

    symbol: str
    left: Expression
    right: Expression

    def __post_init__(self) -> None:
        object.__setattr__(self, "precedence", _OPERATORS[self.symbol][0])
        object.__setattr__(self, "_depth", _nesting([self.left, self.right]))

    def evaluate(self, params: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
        left, right = self.left.evaluate(params, sizes), self.right.evaluate(params, sizes)
        if self.symbol != "or":
            for value in (left, right):  # text and lists could be repeated until the memory is full
                if not isinstance(value, (int, float)):
                    raise TypeError(f"{self.symbol} needs numbers, not {value!r:.40}")
        return _OPERATORS[self.symbol][1](left, right)

    def names(self) -> set[str]:
        return self.left.names() | self.right.names()

    def sizes(self) -> set[str]:
        return self.left.sizes() | self.right.sizes()

    def __str__(self) -> str:
        left, right = str(self.left), str(self.right)
        if self.left.precedence < self.precedence:
            left = f"({left})"
        # a - (b - c) and a / (b * c) need their parentheses, a + (b + c) does not.
        associative = self.symbol in ("+", "*", "or") and getattr(self.right, "symbol", None) == self.symbol
        if self.right.precedence < self.precedence + (0 if associative else 1):
            right = f"({right})"
        return f"{left} {self.symbol} {right}"


@dataclass(frozen=True, eq=False)
class Call(Expression):
    """A function of expressions: ceil, len, min or max."""

    function: str
    arguments: tuple[Expression, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_depth", _nesting(self.arguments))

    def evaluate(self, params: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
        return _FUNCTIONS[self.function](*(a.evaluate(params, sizes) for a in self.arguments))

    def names(self) -> set[str]:
        return set().union(*(a.names() for a in self.arguments))

    def sizes(self) -> set[str]:
        return set().union(*(a.sizes() for a in self.arguments))

    def __str__(self) -> str:
        return f"{self.function}({', '.join(map(str, self.arguments))})"


@dataclass(frozen=True, eq=False)
class Printed(Expression):
    """An expression read from JSON: it prints and compares, but does not evaluate."""

    text: str

    def evaluate(self, params: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
        raise InputError(f"{self.text!r} is the printed form of a cost; ask the loaded method's spec instead")

    def names(self) -> set[str]:
        return set(re.findall(r"[a-z_]\w*", self.text)) - {*SIZES, *_FUNCTIONS, "or"}

    def sizes(self) -> set[str]:
        return set(re.findall(r"[a-z_]\w*", self.text)) & set(SIZES)

    def __str__(self) -> str:
        return self.text


def _nesting(parts: Sequence[Expression]) -> int:
    """The depth of an expression with these parts. Raises InputError for one that Python could not print."""
    depth = 1 + max([part._depth for part in parts], default=0)
    if depth > _MOST_NESTED:
        raise InputError(f"a cost can have at most {_MOST_NESTED} nested operations")
    return depth


def expression(value: Operand) -> Expression:
    """An expression as it is, a number as a constant."""
    if isinstance(value, Expression):
        return value
    if isinstance(value, (int, float)):
        if not abs(value) <= _LARGEST:
            raise InputError("a number in a cost must lie between -2**63 and 2**63")
        return Constant(value)
    raise TypeError(f"a cost is built from numbers, size.NAME and param.NAME, not from {value!r}")


def ceil(value: Operand) -> Expression:
    """The smallest integer that is not below the value."""
    return Call("ceil", (expression(value),))


def length(value: Expression, default: int | None = None) -> Expression:
    """How many items a parameter lists; ``default`` where it is None."""
    return Call("len", (value,) if default is None else (value, Constant(default)))


def minimum(*values: Operand) -> Expression:
    """The smallest of several values."""
    return Call("min", tuple(map(expression, values)))


def maximum(*values: Operand) -> Expression:
    """The largest of several values."""
    return Call("max", tuple(map(expression, values)))


def either(value: Operand, otherwise: Operand) -> Expression:
    """The first value, or the second where the first is None."""
    return Operation("or", expression(value), expression(otherwise))


class _Parameters:
    """``param.steps`` is the parameter ``steps`` of the method that declares the cost."""

    def __getattr__(self, name: str) -> Parameter:
        if name.startswith("__"):
            raise AttributeError(name)
        return Parameter(name)


class _Sizes:
    """``size.images`` is one of ``SIZES``."""

    def __getattr__(self, name: str) -> Size:
        if name not in SIZES:
            raise AttributeError(f"there is no size {name!r}; there are {', '.join(SIZES)}")
        return Size(name)


param = _Parameters()
size = _Sizes()


class Condition(FrozenModel):
    """Whether a parameter is true, or one of some values; ``~condition`` is its negation.

    Built as ``param.targeted.is_true()`` or ``param.norm.one_of("l1", "l2")``.
    """

    parameter: str
    values: tuple[str, ...] = ()
    negated: bool = False

    def holds(self, params: Mapping[str, Any]) -> bool:
        """Whether it is met under these parameters."""
        value = params[self.parameter]
        met = value in self.values if self.values else bool(value)
        return met is not self.negated

    def __invert__(self) -> Condition:
        return self.model_copy(update={"negated": not self.negated})

    def __str__(self) -> str:
        text = self.parameter + (f" in {{{', '.join(self.values)}}}" if self.values else "")
        return f"not {text}" if self.negated else text
