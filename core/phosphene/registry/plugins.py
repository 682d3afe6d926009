"""Plugins from entry points, each loaded in isolation."""

from __future__ import annotations

import ast
import functools
import os
import re
import traceback
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.abc import InspectLoader
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from operator import attrgetter
from typing import Any

import pluggy

from ..errors import PluginError
from . import hookspecs
from .hookspecs import API_VERSION, METHODS_GROUP

FIRST_PARTY = "phosphene"


@dataclass(frozen=True)
class Plugin:
    """One entry point: its name, its distribution, and the module that it loads."""

    id: str
    distribution: str
    version: str
    entry_point: EntryPoint

    @property
    def qualified(self) -> str:
        """``distribution:id``, which no other plugin has."""
        return f"{self.distribution}:{self.id}"

    @property
    def short_name(self) -> str:
        """The id without its family."""
        return self.id.rpartition(".")[2]

    @property
    def family(self) -> str:
        """The id's first part."""
        return self.id.partition(".")[0]

    def summary(self) -> str:
        """The first line of the method's docstring, read from the source without importing it."""
        tree, function = self._source
        text = (ast.get_docstring(function) if function else None) or ast.get_docstring(tree)
        return (text or "").strip().partition("\n")[0]

    def arguments(self) -> list[str]:
        """Names of the method's inputs and parameters, read from the source without importing it."""
        _, function = self._source
        return [a.arg for a in (*function.args.args, *function.args.kwonlyargs)] if function else []

    @cached_property
    def _source(self) -> tuple[ast.Module, ast.FunctionDef | None]:
        """The module's syntax tree (empty where there is no source) and the method's function in it."""
        path: list[str] | None = None
        spec, name = None, ""
        for part in self.entry_point.module.split("."):  # not importlib's, which would run the parents
            name = f"{name}.{part}" if name else part
            try:
                spec = PathFinder.find_spec(name, path)
                path = list((spec.submodule_search_locations if spec else None) or [])
            except KeyError:  # a folder without __init__.py looks up its parents, which are not imported
                spec, path = None, [os.path.join(folder, part) for folder in path or ()]
        source = spec.loader.get_source(name) if spec and isinstance(spec.loader, InspectLoader) else None
        tree = ast.Module([], [])
        with suppress(SyntaxError):  # `phosphene plugins` reports it
            tree = ast.parse(source or "")
        functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
        return tree, functions.get(self.short_name)


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that could not be loaded: the reason in a sentence, and the traceback."""

    plugin: Plugin
    reason: str
    traceback: str


def list_plugins(group: str) -> list[Plugin]:
    """Every plugin of an entry-point group, first-party ones first; none is loaded."""
    allowed = os.environ.get("PHOSPHENE_PLUGINS")
    names = {FIRST_PARTY, *map(str.strip, (allowed or "").split(","))}
    plugins = [Plugin(p.name, p.dist.name, p.dist.version, p) for p in entry_points(group=group) if p.dist]
    plugins.sort(key=attrgetter("id", "distribution"))
    first = [p for p in plugins if p.distribution == FIRST_PARTY]
    others = [p for p in plugins if p.distribution != FIRST_PARTY]
    return [p for p in (*first, *others) if allowed is None or p.distribution in names]


def incompatible_plugins() -> list[Plugin]:
    """Plugins written for another major version of the interface, which are never loaded."""
    pattern = rf"phosphene\.(methods|extensions)\.v(?!{API_VERSION}$)\d+"
    groups = [group for group in sorted(entry_points().groups) if re.fullmatch(pattern, group)]
    return [plugin for group in groups for plugin in list_plugins(group)]


@functools.cache
def load_plugin(plugin: Plugin) -> Any:
    """A plugin's ``Method``, an extension's module, or a ``BrokenPlugin`` with the reason.

    Each is loaded in a plugin manager of its own: pluggy's loader of entry points stops at the first broken
    one and drops clashing names without a warning.
    """
    try:
        module = plugin.entry_point.load()
        manager = plugin_manager(module)
        return _method_of(manager, plugin) if plugin.entry_point.group == METHODS_GROUP else module
    except (Exception, SystemExit) as error:  # whatever the module raises becomes the reason
        reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        return BrokenPlugin(plugin, reason, traceback.format_exc())


def plugin_manager(*modules: Any) -> pluggy.PluginManager:
    """The hooks of these modules. Raises PluginValidationError for a misspelt hook."""
    manager = pluggy.PluginManager("phosphene")
    manager.add_hookspecs(hookspecs)
    for module in modules:
        manager.register(module)
    manager.check_pending()
    return manager


def _method_of(manager: pluggy.PluginManager, plugin: Plugin) -> Any:
    methods = {method.spec.name: method for group in manager.hook.phosphene_methods() for method in group}
    if not methods:
        raise PluginError(f"{plugin.entry_point.value} has no hook phosphene_methods (is @hookimpl missing?)")
    if plugin.id not in methods:
        raise PluginError(
            f"the entry point is called {plugin.id!r}, but its module has the methods {', '.join(methods)}"
        )
    methods[plugin.id].distribution = f"{plugin.distribution} {plugin.version}"
    return methods[plugin.id]
