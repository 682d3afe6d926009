"""``methods``: every technique by name, known from metadata, loaded one by one, none able to hurt another."""

from __future__ import annotations

import ast
import functools
import os
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.abc import InspectLoader
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from . import hookspecs
from .errors import PluginError, UnknownName
from .families import rank
from .hookspecs import API_VERSION, EXTENSIONS_GROUP, METHODS_GROUP

if TYPE_CHECKING:
    from .declaration import Method

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


def _plugins(group: str) -> list[Plugin]:
    """Every plugin of an entry-point group, first-party ones first; none is loaded."""
    allowed = os.environ.get("PHOSPHENE_PLUGINS")
    names = {FIRST_PARTY, *map(str.strip, (allowed or "").split(","))}
    found = [Plugin(p.name, p.dist.name, p.dist.version, p) for p in entry_points(group=group) if p.dist]
    found.sort(key=lambda p: (p.distribution != FIRST_PARTY, p.id, p.distribution))
    return [p for p in found if allowed is None or p.distribution in names]


def other_versions() -> list[Plugin]:
    """Plugins written for another major version of the interface, which are left alone."""
    pattern = rf"phosphene\.(methods|extensions)\.v(?!{API_VERSION}$)\d+"
    groups = [group for group in sorted(entry_points().groups) if re.fullmatch(pattern, group)]
    return [plugin for group in groups for plugin in _plugins(group)]


@functools.cache
def _load(plugin: Plugin) -> Any:
    """What a plugin brings: a ``Method``, an extension's module, or a ``BrokenPlugin`` with the reason.

    Each in a manager of its own: pluggy's loader of entry points stops at the first broken one and
    drops clashing names in silence.
    """
    try:
        module = plugin.entry_point.load()
        manager = _manager(module)
        return _method_in(manager, plugin) if plugin.entry_point.group == METHODS_GROUP else module
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises: it is told, not lost
        reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        return BrokenPlugin(plugin, reason, traceback.format_exc())


def _manager(*modules: Any) -> pluggy.PluginManager:
    """The hooks of these modules; a misspelt one raises."""
    manager = pluggy.PluginManager("phosphene")
    manager.add_hookspecs(hookspecs)
    for module in modules:
        manager.register(module)
    manager.check_pending()
    return manager


def _method_in(manager: pluggy.PluginManager, plugin: Plugin) -> Method[..., Any]:
    found = {m.spec.name: m for methods in manager.hook.phosphene_methods() for m in methods}
    if not found:
        raise PluginError(f"{plugin.entry_point.value} has no hook phosphene_methods (is @hookimpl there?)")
    if plugin.id not in found:
        raise PluginError(f"the entry point is called {plugin.id!r}, but its module holds {', '.join(found)}")
    found[plugin.id].distribution = f"{plugin.distribution} {plugin.version}"
    return found[plugin.id]


class Methods(Mapping[str, "Method[..., Any]"]):
    """All methods by id, short name or ``distribution:id``; loading one imports that module only.

    A short name (``"pgd"``) means the first-party method if there is one, else the only third-party
    one. Two distributions with one id: the first-party one wins; of two third parties neither does
    by its bare id. So installing a plugin never changes what a name means.
    """

    @cached_property
    def plugins(self) -> dict[str, Plugin]:
        """Every plugin of this API version by ``distribution:id``, first-party ones first."""
        return {p.qualified: p for p in _plugins(METHODS_GROUP)}

    def resolve(self, name: str) -> Plugin:
        """The plugin a name means; UnknownName or PluginError (ambiguous) in a sentence."""
        matches = [p for p in self.plugins.values() if name in (p.qualified, p.id, p.short_name)]
        first = [p for p in matches if p.distribution == FIRST_PARTY]
        if len(first or matches) == 1:
            return (first or matches)[0]
        if matches:
            choices = " or ".join(p.qualified for p in matches)
            raise PluginError(f"{name!r} could mean more than one method; say {choices}")
        known = [*dict.fromkeys(p.short_name for p in self.plugins.values()), *self]
        raise UnknownName("method", name, known)

    def shortest_name(self, plugin: Plugin) -> str:
        """The shortest name that means this plugin."""
        names = (plugin.short_name, plugin.id, plugin.qualified)
        return next(name for name in names if name in self and self.resolve(name) == plugin)

    def by_family(self) -> dict[str, dict[str, Plugin]]:
        """Every method's plugin by family and shortest name, families in their usual order."""
        shelves: dict[str, dict[str, Plugin]] = {}
        for plugin in sorted(map(self.resolve, self), key=lambda p: rank(p.family)):
            shelves.setdefault(plugin.family, {})[self.shortest_name(plugin)] = plugin
        return shelves

    def __getitem__(self, name: str) -> Method[..., Any]:
        plugin = self.resolve(name)
        loaded: Method[..., Any] | BrokenPlugin = _load(plugin)
        if isinstance(loaded, BrokenPlugin):
            told = f"{loaded.reason} ('phosphene plugins' tells more)"
            raise PluginError(f"{plugin.qualified} cannot be used: {told}")
        return loaded

    def __iter__(self) -> Iterator[str]:
        """Each method's id; where two third parties share one, ``distribution:id``."""
        shared = self.shadowed()
        for plugin in self.plugins.values():
            if plugin not in shared or plugin.distribution == FIRST_PARTY:
                yield plugin.id
            elif all(other.distribution != FIRST_PARTY for other in shared[plugin]):
                yield plugin.qualified

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and bool(self.resolve(name))
        except (UnknownName, PluginError):
            return False

    def load_all(self) -> dict[str, Method[..., Any]]:
        """Every method that works, by the names ``iter`` gives; the others stand in ``broken()``."""
        loaded = {name: _load(self.resolve(name)) for name in self}
        return {name: method for name, method in loaded.items() if not isinstance(method, BrokenPlugin)}

    def broken(self) -> list[BrokenPlugin]:
        """Every plugin, extensions among them, that cannot be used, after trying them all."""
        loaded = map(_load, (*self.plugins.values(), *extensions.plugins()))
        return [found for found in loaded if isinstance(found, BrokenPlugin)]

    def shadowed(self) -> dict[Plugin, list[Plugin]]:
        """Ids that several distributions bring: each such plugin with those it shares its id with."""
        every = self.plugins.values()
        sharing = {p: [other for other in every if other.id == p.id and other != p] for p in every}
        return {plugin: others for plugin, others in sharing.items() if others}

    def find(
        self,
        *,
        family: str | None = None,
        tags: str | None = None,
        needs: str | None = None,
        accepts: str | None = None,
        returns: str | None = None,
    ) -> list[Method[..., Any]]:
        """Methods by what they are, need, accept (an input role) and return (a result type)."""
        return [
            method
            for method in self.load_all().values()
            if (family is None or method.spec.family == family)
            and (tags is None or tags in method.spec.tags)
            and (needs is None or needs in method.spec.needs)
            and (accepts is None or method.spec.input(accepts) is not None)
            and (returns is None or method.spec.returns == returns)
        ]


class Extensions:
    """What is not a method: loaders, observers, executors, commands, invariants."""

    def plugins(self) -> list[Plugin]:
        """Every extension of this API version, first-party ones first; none is loaded."""
        return _plugins(EXTENSIONS_GROUP)

    @cached_property
    def manager(self) -> pluggy.PluginManager:
        """The hooks of every extension that works."""
        manager = _manager()
        for plugin in self.plugins():
            module = _load(plugin)
            if isinstance(module, BrokenPlugin):
                warnings.warn(f"extension {plugin.qualified} left out: {module.reason}", stacklevel=2)
            elif not manager.is_registered(module):
                manager.register(module, name=plugin.qualified)
        return manager

    def gather(self, hook: str) -> dict[str, Any]:
        """One mapping out of a hook's mappings; a name given twice is told, first-party names kept."""
        merged: dict[str, Any] = {}
        # pluggy calls the last registered first; first-party extensions were registered first.
        for mapping in reversed(getattr(self.manager.hook, hook)()):
            for name, value in mapping.items():
                if merged.setdefault(name, value) is not value:
                    warnings.warn(f"{hook}: {name!r} is brought twice; the first one is used", stacklevel=2)
        return merged

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call every implementation of a hook; one that fails is reported, and the work goes on."""
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            try:
                implementation.function(*(arguments[name] for name in implementation.argnames))
            except Exception as error:
                told = f"failed in {hook}: {type(error).__name__}: {error}"
                warnings.warn(f"extension {implementation.plugin_name} {told}", stacklevel=3)


methods = Methods()
extensions = Extensions()
