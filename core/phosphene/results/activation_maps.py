"""``ActivationMaps``: a layer's feature maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..images.color import Centers, colorize, enlarge_maps, overlay, to_display
from .base import Panel, Result, shorten_title


@dataclass(frozen=True, eq=False, kw_only=True)
class ActivationMaps(Result):
    """Activation maps of K channels of a layer.

    ``images`` (N, C, H, W); ``maps`` (N, K, h, w), the activations; ``scaled`` (N, K, h, w), the same in
    [0, 1] for display, zero at 1/2 if ``signed``; ``channels``, K channel numbers; ``centers``, the pixels at
    which rows (h,) and columns (w,) are centered, where overlays draw them (None: cells share the image
    equally). With more than nine channels, figures show those of largest activation; titles give a map's
    range, so that a nearly constant map is not mistaken for a strong one.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "maps": "N K h w",
        "scaled": "N K h w",
        "channels": "K",
    }

    per_image: ClassVar[tuple[str, ...]] = ("images", "maps", "scaled")

    images: Tensor
    maps: Tensor
    scaled: Tensor
    channels: tuple[int, ...]
    layer: str
    layout: Literal["overlay", "map"] = "map"
    signed: bool = False
    centers: Centers | None = None

    def panels(self) -> list[list[Panel]]:
        groups = []
        for image, maps, scaled in zip(self.images, self.maps, self.scaled, strict=True):
            strongest = maps.flatten(1).amax(1).sort(descending=True, stable=True).indices[:9].tolist()
            group = [Panel(image, shorten_title(self.layer))]
            for k in strongest if len(maps) > 9 else range(len(maps)):
                drawn = colorize(scaled[k], "RdBu_r" if self.signed else "viridis")
                if self.layout == "overlay":
                    enlarged = enlarge_maps(scaled[k][None].float(), image.shape[1:], self.centers)[0]
                    drawn = overlay(to_display(image), enlarged)
                value_range = f"{float(maps[k].min()):.2g} to {float(maps[k].max()):.2g}"
                group.append(Panel(drawn, f"channel {self.channels[k]}: {value_range}"))
            groups.append(group)
        return groups
