"""Exceptions: each message says what was wrong, what is allowed and the nearest valid value.

PhospheneError
├── InputError (ValueError)
├── ModelError
├── DivergenceError
├── PluginError
├── MissingExtra (ImportError)
└── UnknownName (KeyError)
PhospheneDeprecationWarning (DeprecationWarning)
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class _ShortRepr(reprlib.Repr):
    """``repr`` for error messages: arrays and tensors by type and shape, long containers shortened."""

    def __init__(self) -> None:
        super().__init__()
        self.maxtuple = self.maxlist = self.maxdict = self.maxset = self.maxfrozenset = self.maxdeque = 20
        self.maxstring = self.maxother = self.maxlong = 200

    def repr_instance(self, x: object, level: int) -> str:
        shape = getattr(x, "shape", None)
        if hasattr(x, "dtype") and isinstance(shape, tuple) and shape:
            return f"<{type(x).__name__} of shape {tuple(shape)}>"
        return " ".join(super().repr_instance(x, level).split())


_short = _ShortRepr()


def type_name(value: object) -> str:
    """A value's type in an error message, with its article: "a str", "an int"."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"


def value_repr(value: object, most: int = 80) -> str:
    """A value in an error message: its ``repr`` in at most ``most`` characters.

    Of arrays and tensors, also inside a container, only type and shape: "<Tensor of shape (2, 3, 64, 64)>".
    """
    text = _short.repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


class PhospheneError(Exception):
    """Base class of Phosphene's errors; the message is one or two sentences for the user."""


class InputError(PhospheneError, ValueError):
    """An invalid input or parameter."""


class ModelError(PhospheneError):
    """A model that lacks what a method needs: a GAP head, a ReLU, gradients, ..."""


class DivergenceError(PhospheneError):
    """An optimization that reached NaN or infinity, or cannot start."""


class PluginError(PhospheneError):
    """A plugin that cannot be loaded, or that violates the rules of registration."""


class MissingExtra(PhospheneError, ImportError):
    """An optional library is not installed; the message names the extra that installs it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(what, extra)  # pickle rebuilds the exception from these arguments

    def __str__(self) -> str:
        what, extra = self.args
        return f"{what} needs an optional library: pip install 'phosphene[{extra}]'"


class PhospheneDeprecationWarning(DeprecationWarning):
    """A public name or parameter that a later version removes; the message names its replacement."""


class UnknownName(PhospheneError, KeyError):
    """An unknown name of a method, layer, class, scheme, ...

    The message lists the existing names and the nearest match:
    ``no layer 'layer5'; this model has conv1, ... - did you mean 'layer4'?``
    ``advice`` says what else may be done, in a sentence of its own.
    """

    def __init__(
        self, kind: str, name: object, known: Iterable[str], owner: str = "", advice: str = ""
    ) -> None:
        text = name if isinstance(name, str) else value_repr(name)
        super().__init__(kind, text, tuple(known), owner, advice)

    def __str__(self) -> str:
        kind, name, names, owner, advice = self.args
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        close = close or [n for n in names if name and name.lower() in n.lower()][:3]
        listed = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
        message = f"no {kind} {name!r}"
        message += f"; {owner or 'there'} {'has' if owner else 'is'} {listed}" if names else ""
        message += f" - did you mean {' or '.join(map(repr, close))}?" if close else ""
        return f"{message}{' ' if close else '; '}{advice}" if advice else message
