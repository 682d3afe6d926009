"""Plugins from entry points, each loaded in isolation."""

from __future__ import annotations

import ast
import functools
import os
import re
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.abc import InspectLoader
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, distributions, entry_points
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
        return self.outline.summary

    def arguments(self) -> list[str]:
        """Names of the method's inputs and parameters, read from the source without importing it."""
        return self.outline.arguments

    @cached_property
    def outline(self) -> Outline:
        """Title, summary and arguments, read from the source without importing it."""
        tree = self._tree()
        functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
        function = functions.get(self.short_name)
        text = (ast.get_docstring(function) if function else None) or ast.get_docstring(tree)
        return Outline(
            title=(function and _declared_title(function)) or default_title(self.short_name),
            summary=(text or "").strip().partition("\n")[0],
            arguments=[a.arg for a in (*function.args.args, *function.args.kwonlyargs)] if function else [],
        )

    def _tree(self) -> ast.Module:
        """The module's syntax tree; empty where there is no source."""
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
        with suppress(SyntaxError):  # `phosphene plugins` reports it
            return ast.parse(source or "")
        return ast.Module([], [])


@dataclass(frozen=True)
class Outline:
    """A method's title, summary and names of its arguments, as its source states them."""

    title: str
    summary: str
    arguments: list[str]


def default_title(short_name: str) -> str:
    """The title of a method that declares none."""
    return short_name.replace("_", " ").capitalize()


def _declared_title(function: ast.FunctionDef) -> str | None:
    """The ``title`` in the arguments of ``@method``, if it is a constant."""
    calls = (decorator for decorator in function.decorator_list if isinstance(decorator, ast.Call))
    values = [k.value for call in calls for k in call.keywords if k.arg == "title"]
    return next((v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)), None)


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
    labels: dict[int, tuple[str, str]] = {}  # each distribution's name and version, parsed only once
    plugins = []
    for entry in entry_points(group=group):
        if entry.dist is None:
            continue
        if id(entry.dist) not in labels:
            labels[id(entry.dist)] = entry.dist.name, entry.dist.version
        plugins.append(Plugin(entry.name, *labels[id(entry.dist)], entry))
    plugins.sort(key=attrgetter("id", "distribution"))
    first = [p for p in plugins if p.distribution == FIRST_PARTY]
    others = [p for p in plugins if p.distribution != FIRST_PARTY]
    return [p for p in (*first, *others) if allowed is None or p.distribution in names]


def shadowed_distributions() -> list[tuple[str, str]]:
    """Copies of a distribution with plugins that an earlier folder on ``sys.path`` hides.

    Each with the folder of the copy that is used: (hidden, used).
    """
    used: dict[str, str] = {}
    hidden = []
    for distribution in distributions():
        if not any(e.group.startswith("phosphene.") for e in distribution.entry_points):
            continue
        label = f"{distribution.name} {distribution.version} in {distribution.locate_file('')}"
        name = re.sub(r"[-_.]+", "-", distribution.name).lower()
        if used.setdefault(name, label) != label:
            hidden.append((label, used[name]))
    return hidden


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
        module = _timed_import(plugin)
        manager = plugin_manager(module)
        return _method_of(manager, plugin) if plugin.entry_point.group == METHODS_GROUP else module
    except KeyboardInterrupt:  # also of SIGTERM, which is a SystemExit
        raise
    except (Exception, SystemExit) as error:  # whatever the module raises becomes the reason
        reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        return BrokenPlugin(plugin, reason, traceback.format_exc())


@dataclass(frozen=True)
class ImportCost:
    """The CPU seconds that importing a plugin's module took, and the modules before and after it."""

    seconds: float
    package: str
    before: frozenset[str]
    after: frozenset[str]

    @property
    def libraries(self) -> tuple[str, ...]:
        """The libraries that were imported with it."""
        packages = {name.partition(".")[0] for name in self.after - self.before}
        packages -= {name.partition(".")[0] for name in self.before} | {self.package}
        return tuple(sorted(p for p in packages - sys.stdlib_module_names if not p.startswith("_")))


#: What importing each plugin's module cost in this process; a library counts for the first that imports it.
import_costs: dict[Plugin, ImportCost] = {}


def _timed_import(plugin: Plugin) -> Any:
    before, start = frozenset(sys.modules), time.process_time()
    try:
        return plugin.entry_point.load()
    finally:
        seconds, package = time.process_time() - start, plugin.entry_point.module.partition(".")[0]
        import_costs[plugin] = ImportCost(seconds, package, before, frozenset(sys.modules))


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
