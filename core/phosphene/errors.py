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
    """A method whose optional library is absent; the message says which extra to install."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional library: pip install 'phosphene[{extra}]'.")


class UnknownName(PhospheneError, KeyError):
    """A name nothing answers to: a method, layer, class, scheme, ...

    The message lists what exists and the nearest match:
    ``no layer 'layer5'; this model has conv1, ... - did you mean 'layer4'?``
    """

    def __init__(self, kind: str, name: object, known: Iterable[str], owner: str = "") -> None:
        names = [str(k) for k in known]
        close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
        if not close:
            close = [n for n in names if str(name).lower() in n.lower()][:3]
        shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
        message = f"no {kind} {str(name)!r}"
        message += f"; {owner or 'there'} {'has' if owner else 'is'} {shown}" if names else ""
        if close:
            message += " - did you mean " + " or ".join(repr(c) for c in close) + "?"
        self.message = message
        super().__init__(message)

    def __str__(self) -> str:  # KeyError would show the repr
        return self.message
