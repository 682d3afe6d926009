"""``map_style``: another color map and opacity of the maps that a figure shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from ..errors import InputError, UnknownName, value_repr


@dataclass
class MapStyle:
    """The color map and the opacity of maps over images, None for the usual one; and which were used."""

    cmap: str | None = None
    alpha: float | None = None
    used_cmap: bool = False
    used_alpha: bool = False


_style: ContextVar[MapStyle | None] = ContextVar("phosphene_map_style", default=None)


@contextmanager
def map_style(cmap: str | None = None, alpha: float | None = None) -> Iterator[MapStyle]:
    """Inside, ``colorize`` uses the color map ``cmap`` and ``overlay`` the opacity ``alpha`` of the map.

    Raises UnknownName for a color map that matplotlib does not have, InputError for an ``alpha`` outside
    [0, 1].
    """
    if cmap is not None:
        from matplotlib import colormaps  # late: it is slow to import

        if cmap not in colormaps:
            raise UnknownName("color map", cmap, list(colormaps), "matplotlib")
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if alpha is not None and not (number and 0 <= alpha <= 1):
        raise InputError(f"alpha is the opacity of a map over its image, 0 to 1, not {value_repr(alpha)}")
    style = MapStyle(cmap, alpha)
    token = _style.set(style)
    try:
        yield style
    finally:
        _style.reset(token)


def chosen_cmap(usual: str) -> str:
    """The color map to use: that of ``map_style``, or the usual one."""
    style = _style.get()
    if style is None or style.cmap is None:
        return usual
    style.used_cmap = True
    return style.cmap


def chosen_alpha() -> float | None:
    """The opacity of maps over images that ``map_style`` sets, if any."""
    style = _style.get()
    if style is None or style.alpha is None:
        return None
    style.used_alpha = True
    return style.alpha


def is_styled() -> bool:
    """Whether ``map_style`` changes anything."""
    style = _style.get()
    return style is not None and (style.cmap is not None or style.alpha is not None)
