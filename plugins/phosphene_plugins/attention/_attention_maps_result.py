"""``AttentionMaps``: what a query token attends to, for each layer and head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from phosphene.images import Centers, colorize, enlarge_maps, min_max, overlay, to_display
from phosphene.results import Panel, Result, shorten_title

from ._tokens import layer_rows


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionMaps(Result):
    """Attention of one query to the patches, a map for each of M heads of several layers.

    ``images`` (N, C, H, W); ``maps`` (N, M, h, w), the attention to each patch; ``others`` (N, M, S), that to
    the class and register tokens: a map and its others sum to 1. ``layers`` and ``heads`` (M): the layer and
    the number of each head. ``query``: a name of the query; ``point``: the pixel (x, y) of a patch that is
    the query. ``centers``: the pixels at which the rows (h,) and columns (w,) are centered; None: cells share
    the image equally.

    A row of the figure is a layer of an image: the mean over its heads, laid over the image, and each head.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "maps": "N M h w",
        "others": "N M S",
        "layers": "M",
        "heads": "M",
    }

    per_image: ClassVar[tuple[str, ...]] = ("images", "maps", "others")

    images: Tensor
    maps: Tensor
    others: Tensor
    layers: tuple[str, ...]
    heads: tuple[int, ...]
    query: str
    point: tuple[int, int] | None = None
    centers: Centers | None = None

    def layer_mean(self, layer: str) -> Tensor:
        """(N, h, w): the mean over the heads of a layer."""
        return self.maps[:, layer_rows(self.layers)[layer]].mean(1)

    def panels(self) -> list[list[Panel]]:
        groups = []
        for number, image in enumerate(self.images):
            size = image.shape[1:]
            for layer, heads in layer_rows(self.layers).items():
                mean = min_max(enlarge_maps(self.layer_mean(layer).float()[number, None], size, self.centers))
                drawn = self._with_point(overlay(to_display(image), mean[0]))
                group = [Panel(drawn, f"{shorten_title(layer)}, {self.query}", is_output=True)]
                for n in heads:
                    enlarged = enlarge_maps(self.maps[number, n, None].float(), size, self.centers)
                    share = float(self.maps[number, n].sum())
                    title = f"head {self.heads[n]}: {share:.0%} on patches"
                    group.append(Panel(self._with_point(colorize(min_max(enlarged)[0])), title))
                groups.append(group)
        return groups

    def _with_point(self, drawn: Tensor) -> Tensor:
        """An image (3, H, W) with a cross at the query's pixel."""
        if self.point is None:
            return drawn
        drawn, (x, y) = drawn.clone(), self.point
        arm = max(1, min(drawn.shape[1:]) // 24)
        color = torch.tensor([1.0, 1, 1], device=drawn.device)[:, None, None]
        drawn[:, y : y + 1, max(0, x - arm) : x + arm + 1] = color
        drawn[:, max(0, y - arm) : y + arm + 1, x : x + 1] = color
        return drawn
