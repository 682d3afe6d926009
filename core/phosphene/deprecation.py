"""Deprecated public names: for one minor version they still work, with a warning."""

from __future__ import annotations

import functools
import pkgutil
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from .errors import PhospheneDeprecationWarning

P = ParamSpec("P")
R = TypeVar("R")


def moved(module: str, names: Mapping[str, str], otherwise: Callable[[str], Any]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` for names that have moved: ``{"old": "phosphene.home.new"}``."""

    def get(name: str) -> Any:
        if name not in names:
            return otherwise(name)
        _warn(f"{module}.{name}", names[name])
        return pkgutil.resolve_name(names[name])

    return get


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a function whose parameters were renamed: ``@renamed(old="new")``."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> R:
            old = [name for name in names if name in kwargs]
            for name in old:
                _warn(f"{function.__name__}({name}=...)", f"{names[name]}=")
            return function(*args, **{names[name]: kwargs.pop(name) for name in old}, **kwargs)

        return call

    return decorate


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is deprecated: use {new}", PhospheneDeprecationWarning, stacklevel=3)
