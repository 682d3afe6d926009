"""``extensions``: loaders, roles, observers, executors, commands and invariants that plugins bring."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import pluggy

from .hookspecs import EXTENSIONS_GROUP
from .plugins import BrokenPlugin, Plugin, list_plugins, load_plugin, plugin_manager


class Extensions:
    """The extensions' hooks, all loaded when one of them is first needed."""

    def plugins(self) -> list[Plugin]:
        """Every extension of this API version, first-party ones first; none is loaded."""
        return list_plugins(EXTENSIONS_GROUP)

    @cached_property
    def manager(self) -> pluggy.PluginManager:
        """The hooks of every extension that works; a broken one is left out with a warning."""
        manager = plugin_manager()
        for plugin in self.plugins():
            module = load_plugin(plugin)
            if isinstance(module, BrokenPlugin):
                warnings.warn(f"extension {plugin.qualified} is left out: {module.reason}", stacklevel=2)
            elif not manager.is_registered(module):
                manager.register(module)
        return manager

    def gather(self, hook: str, name_of: Callable[[Any], str] | None = None) -> dict[str, Any]:
        """What all implementations of a hook return, by name: of mappings, or of lists with ``name_of``.

        Where two plugins define one name, the first is used, first-party ones before others, with a warning.
        """
        merged: dict[str, Any] = {}
        for name, value in self._items(hook, name_of):
            if merged.setdefault(name, value) is not value:
                warnings.warn(f"{hook}: two plugins bring {name!r}; the first one is used", stacklevel=2)
        return merged

    def _items(self, hook: str, name_of: Callable[[Any], str] | None) -> Iterator[tuple[str, Any]]:
        # pluggy calls the last registered first; first-party extensions were registered first.
        for returned in reversed(getattr(self.manager.hook, hook)()):
            yield from returned.items() if name_of is None else ((name_of(item), item) for item in returned)

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call every implementation of a hook; one that fails is reported as a warning."""
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            try:
                implementation.function(*(arguments[name] for name in implementation.argnames))
            except Exception as error:
                message = f"failed in {hook}: {type(error).__name__}: {error}"
                warnings.warn(f"extension {implementation.plugin_name} {message}", stacklevel=3)


extensions = Extensions()
