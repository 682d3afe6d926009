"""Plugins found from entry points, each loaded in isolation."""

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
from typing import TYPE_CHECKING, Any

import pluggy

from ..errors import PluginError
from . import hookspecs
from .hookspecs import API_VERSION, METHODS_GROUP

if TYPE_CHECKING:
    from .method import Method


FIRST_PARTY = "phosphene"


@dataclass(frozen=True)
class Plugin:
    """One entry point: what it is called, who brings it, and the module that holds it."""

    id: str
    distribution: str
    version: str
    entry_point: EntryPoint

    @property
    def qualified(self) -> str:
        """``distribution:id``, which always means this one."""
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
        """Names of the method's inputs and parameters, likewise read from the source."""
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
            except KeyError:  # a folder without __init__.py asks for its parents, which did not run
                spec, path = None, [os.path.join(place, part) for place in path or ()]
        source = spec.loader.get_source(name) if spec and isinstance(spec.loader, InspectLoader) else None
        tree = ast.Module([], [])
        with suppress(SyntaxError):  # `phosphene plugins` tells of it
            tree = ast.parse(source or "")
        functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
        return tree, functions.get(self.short_name)


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that could not be used: why, in a sentence, and the traceback."""

    plugin: Plugin
    reason: str
    traceback: str


def list_plugins(group: str) -> list[Plugin]:
    """Every plugin of an entry-point group, first-party ones first; none is loaded."""
    allowed = os.environ.get("PHOSPHENE_PLUGINS")
    names = {FIRST_PARTY, *map(str.strip, (allowed or "").split(","))}
    found = [Plugin(p.name, p.dist.name, p.dist.version, p) for p in entry_points(group=group) if p.dist]
    found.sort(key=lambda p: (p.distribution != FIRST_PARTY, p.id, p.distribution))
    return [p for p in found if allowed is None or p.distribution in names]


def incompatible_plugins() -> list[Plugin]:
    """Plugins written for another major version of the interface, which are left alone."""
    pattern = rf"phosphene\.(methods|extensions)\.v(?!{API_VERSION}$)\d+"
    groups = [group for group in sorted(entry_points().groups) if re.fullmatch(pattern, group)]
    return [plugin for group in groups for plugin in list_plugins(group)]


@functools.cache
def load_plugin(plugin: Plugin) -> Any:
    """What a plugin brings: a ``Method``, an extension's module, or a ``BrokenPlugin`` with the reason.

    Each in a manager of its own: pluggy's loader of entry points stops at the first broken one and
    drops clashing names in silence.
    """
    try:
        module = plugin.entry_point.load()
        manager = plugin_manager(module)
        return _method_of(manager, plugin) if plugin.entry_point.group == METHODS_GROUP else module
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises: it is told, not lost
        reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        return BrokenPlugin(plugin, reason, traceback.format_exc())


def plugin_manager(*modules: Any) -> pluggy.PluginManager:
    """The hooks of these modules; a misspelt one raises."""
    manager = pluggy.PluginManager("phosphene")
    manager.add_hookspecs(hookspecs)
    for module in modules:
        manager.register(module)
    manager.check_pending()
    return manager


def _method_of(manager: pluggy.PluginManager, plugin: Plugin) -> Method[..., Any]:
    found = {m.spec.name: m for methods in manager.hook.phosphene_methods() for m in methods}
    if not found:
        raise PluginError(f"{plugin.entry_point.value} has no hook phosphene_methods (is @hookimpl there?)")
    if plugin.id not in found:
        raise PluginError(f"the entry point is called {plugin.id!r}, but its module holds {', '.join(found)}")
    found[plugin.id].distribution = f"{plugin.distribution} {plugin.version}"
    return found[plugin.id]
