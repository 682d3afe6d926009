"""``module:`` - a network of the user's own code: ``module:my_package.networks:build``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from phosphene import InputError, ModelError, PhospheneError, UnknownName, hookimpl

if TYPE_CHECKING:
    from torch import nn


class ModuleLoader:
    """A function or class that returns a network, by its importable module and its name in it.

    It is called with the options, and with ``pretrained=True`` or ``weights=name`` where these are set, and
    returns a torch module, or a ``Model`` with its normalization and class names. The current folder is
    searched first. A saved result, a plan or a request may not name one: it is imported only where the user
    names it.
    """

    runs_user_code = True

    def load(
        self, name: str, *, weights: str | None, pretrained: bool, **options: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        from torch import nn  # imported here: help and lists do not need torch

        from phosphene import Model

        module_name, colon, attribute = name.partition(":")
        if not colon or not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
            raise InputError(
                f"module:{name} must name a module and a function in it that returns a network: "
                "module:my_package.networks:build"
            )
        if weights is not None:
            options["weights"] = weights
        if pretrained:
            options["pretrained"] = True
        with _current_folder_first():
            factory = _factory(module_name, attribute)
            network = _call(factory, name, options)
        if isinstance(network, Model):
            return network.module, network.settings | {"name": f"module:{name}"}
        if not isinstance(network, nn.Module):
            raise ModelError(
                f"{attribute} in {module_name} returned an object of type {type(network).__name__}, not a "
                "torch module or a Model"
            )
        return network, {"name": f"module:{name}"}

    def names(self) -> Sequence[str]:
        """Empty: the user's modules are not searched."""
        return []


def _factory(module_name: str, attribute: str) -> Any:
    """The function or class; a ModelError where the module cannot be imported names the cause."""
    package = module_name.partition(".")[0]
    if find_spec(package) is None:
        raise ModelError(
            f"there is no module {package!r} in the current folder or among the installed packages: install "
            "it, or run from the folder that contains it"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's code raises
        raise ModelError(f"{module_name} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UnknownName("function", attribute, names, module_name)
    factory = getattr(module, attribute)
    if not callable(factory):
        raise InputError(
            f"{attribute} in {module_name} is of type {type(factory).__name__}, and no function that returns "
            "a network"
        )
    return factory


def _call(factory: Any, name: str, options: dict[str, Any]) -> Any:
    """What the factory returns. A TypeError or ValueError is left to the caller, which names the options."""
    try:
        return factory(**options)
    except (PhospheneError, TypeError, ValueError):
        raise
    except Exception as error:  # whatever the user's code raises
        raise ModelError(f"module:{name} raised {type(error).__name__}: {error}") from error


@contextmanager
def _current_folder_first() -> Iterator[None]:
    """Search the current folder for modules, as ``python -m`` does."""
    sys.path.insert(0, folder := os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(folder)


@hookimpl
def phosphene_model_loaders():
    return {"module": ModuleLoader()}
