"""Which methods a word means: a method's name, a .py file's, a distribution's."""

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

from phosphene import InputError, PluginError, UnknownName, methods
from phosphene.registry import hookspecs

if TYPE_CHECKING:
    from phosphene import Method


@contextmanager
def methods_of(what: str) -> Iterator[list[Method[Any, Any]]]:
    """The methods that a name, a .py file or a distribution's name means, each ready to be called.

    A file's modules are there inside this block only. Raises UnknownName for what nothing answers to,
    PluginError for a plugin that is broken, InputError for a file without methods.
    """
    if what.endswith(".py"):
        with _imported(Path(what)) as module:
            yield _offered(module, what)
    else:
        yield _registered(what)


def _registered(name: str) -> list[Method[Any, Any]]:
    brought: dict[str, list[str]] = {}
    for plugin in methods.plugins.values():
        brought.setdefault(_normal(plugin.distribution), []).append(plugin.qualified)
    try:
        methods.resolve(name)
    except UnknownName:
        if _normal(name) in brought:
            return [methods[qualified] for qualified in brought[_normal(name)]]
        if Path(name).is_dir():
            raise InputError(f"{name} is a folder: name the .py file in it that holds the method") from None
        known = dict.fromkeys([*(p.short_name for p in methods.plugins.values()), *brought, *methods])
        raise UnknownName("method or distribution", name, known) from None
    return [methods[name]]


def _normal(distribution: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _offered(module: ModuleType, file: str) -> list[Method[Any, Any]]:
    """What the module's hook gives, asked as the registry would ask."""
    manager = pluggy.PluginManager("phosphene")
    manager.add_hookspecs(hookspecs)
    manager.register(module)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{file}: {error}") from error
    found = [method for methods in manager.hook.phosphene_methods() for method in methods]
    if not found:
        raise InputError(f"{file} has no hook phosphene_methods that gives a method (is @hookimpl there?)")
    return found


@contextmanager
def _imported(file: Path) -> Iterator[ModuleType]:
    """A file's module, under the name it would have if installed; a file that is not is gone afterwards."""
    if not file.is_file():
        raise InputError(f"there is no file {file}")
    folder, parts = file.resolve().parent, [] if file.stem == "__init__" else [file.stem]
    while (folder / "__init__.py").is_file():
        folder, parts = folder.parent, [folder.name, *parts]
    name = ".".join(parts)
    if not all(part.isidentifier() for part in parts):
        told = "letters, digits and underscores, first a letter"
        raise InputError(f"{file} cannot be imported as {name!r}: a module's name is {told}")
    path, modules = list(sys.path), set(sys.modules)
    if _is_found(name, file):
        yield _module(name, file)
        return
    # Last, so that nothing in the folder hides a library; found, since a file may lean on its neighbours.
    sys.path.append(str(folder))
    importlib.invalidate_caches()
    try:
        yield _module(name, file)
    finally:
        sys.path[:] = path
        for new in sys.modules.keys() - modules:
            origin = getattr(sys.modules[new], "__file__", None)
            if origin and Path(origin).is_relative_to(folder):
                del sys.modules[new]


def _is_found(name: str, file: Path) -> bool:
    """Whether importing this name gives this file; InputError where it gives another."""
    try:
        found = find_spec(name)
        other = found is not None and not (found.origin and os.path.samefile(found.origin, file))
    except ModuleNotFoundError:  # of a parent
        return False
    except (ValueError, OSError):  # __main__, or a module that is no file
        other = True
    if other:
        raise InputError(f"{file}: there is another module {name!r} already; give the file another name")
    return found is not None


def _module(name: str, file: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever an author's file raises: it is told, not lost
        raise InputError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
