"""Channel numbers of a layer, checked before work starts."""

from __future__ import annotations

from collections.abc import Iterable

from phosphene import InputError


def require_channels(channels: Iterable[int], layer: str, count: int) -> None:
    """Raise InputError for a channel that a layer with ``count`` channels does not have."""
    for channel in channels:
        if not 0 <= channel < count:
            raise InputError(f"layer {layer!r} has {count} channels, so there is no number {channel}")
