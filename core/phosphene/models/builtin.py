"""``builtin:`` - the small networks that come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..builtin.networks import MEAN, NETWORKS, STD, load_network
from ..builtin.scenes import CLASSES
from ..errors import InputError, UnknownName
from .model import Model


class BuiltinLoader:
    """Trained networks of the bundled world; they need no download."""

    def load(self, name: str, *, weights: str | None, pretrained: bool, **options: Any) -> Model:
        if name not in NETWORKS:
            raise UnknownName("bundled model", name, NETWORKS)
        if weights is not None:
            raise InputError(f"builtin:{name} brings its own weights; there are none called {weights!r}")
        known = {"mean": MEAN, "std": STD, "input_size": (3, 64, 64), "classes": CLASSES}
        return Model(load_network(name), name=f"builtin:{name}", **(known | options))

    def names(self) -> Sequence[str]:
        return tuple(NETWORKS)
