"""Loads the methods that a command's argument refers to: a method, a .py file or a distribution."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from phosphene import InputError, PluginError, UnknownName, methods, registry

if TYPE_CHECKING:
    from phosphene import Method


@contextmanager
def resolve_methods(argument: str) -> Iterator[list[Method[Any, Any]]]:
    """The methods that a method's name, the path of a .py file or a distribution's name refers to.

    A file's module and its neighbors are imported for the duration of this block only. Raises UnknownName for
    an unknown name, PluginError for a broken plugin, InputError for a file without methods.
    """
    if argument.endswith(".py"):
        with _import_file(Path(argument)) as module:
            yield _methods_of_module(module, argument)
    else:
        yield _registered_methods(argument)


def _registered_methods(name: str) -> list[Method[Any, Any]]:
    """The method of this name, or the methods of the distribution of this name."""
    by_distribution: dict[str, list[str]] = {}
    for plugin in methods.plugins.values():
        by_distribution.setdefault(_normalize(plugin.distribution), []).append(plugin.qualified)
    try:
        methods.resolve(name)
    except UnknownName:
        if _normalize(name) in by_distribution:
            return [methods[qualified] for qualified in by_distribution[_normalize(name)]]
        if Path(name).is_dir():
            raise InputError(f"{name} is a folder: name the .py file in it that holds the method") from None
        names = (name for plugins in methods.by_family().values() for name in plugins)
        raise UnknownName("method or distribution", name, [*names, *by_distribution]) from None
    return [methods[name]]


def _normalize(distribution: str) -> str:
    """A distribution's name in normalized form (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _methods_of_module(module: ModuleType, file: str) -> list[Method[Any, Any]]:
    """The methods of a module's hook, called as the registry calls it."""
    manager = pluggy.PluginManager("phosphene")
    manager.add_hookspecs(registry)
    manager.register(module)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{file}: {error}") from error
    module_methods = [method for methods in manager.hook.phosphene_methods() for method in methods]
    if not module_methods:
        raise InputError(
            f"{file} has no hook phosphene_methods that returns a method (is @hookimpl missing?)"
        )
    return module_methods


@contextmanager
def _import_file(file: Path) -> Iterator[ModuleType]:
    """Import a file under the name that it has when installed; unload it afterwards if it is not."""
    if not file.is_file():
        raise InputError(f"there is no file {file}")
    folder, parts = file.resolve().parent, [] if file.stem == "__init__" else [file.stem]
    while (folder / "__init__.py").is_file():
        folder, parts = folder.parent, [folder.name, *parts]
    name = ".".join(parts)
    if not all(part.isidentifier() for part in parts):
        allowed = "letters, digits and underscores, the first a letter"
        raise InputError(f"{file} cannot be imported as {name!r}: a module's name is {allowed}")
    path, modules = list(sys.path), set(sys.modules)
    if _is_importable(name, file):
        yield _import_module(name, file)
        return
    # The file may import its neighbors. Its folder comes last, so that none of them shadows a library.
    sys.path.append(str(folder))
    importlib.invalidate_caches()
    try:
        yield _import_module(name, file)
    finally:
        sys.path[:] = path
        for added in sys.modules.keys() - modules:
            origin = getattr(sys.modules[added], "__file__", None)
            if origin and Path(origin).is_relative_to(folder):
                del sys.modules[added]


def _is_importable(name: str, file: Path) -> bool:
    """Whether this name imports this file. Raises InputError if it imports another."""
    try:
        spec = find_spec(name)
        other = spec is not None and not (spec.origin and os.path.samefile(spec.origin, file))
    except ModuleNotFoundError:  # a parent package does not exist
        return False
    except (ValueError, OSError):  # __main__, or a module without a file
        other = True
    if other:
        raise InputError(f"{file}: there is another module {name!r} already; rename the file")
    return spec is not None


def _import_module(name: str, file: Path) -> ModuleType:
    """Import a module; any error becomes an InputError that names the file."""
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the file may raise anything; the message is reported
        raise InputError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
