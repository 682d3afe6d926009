"""``methods``: every technique by name, known from metadata, loaded one by one, none able to hurt another."""

from __future__ import annotations

import ast
import os
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
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
        return self.id.rpartition(".")[2]

    @property
    def family(self) -> str:
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
        path = _find_source(self.entry_point.module)
        tree = ast.Module([], [])
        if path is not None:
            with open(path, encoding="utf-8") as file:
                tree = ast.parse(file.read())
        functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
        return tree, functions.get(self.short_name)


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that could not be used: why, in a sentence, and the traceback if there is one."""

    plugin: Plugin
    reason: str
    traceback: str = ""

    @classmethod
    def by(cls, plugin: Plugin, error: BaseException) -> BrokenPlugin:
        """Broken by an error that is being handled."""
        reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        return cls(plugin, reason, traceback.format_exc())


def _find_source(module: str) -> str | None:
    """The file of a module, found without running any code, its parents' included."""
    path = None
    spec = None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:depth]), path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec.origin if spec and spec.origin and spec.origin.endswith(".py") else None


def _plugins(group: str) -> list[Plugin]:
    allowed = os.environ.get("PHOSPHENE_PLUGINS")
    names = None if allowed is None else {n.strip() for n in allowed.split(",")} | {FIRST_PARTY}
    found: dict[tuple[str, str], Plugin] = {}
    for point in entry_points(group=group):
        owner = point.dist.name if point.dist else "unknown"
        version = point.dist.version if point.dist else ""
        if names is None or owner in names:
            # A distribution can be seen twice on the path (editable and built): the first one counts.
            found.setdefault((owner, point.name), Plugin(point.name, owner, version, point))
    return list(found.values())


class Methods(Mapping[str, "Method[..., Any]"]):
    """All methods by id, short name or ``distribution:id``; loading one imports that module only.

    A short name (``"pgd"``) means the first-party method if there is one, else the only third-party
    one. Two distributions with one id: the first-party one wins; of two third parties neither does
    by its bare id. So installing a plugin never changes what a name means.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Method[..., Any]] = {}
        self._broken: dict[str, BrokenPlugin] = {}

    @cached_property
    def plugins(self) -> dict[str, Plugin]:
        """Every plugin of this API version by ``distribution:id``, first-party ones first."""
        found = _plugins(METHODS_GROUP)
        found.sort(key=lambda p: (p.distribution != FIRST_PARTY, p.id, p.distribution))
        return {p.qualified: p for p in found}

    def resolve(self, name: str) -> Plugin:
        """The plugin a name means; UnknownName or PluginError (ambiguous) in a sentence."""
        if name in self.plugins:
            return self.plugins[name]
        matches = [p for p in self.plugins.values() if name in (p.id, p.short_name)]
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
        for name in (plugin.short_name, plugin.id):
            try:
                if self.resolve(name) == plugin:
                    return name
            except PluginError:  # the name means several
                continue
        return plugin.qualified

    def by_family(self) -> dict[str, dict[str, Plugin]]:
        """Every method's plugin by family and shortest name, families in their usual order."""
        shelves: dict[str, dict[str, Plugin]] = {}
        for plugin in sorted(map(self.resolve, self), key=lambda p: rank(p.family)):
            shelves.setdefault(plugin.family, {})[self.shortest_name(plugin)] = plugin
        return shelves

    def __getitem__(self, name: str) -> Method[..., Any]:
        qualified = self._load(self.resolve(name))
        if qualified in self._broken:
            reason = self._broken[qualified].reason
            raise PluginError(f"{qualified} cannot be used: {reason} ('phosphene plugins' tells more)")
        return self._loaded[qualified]

    def __iter__(self) -> Iterator[str]:
        """Each method's id; where two third parties share one, ``distribution:id``."""
        seen: dict[str, list[Plugin]] = {}
        for plugin in self.plugins.values():
            seen.setdefault(plugin.id, []).append(plugin)
        for name, owners in seen.items():
            alone = len(owners) == 1 or owners[0].distribution == FIRST_PARTY
            yield from [name] if alone else (p.qualified for p in owners)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and bool(self.resolve(name))
        except (UnknownName, PluginError):
            return False

    def _load(self, plugin: Plugin) -> str:
        if plugin.qualified in self._loaded or plugin.qualified in self._broken:
            return plugin.qualified
        try:
            self._loaded[plugin.qualified] = _method_in(plugin)
        except (Exception, SystemExit) as error:  # whatever a stranger's module raises: it is told, not lost
            self._broken[plugin.qualified] = BrokenPlugin.by(plugin, error)
        return plugin.qualified

    def load_all(self) -> dict[str, Method[..., Any]]:
        """Every method that works, by the names ``iter`` gives; the others stand in ``broken()``."""
        qualified = {name: self._load(self.resolve(name)) for name in self}
        return {name: self._loaded[q] for name, q in qualified.items() if q in self._loaded}

    def broken(self) -> list[BrokenPlugin]:
        """Every plugin that cannot be used, after trying them all."""
        for plugin in self.plugins.values():
            self._load(plugin)
        return [*self._broken.values(), *extensions.broken]

    def shadowed(self) -> list[tuple[Plugin, list[Plugin]]]:
        """Ids that several distributions bring: a plugin and those it shares its id with."""
        return [
            (plugin, others)
            for plugin in self.plugins.values()
            if (others := [o for o in self.plugins.values() if o.id == plugin.id and o != plugin])
        ]

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


def _manager(*modules: Any) -> pluggy.PluginManager:
    """The hooks of these modules; a misspelt one raises."""
    manager = pluggy.PluginManager("phosphene")
    manager.add_hookspecs(hookspecs)
    for module in modules:
        manager.register(module)
    manager.check_pending()
    return manager


def _method_in(plugin: Plugin) -> Method[..., Any]:
    # pluggy's own entry-point loader stops at the first broken plugin and drops clashing names in
    # silence, so every module gets a manager of its own.
    manager = _manager(plugin.entry_point.load())
    found = [m for methods in manager.hook.phosphene_methods() for m in methods]
    if not found:
        raise PluginError(f"{plugin.entry_point.value} has no hook phosphene_methods (is @hookimpl there?)")
    for method in found:
        if method.spec.name == plugin.id:
            method.distribution = f"{plugin.distribution} {plugin.version}".strip()
            return method
    names = ", ".join(m.spec.name for m in found)
    raise PluginError(f"the entry point is called {plugin.id!r}, but its module holds {names}")


class Extensions:
    """What is not a method - loaders, observers, executors, commands, invariants - each loaded alone."""

    def __init__(self) -> None:
        self.broken: list[BrokenPlugin] = []

    @cached_property
    def manager(self) -> pluggy.PluginManager:
        """The hooks of every extension that works."""
        return self._load(self.plugins())

    def plugins(self) -> list[Plugin]:
        """Every extension of this API version, first-party ones first; none is loaded."""
        return sorted(_plugins(EXTENSIONS_GROUP), key=lambda p: p.distribution != FIRST_PARTY)

    def _load(self, plugins: list[Plugin]) -> pluggy.PluginManager:
        manager = _manager()
        for plugin in plugins:
            try:
                module = plugin.entry_point.load()
                _manager(module)  # tried alone first: an error of its own must not hurt the others
                if not manager.is_registered(module):
                    manager.register(module, name=plugin.qualified)
            except (Exception, SystemExit) as error:  # told by `phosphene plugins`
                broken = BrokenPlugin.by(plugin, error)
                if not any(b.plugin == plugin for b in self.broken):
                    self.broken.append(broken)
                    warnings.warn(f"extension {plugin.qualified} left out: {broken.reason}", stacklevel=2)
        return manager

    def add_commands(self, app: Any) -> None:
        """Let third-party extensions add to the command line; first-party ones add none and cost torch."""
        strangers = [p for p in self.plugins() if p.distribution != FIRST_PARTY]
        if strangers:
            _notify(self._load(strangers), "phosphene_commands", app=app)

    def gather(self, hook: str) -> dict[str, Any]:
        """One mapping out of a hook's mappings; a name given twice is refused, first-party names kept."""
        merged: dict[str, Any] = {}
        # pluggy calls the last registered first; first-party extensions were registered first.
        for mapping in reversed(getattr(self.manager.hook, hook)()):
            for name, value in mapping.items():
                if merged.setdefault(name, value) is not value:
                    warnings.warn(f"{hook}: {name!r} is brought twice; the first one is used", stacklevel=2)
        return merged

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call every observer; one that fails is reported, and the run goes on."""
        _notify(self.manager, hook, **arguments)


def _notify(manager: pluggy.PluginManager, hook: str, **arguments: Any) -> None:
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        wanted = {name: arguments[name] for name in implementation.argnames}
        try:
            implementation.function(**wanted)
        except Exception as error:
            warnings.warn(
                f"extension {implementation.plugin_name} failed in {hook}: {type(error).__name__}: {error}",
                stacklevel=3,
            )


def other_versions() -> list[Plugin]:
    """Plugins written for another major version of the interface, which are left alone."""
    pattern = re.compile(r"phosphene\.(methods|extensions)\.v(\d+)")
    return [
        plugin
        for group in sorted(entry_points().groups)
        if (match := pattern.fullmatch(group)) and int(match[2]) != API_VERSION
        for plugin in _plugins(group)
    ]


methods = Methods()
extensions = Extensions()
