"""What can go wrong, said to a person: what was wrong, what is allowed, the nearest right thing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PhospheneError(Exception):
    """Any error Phosphene raises on purpose; its message is one sentence or two."""


class InputError(PhospheneError, ValueError):
    """An input or a parameter that a method cannot work with."""


class ModelError(PhospheneError):
    """A model that lacks what a method needs (a GAP head, a ReLU, weights, ...)."""


class DivergenceError(PhospheneError):
    """An optimisation that went to NaN or infinity, or cannot start."""


class PluginError(PhospheneError):
    """A plugin that cannot be loaded or breaks the rules of registration."""


class MissingExtra(PhospheneError, ImportError):
    """What needs a library that is not installed; the message says which extra brings it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(what, extra)  # as given, so that it can be pickled

    def __str__(self) -> str:
        what, extra = self.args
        return f"{what} needs an optional library: pip install 'phosphene[{extra}]'"


class PhospheneDeprecationWarning(DeprecationWarning):
    """A public name or parameter that a later version drops; the message says what to use instead."""


class UnknownName(PhospheneError, KeyError):
    """A name nothing answers to: a method, layer, class, scheme, ...

    The message lists what exists and the nearest match:
    ``no layer 'layer5'; this model has conv1, ... - did you mean 'layer4'?``
    """

    def __init__(self, kind: str, name: object, known: Iterable[str], owner: str = "") -> None:
        super().__init__(kind, str(name), tuple(known), owner)

    def __str__(self) -> str:
        kind, name, names, owner = self.args
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        close = close or [n for n in names if name and name.lower() in n.lower()][:3]
        shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
        message = f"no {kind} {name!r}"
        message += f"; {owner or 'there'} {'has' if owner else 'is'} {shown}" if names else ""
        return message + (f" - did you mean {' or '.join(map(repr, close))}?" if close else "")
