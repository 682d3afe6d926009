"""``TokenNorms``: the norms of the tokens behind each block, and which are far larger than the others."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from phosphene.images import Centers, charts, colorize, enlarge_maps
from phosphene.results import Panel, Result, shorten_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Blocks that are drawn for an image, evenly spaced, the last included, and images in a figure.
_DRAWN, _FIGURE_IMAGES = 6, 4


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenNorms(Result):
    """L2 norms of the tokens behind each of L blocks, and the patches whose norm is high.

    ``images`` (N, C, H, W); ``maps`` (N, L, h, w), the norms of the patches, ``others`` (N, L, S), those of
    class and register tokens; ``high`` (N, L), how many patches have more than ``factor`` times the median of
    their image and block. ``layers`` (L): the blocks. ``centers``: the pixels at which the rows (h,) and
    columns (w,) of the patches are centered; None: cells share the image equally.

    In the figure a dot is the norm of a token over the median of its image and block. The maps have that
    ratio on a logarithmic scale: white is 1, full red ``factor`` and more, full blue 1 / ``factor`` and less,
    so pale maps are those of a network without high norms.
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
                ratios = maps[number] / maps[number].median().clamp(min=1e-30)
                # The same scale in every panel, up to the threshold: only a high norm is full red.
                exponents = (ratios.clamp(min=1e-30).log() / math.log(self.factor)).clamp(-1, 1)
                enlarged = enlarge_maps(exponents[None], image.shape[1:], self.centers)[0]
                span = f"{float(ratios.min()):.2g} to {float(ratios.max()):.2g} times the median"
                title = f"{shorten_title(self.layers[number], 20)}: {span}, {int(high[number])} high"
                group.append(Panel(colorize((1 + enlarged) / 2, "RdBu_r"), title, is_output=True))
            groups.append(group)
        return groups

    def draw(self) -> Figure:
        """All norms by block relative to the median, with the threshold, above maps of some images."""
        chosen = charts.evenly_spaced(len(self.images), _FIGURE_IMAGES)
        panels = self.panels()
        groups = [panels[n] for n in chosen]
        figure = charts.new_figure(2.6 + 1.5 * len(groups))
        halves: Any = figure.subfigures(2, 1, height_ratios=[2.6, 1.5 * len(groups)])
        top, bottom = halves
        self._plot_norms(top.subplots())
        scale = f"red: norm above the median (full red: {self.factor:g} times), blue: below"
        bottom.suptitle(scale, fontsize=8, x=0.01, ha="left")
        grid = bottom.subplots(len(groups), len(groups[0]), squeeze=False)
        for row, group in zip(grid, groups, strict=True):
            for axis, panel in zip(row, group, strict=True):
                # "blocks.0: 2 high": the chart shows the range.
                charts.show_image(axis, panel.image, re.sub(r": .*, ", ": ", panel.title))
        return figure

    def _plot_norms(self, axes: Axes) -> None:
        """A dot for each token: its norm over the median of the patches of its image and block."""
        norms, others = self.maps.flatten(2).double().cpu(), self.others.double().cpu()
        median = norms.median(2).values.clamp(min=1e-30)[:, :, None]
        ratios, other_ratios = (norms / median).numpy(), (others / median).numpy()
        blocks = np.arange(len(self.layers))[None, :, None]
        spread = np.random.default_rng(0).uniform(-0.25, 0.05, ratios.shape)  # dots side by side
        axes.scatter((blocks + spread).ravel(), ratios.ravel(), s=9, label="patches")
        if other_ratios.size:
            x = np.broadcast_to(blocks + 0.25, other_ratios.shape)
            axes.scatter(x.ravel(), other_ratios.ravel(), s=12, marker="x", label="class and register tokens")
        axes.axhline(self.factor, color="tab:red", linewidth=1.2, label=f"high: above {self.factor:g}")
        largest = max(self.factor, ratios.max(initial=0), other_ratios.max(initial=0))
        if largest > 5 * self.factor:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.3 * largest)
        axes.set_xticks(range(len(self.layers)), [charts.plain_label(name, 16) for name in self.layers])
        axes.tick_params(axis="x", labelrotation=0 if len(self.layers) <= 8 else 90, labelsize=7)
        axes.set_ylabel("norm / median")
        count, images = int(self.high.sum()), int((self.high > 0).any(1).sum())
        summary = f"{count} of {norms.numel()} norms are high, in {images} of {len(self.images)} images"
        axes.set_title(summary if count else "no patch has a high norm", fontsize=8, loc="left")
        axes.legend(fontsize=7, frameon=False, loc="upper left", ncols=3)
        axes.spines[["top", "right"]].set_visible(False)


def high_norms(maps: Tensor, factor: float) -> Tensor:
    """Whether norms (..., h, w) are more than ``factor`` times the median of their map."""
    median = maps.flatten(-2).median(-1).values[..., None, None]
    return maps > factor * median
