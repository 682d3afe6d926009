"""``methods``: method plugins looked up by name and loaded one at a time."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import PluginError, UnknownName
from .extensions import extensions
from .families import family_rank
from .hookspecs import METHODS_GROUP
from .plugins import FIRST_PARTY, BrokenPlugin, Plugin, list_plugins, load_plugin

if TYPE_CHECKING:
    from .method import Method


class Methods(Mapping[str, "Method[..., Any]"]):
    """All methods by id, short name or ``distribution:id``; loading one imports that module only.

    A short name (``"pgd"``) means the first-party method if there is one, else the only third-party
    one. Two distributions with one id: the first-party one wins; of two third parties neither does
    by its bare id. So installing a plugin never changes what a name means.
    """

    @cached_property
    def plugins(self) -> dict[str, Plugin]:
        """Every plugin of this API version by ``distribution:id``, first-party ones first."""
        return {f"{p.distribution}:{p.id}": p for p in list_plugins(METHODS_GROUP)}

    def resolve(self, name: str) -> Plugin:
        """The plugin that a name means. Raises UnknownName, or PluginError where it is ambiguous."""
        plugins = self.plugins.items()
        matches = [p for q, p in plugins if name in (q, p.id, p.id.rpartition(".")[2])]
        first = [p for p in matches if p.distribution == FIRST_PARTY]
        if len(first or matches) == 1:
            return (first or matches)[0]
        if matches:
            choices = " or ".join(p.qualified for p in matches)
            raise PluginError(f"{name!r} is the name of more than one method; write {choices}")
        existing = [*dict.fromkeys(p.short_name for p in self.plugins.values()), *self]
        raise UnknownName("method", name, existing)

    def shortest_name(self, plugin: Plugin) -> str:
        """The shortest name that means this plugin."""
        names = (plugin.short_name, plugin.id, plugin.qualified)
        return next(name for name in names if name in self and self.resolve(name) == plugin)

    def by_family(self) -> dict[str, dict[str, Plugin]]:
        """Every method's plugin by family and shortest name, families in their usual order."""
        families: dict[str, dict[str, Plugin]] = {}
        for plugin in sorted(map(self.resolve, self), key=lambda p: family_rank(p.family)):
            families.setdefault(plugin.family, {})[self.shortest_name(plugin)] = plugin
        return families

    def __repr__(self) -> str:
        """All names, a line per family; no method is loaded."""
        lines = [f"{len(self)} methods"]
        for family, plugins in self.by_family().items():
            names = textwrap.wrap(", ".join(plugins), 80)
            lines += [f"  {family if n == 0 else '':13}{line}" for n, line in enumerate(names)]
        return "\n".join(lines)

    def __getitem__(self, name: str) -> Method[..., Any]:
        plugin = self.resolve(name)
        loaded: Method[..., Any] | BrokenPlugin = load_plugin(plugin)
        if isinstance(loaded, BrokenPlugin):
            raise PluginError(
                f"{plugin.qualified} cannot be used: {loaded.reason} (details: 'phosphene plugins --debug')"
            )
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
        """Every method that can be loaded, by the names of ``iter``; ``broken()`` lists the others."""
        loaded = {name: load_plugin(self.resolve(name)) for name in self}
        return {name: method for name, method in loaded.items() if not isinstance(method, BrokenPlugin)}

    def broken(self) -> list[BrokenPlugin]:
        """Every plugin that cannot be loaded, extensions included, after trying them all."""
        loaded = map(load_plugin, (*self.plugins.values(), *extensions.plugins()))
        return [plugin for plugin in loaded if isinstance(plugin, BrokenPlugin)]

    def shadowed(self) -> dict[Plugin, list[Plugin]]:
        """Plugins whose id other distributions use, too, each with those other plugins."""
        plugins = self.plugins.values()
        sharing = {p: [other for other in plugins if other.id == p.id and other != p] for p in plugins}
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


methods = Methods()
