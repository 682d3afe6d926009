"""``ChannelRedundancy``: similarity of a layer's channels and groups of redundant ones."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from phosphene.images import Centers, charts, colorize, enlarge, enlarge_maps, min_max, overlay, to_display
from phosphene.results import Panel, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure


@dataclass(frozen=True, eq=False, kw_only=True)
class ChannelRedundancy(Result):
    """Similarity of a layer's C channels over a data set.

    ``similarity`` (C, C) by ``measure``; ``pairs`` (P, 2) of channels with at least ``threshold``, the most
    similar first; ``groups`` in which every pair has at least that, the largest first; ``order``, all
    channels in the order of the clustering's leaves. ``images`` (G, 3, H, W), one for each of the first
    groups: the one that activates the group's first channel most; ``maps`` (G, M, h, w), the activations of
    the group's first M channels on it, zeros where the group has fewer. Both None without groups.
    ``centers``: the pixels at which the maps' rows and columns are centered; None: cells share the image.
    """

    layer: str
    measure: str
    threshold: float
    similarity: Tensor
    pairs: Tensor
    groups: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    images: Tensor | None = None
    maps: Tensor | None = None
    centers: Centers | None = None

    def panels(self) -> list[list[Panel]]:
        order = list(self.order)
        matrix = colorize(self.similarity[order][:, order] / 2 + 0.5, "RdBu_r")
        panels = [[Panel(enlarge(matrix, max(1, 128 // len(order))), self.lines()[0], is_output=True)]]
        return panels + self._group_panels()

    def lines(self) -> list[str]:
        counts = f"pairs {len(self.pairs)}, groups {len(self.groups)}"
        limit = f"{self.measure} {self.threshold:g} or more"
        head = f"{self.layer}, {len(self.order)} channels: {counts} at {limit}"
        return [head, *("group: " + ", ".join(map(str, group)) for group in self.groups)]

    def draw(self) -> Figure:
        """The similarity matrix in the order of the clustering, groups framed, beside images of groups."""
        groups = self._group_panels()
        figure = charts.new_figure(4.8 if groups else 5.2)
        columns = 2 if groups else 1
        parts = figure.subfigures(1, columns, squeeze=False, width_ratios=(1.25, 1)[:columns])
        self._draw_matrix(parts[0, 0])
        if groups:
            grid = parts[0, 1].subplots(len(groups), max(map(len, groups)), squeeze=False)
            for row, panels in zip(grid, groups, strict=True):
                for axes, panel in itertools.zip_longest(row, panels):
                    axes.set_axis_off()
                    if panel is not None:
                        charts.show_image(axes, panel.image, panel.title)
        return figure

    def _group_panels(self) -> list[list[Panel]]:
        """For each of the first groups, its image and the maps of its channels over it."""
        if self.images is None or self.maps is None:
            return []
        rows = []
        for image, maps, group in zip(self.images, self.maps, self.groups, strict=False):
            row = [Panel(image, f"group of {len(group)}")]
            if maps[0].numel() > 1:
                enlarged = enlarge_maps(min_max(maps), image.shape[1:], self.centers)
                for channel_map, channel in zip(enlarged, group, strict=False):
                    row.append(Panel(overlay(to_display(image), channel_map), f"channel {channel}"))
            rows.append(row)
        return rows

    def _draw_matrix(self, part: SubFigure) -> None:
        from matplotlib.patches import Rectangle

        axes, order = cast(Any, part.subplots()), list(self.order)
        matrix = self.similarity[order][:, order].float().cpu().numpy()
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        part.colorbar(image, ax=axes, shrink=0.6, label=self.measure, location="bottom")
        ranks = {channel: rank for rank, channel in enumerate(order)}
        for group in self.groups:
            start = min(ranks[channel] for channel in group) - 0.5
            frame = Rectangle((start, start), len(group), len(group), fill=False, color="black", linewidth=1)
            axes.add_patch(frame)
        axes.set_xticks([]), axes.set_yticks([])
        if len(order) <= 48:
            axes.set_yticks(range(len(order)), [str(c) for c in order], fontsize=5)
        axes.set_title(self.lines()[0].replace(": ", "\n"), fontsize=8, loc="left", color="0.3")
