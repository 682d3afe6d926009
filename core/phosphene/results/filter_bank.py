"""``FilterBank``: convolution filters as images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..images.color import enlarge
from .base import Panel, Result


@dataclass(frozen=True, eq=False, kw_only=True)
class FilterBank(Result):
    """Filters of a convolution.

    ``weights`` (F, C, K, K); ``tiles`` (T, 3, K, K), the filters as images in [0, 1]; ``captions``, a title
    per tile; ``columns``, tiles per row of the figure.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "tiles": "T 3 h w",
        "captions": "T",
    }

    layer: str
    weights: Tensor
    tiles: Tensor
    captions: tuple[str, ...]
    columns: int = 8

    def panels(self) -> list[list[Panel]]:
        from torchvision.utils import make_grid

        # Enlarged, so that single weights are visible.
        side = max(12, min(66, 1320 // self.columns))
        tiles = enlarge(self.tiles, max(1, side // max(self.tiles.shape[2:])))
        size = "x".join(str(s) for s in self.weights.shape)
        image = make_grid(tiles, self.columns, padding=3, pad_value=1)
        return [[Panel(image, f"{self.layer}: {size}", is_output=True)]]
