"""``methods`` and ``extensions``: plugins looked up by name and loaded one at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pluggy

from ..errors import PluginError, UnknownName
from .families import family_rank
from .hookspecs import EXTENSIONS_GROUP, METHODS_GROUP

if TYPE_CHECKING:
    from .method import Method
from .plugins import FIRST_PARTY, BrokenPlugin, Plugin, list_plugins, load_plugin, plugin_manager


class Methods(Mapping[str, "Method[..., Any]"]):
    """All methods by id, short name or ``distribution:id``; loading one imports that module only.

    A short name (``"pgd"``) means the first-party method if there is one, else the only third-party
    one. Two distributions with one id: the first-party one wins; of two third parties neither does
    by its bare id. So installing a plugin never changes what a name means.
    """

    @cached_property
    def plugins(self) -> dict[str, Plugin]:
        """Every plugin of this API version by ``distribution:id``, first-party ones first."""
        return {p.qualified: p for p in list_plugins(METHODS_GROUP)}

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
        for plugin in sorted(map(self.resolve, self), key=lambda p: family_rank(p.family)):
            shelves.setdefault(plugin.family, {})[self.shortest_name(plugin)] = plugin
        return shelves

    def __getitem__(self, name: str) -> Method[..., Any]:
        plugin = self.resolve(name)
        loaded: Method[..., Any] | BrokenPlugin = load_plugin(plugin)
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
        loaded = {name: load_plugin(self.resolve(name)) for name in self}
        return {name: method for name, method in loaded.items() if not isinstance(method, BrokenPlugin)}

    def broken(self) -> list[BrokenPlugin]:
        """Every plugin, extensions among them, that cannot be used, after trying them all."""
        loaded = map(load_plugin, (*self.plugins.values(), *extensions.plugins()))
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
        return list_plugins(EXTENSIONS_GROUP)

    @cached_property
    def manager(self) -> pluggy.PluginManager:
        """The hooks of every extension that works."""
        manager = plugin_manager()
        for plugin in self.plugins():
            module = load_plugin(plugin)
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
