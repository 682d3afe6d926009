"""``ActivationMaps``: a layer's feature maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..images.color import colorize, overlay, to_display
from .base import Panel, Result, shorten_title


@dataclass(frozen=True, eq=False, kw_only=True)
class ActivationMaps(Result):
    """What chosen channels of a layer answer to images.

    ``images`` (N, C, H, W); ``maps`` (N, K, h, w) raw activations; ``scaled`` the same in [0, 1]
    for showing, with zero in the middle where they are ``signed``; ``channels`` their K numbers. Of
    more than nine, a figure shows each image's strongest; titles tell what a map ranges over, so that a
    map of nearly nothing is not taken for a strong one.
    """

    per_image: ClassVar[tuple[str, ...]] = ("images", "maps", "scaled")

    images: Tensor
    maps: Tensor
    scaled: Tensor
    channels: tuple[int, ...]
    layer: str
    layout: Literal["overlay", "map"] = "map"
    signed: bool = False

    def panels(self) -> list[list[Panel]]:
        groups = []
        for image, maps, scaled in zip(self.images, self.maps, self.scaled, strict=True):
            strongest = maps.flatten(1).amax(1).sort(descending=True, stable=True).indices[:9].tolist()
            group = [Panel(image, shorten_title(self.layer))]
            for k in strongest if len(maps) > 9 else range(len(maps)):
                shown = colorize(scaled[k], "RdBu_r" if self.signed else "viridis")
                if self.layout == "overlay":
                    shown = overlay(to_display(image), scaled[k])
                span = f"{float(maps[k].min()):.2g} to {float(maps[k].max()):.2g}"
                group.append(Panel(shown, f"channel {self.channels[k]}: {span}"))
            groups.append(group)
        return groups
