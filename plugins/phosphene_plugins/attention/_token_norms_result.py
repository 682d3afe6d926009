"""``TokenNorms``: the norms of the tokens behind each block, and which are far larger than the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from phosphene.images import Centers, colorize, enlarge_maps
from phosphene.results import Panel, Result, shorten_title

#: Blocks that are drawn for an image, evenly spaced, the last included.
_DRAWN = 6


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenNorms(Result):
    """L2 norms of the tokens behind each of L blocks, and the patches whose norm is high.

    ``images`` (N, C, H, W); ``maps`` (N, L, h, w), the norms of the patches, ``others`` (N, L, S), those of
    class and register tokens; ``high`` (N, L), how many patches have more than ``factor`` times the median of
    their image and block. ``layers`` (L): the blocks. ``centers``: the pixels at which the rows (h,) and
    columns (w,) of the patches are centered; None: cells share the image equally.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "maps": "N L h w",
        "others": "N L S",
        "high": "N L",
        "layers": "L",
    }
    per_image: ClassVar[tuple[str, ...]] = ("images", "maps", "others", "high")

    images: Tensor
    maps: Tensor
    others: Tensor
    high: Tensor
    factor: float
    layers: tuple[str, ...]
    centers: Centers | None = None

    def images_with_high_norms(self) -> dict[str, list[int]]:
        """By block the numbers of the images with patches of high norm; blocks without any are left out."""
        rows = {
            name: column.nonzero()[:, 0].tolist()
            for name, column in zip(self.layers, self.high.unbind(1), strict=True)
        }
        return {name: numbers for name, numbers in rows.items() if numbers}

    def is_high(self) -> Tensor:
        """(N, L, h, w): whether a patch has more than ``factor`` times the median norm."""
        return high_norms(self.maps, self.factor)

    def lines(self) -> list[str]:
        """By block: the median norm, the largest, and in how many images patches have a high norm."""
        lines = []
        for number, name in enumerate(self.layers):
            maps, high = self.maps[:, number].float(), self.high[:, number]
            lines.append(
                f"{name}: median {float(maps.median()):.3g}, largest {float(maps.max()):.3g}, "
                f"{int(high.sum())} high in {int((high > 0).sum())} of {len(high)} images"
            )
        return lines

    def panels(self) -> list[list[Panel]]:
        count = len(self.layers)
        drawn = sorted({count - 1 - n * count // min(count, _DRAWN) for n in range(min(count, _DRAWN))})
        groups = []
        for image, maps, high in zip(self.images, self.maps.float(), self.high, strict=True):
            group = [Panel(image)]
            for number in drawn:
                # From 0, so that tokens of equal norms are not drawn as different.
                shares = maps[number] / maps[number].max().clamp(min=1e-30)
                enlarged = enlarge_maps(shares[None], image.shape[1:], self.centers)[0]
                norms = f"{float(maps[number].min()):.2g} to {float(maps[number].max()):.2g}"
                title = f"{shorten_title(self.layers[number], 20)}: {norms}, {int(high[number])} high"
                group.append(Panel(colorize(enlarged, "inferno"), title, is_output=True))
            groups.append(group)
        return groups


def high_norms(maps: Tensor, factor: float) -> Tensor:
    """Whether norms (..., h, w) are more than ``factor`` times the median of their map."""
    median = maps.flatten(-2).median(-1).values[..., None, None]
    return maps > factor * median
