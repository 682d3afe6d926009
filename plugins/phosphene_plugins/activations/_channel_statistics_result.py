"""What is found out about a layer's channels over a data set, and how it is drawn."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from phosphene.images import charts, colorize, enlarge, min_max, overlay, to_display
from phosphene.results import Panel, Result, shorten_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class ChannelStatistics(Result):
    """How a layer's channels answer to a data set.

    By channel, (C,): ``active`` the share of places where it fires, ``images_active`` of pictures,
    ``mean`` and ``std`` of its answers, its class ``selectivity`` and the ``preferred`` one of ``classes``,
    and ``reliance``, the share of its answers that lies on the background, whose area is ``background``;
    None where classes or objects are not known. ``dead`` and ``always_on`` are channels' numbers. By
    picture: ``image_active`` (N,) and ``ids``.
    """

    layer: str
    active: Tensor
    images_active: Tensor
    mean: Tensor
    std: Tensor
    dead: tuple[int, ...]
    always_on: tuple[int, ...]
    image_active: Tensor
    ids: tuple[str, ...]
    selectivity: Tensor | None = None
    preferred: Tensor | None = None
    classes: tuple[str, ...] = ()
    reliance: Tensor | None = None
    background: Tensor | None = None

    def selective(self, most: int = 12) -> list[tuple[int, str, float]]:
        """The most selective channels: their number, class and selectivity."""
        if self.selectivity is None or self.preferred is None:
            return []
        values, channels = self.selectivity.sort(descending=True, stable=True)
        names = [self.classes[i] for i in self.preferred[channels].tolist()]
        return list(zip(channels.tolist(), names, values.tolist(), strict=True))[:most]

    def panels(self) -> list[list[Panel]]:
        told = {"fraction active": self.active, "selectivity": self.selectivity, "reliance": self.reliance}
        heights = torch.linspace(1, 0, 64, device=self.active.device)[:, None]
        # Every channel a column, as high as its value.
        return [
            [Panel((heights > values.sort(descending=True).values)[None].float() * 0.9, name)]
            for name, values in told.items()
            if values is not None
        ]

    def lines(self) -> list[str]:
        lines = [f"{self.layer}: {len(self.active)} channels, {len(self.ids)} pictures"]
        for name, channels in (("dead", self.dead), ("always on", self.always_on)):
            listed = ", ".join(map(str, channels[:20])) + (", ..." if len(channels) > 20 else "")
            lines.append(f"{name}: {len(channels)}" + (f" ({listed})" if channels else ""))
        if best := self.selective(6):
            lines.append("most selective: " + ", ".join(f"{c} {name} {v:.2f}" for c, name, v in best))
        if self.reliance is not None and self.background is not None:
            above = int((self.reliance > self.background).sum())
            lines.append(f"more on the background than an even map ({float(self.background):.0%}): {above}")
        return lines

    def figure(self) -> Figure:
        """Sorted fractions active, selectivity against background reliance, the most selective channels."""
        figure = charts.new_figure(3.6)
        left, middle, right = figure.subplots(1, 3)
        self._draw_active(left)
        told = {"class selectivity": self.selectivity, "background reliance": self.reliance}
        names = [name for name, values in told.items() if values is not None]
        across = ["fraction active", *names][-2:]
        points = {"fraction active": self.active, **told}
        x, y = (points[name] for name in (across if len(across) == 2 else across * 2))
        if len(across) == 2 and x is not None and y is not None:
            charts.scatter(middle, torch.stack([x, y], 1), *charts.label_colors(None, len(x)))
            middle.set_xlabel(across[0], fontsize=8), middle.set_ylabel(across[1], fontsize=8)
            middle.set_ylim(-0.03, 1.08)
            if self.background is not None and across[1] == "background reliance":
                middle.axhline(float(self.background), color="0.5", linewidth=0.8, linestyle="--")
                middle.set_title("dashed: the background's area", fontsize=8, loc="left", color="0.3")
            shown = dict.fromkeys([c for c, _, _ in self.selective(4)])
            if self.reliance is not None:
                shown[int(self.reliance.argmax())] = None
            for c in shown:
                place = float(x[c]), float(y[c])
                middle.annotate(str(c), place, (3, 3), textcoords="offset points", fontsize=7)
        else:
            self._draw_spread(middle, self.std, "standard deviation", "channels")
        if best := self.selective()[::-1]:
            names = [f"{c}: {shorten_title(name)}" for c, name, _ in best]
            right.barh(names, [v for _, _, v in best], color="C0")
            right.set_xlabel("class selectivity", fontsize=8)
        else:
            self._draw_spread(right, self.image_active, "fraction active of a picture", "pictures")
        for axes in (left, middle, right):
            axes.tick_params(labelsize=7), axes.spines[["top", "right"]].set_visible(False)
        return figure

    def _draw_active(self, axes: Any) -> None:
        values, channels = self.active.float().cpu().sort(descending=True, stable=True)
        axes.fill_between(range(len(values)), values, step="mid", color="C0", alpha=0.35, linewidth=0)
        axes.step(range(len(values)), values, where="mid", color="C0", linewidth=1)
        for what, colour in (("always_on", "C1"), ("dead", "C3")):
            named = set(getattr(self, what))
            at = [n for n, c in enumerate(channels.tolist()) if c in named]
            label = f"{what.replace('_', ' ')}: {len(at)}"
            axes.scatter(at, values[at], s=12, color=colour, label=label, zorder=3, clip_on=False)
        axes.legend(fontsize=7, frameon=False)
        axes.set_ylim(0, 1), axes.set_ylabel("fraction active", fontsize=8)
        axes.set_xlabel("channels, sorted", fontsize=8)
        title = f"{shorten_title(self.layer, 30)}, {len(self.ids)} pictures"
        axes.set_title(title, fontsize=8, loc="left", color="0.3")

    def _draw_spread(self, axes: Any, values: Tensor, what: str, of: str) -> None:
        axes.hist(values.float().cpu().numpy(), bins=24, color="C0", alpha=0.6)
        axes.set_xlabel(what, fontsize=8), axes.set_ylabel(of, fontsize=8)


@dataclass(frozen=True, eq=False, kw_only=True)
class ChannelRedundancy(Result):
    """How alike a layer's channels answer to a data set.

    ``similarity`` (C, C) by ``measure``; ``pairs`` (P, 2) of at least ``threshold``, the most alike
    first; ``groups`` of channels that all are, the largest first; ``order`` of all, alike ones together.
    ``pictures`` (G, 3, H, W) of the first groups, one each, and ``maps`` (G, M, h, w), what their first
    channels answer to it, zeros where there are fewer; None where there are no groups.
    """

    layer: str
    measure: str
    threshold: float
    similarity: Tensor
    pairs: Tensor
    groups: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    pictures: Tensor | None = None
    maps: Tensor | None = None

    def panels(self) -> list[list[Panel]]:
        order = list(self.order)
        matrix = colorize(self.similarity[order][:, order] / 2 + 0.5, "RdBu_r")
        groups = [[Panel(enlarge(matrix, max(1, 128 // len(order))), self.lines()[0], is_output=True)]]
        if self.pictures is None or self.maps is None:
            return groups
        for picture, maps, group in zip(self.pictures, self.maps, self.groups, strict=False):
            row = [Panel(picture, f"group of {len(group)}")]
            if maps[0].numel() > 1:
                for answers, channel in zip(maps, group, strict=False):
                    row.append(Panel(overlay(to_display(picture), min_max(answers)), f"channel {channel}"))
            groups.append(row)
        return groups

    def lines(self) -> list[str]:
        found = f"pairs {len(self.pairs)}, groups {len(self.groups)}"
        limit = f"{self.measure} {self.threshold:g} or more"
        head = f"{self.layer}, {len(self.order)} channels: {found} at {limit}"
        return [head, *("group: " + ", ".join(map(str, group)) for group in self.groups)]

    def figure(self) -> Figure:
        """The matrix in the order of the clusters, groups framed, beside pictures of the first groups."""
        from matplotlib.patches import Rectangle

        _, *shown = self.panels()
        figure = charts.new_figure(4.8 if shown else 5.2)
        parts = figure.subfigures(
            1, 1 + bool(shown), squeeze=False, width_ratios=(1.25, 1)[: 1 + bool(shown)]
        )
        left, right = parts[0, 0], parts[0, -1]
        axes, order = left.subplots(), list(self.order)
        matrix = self.similarity[order][:, order].float().cpu().numpy()
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        left.colorbar(image, ax=axes, shrink=0.6, label=self.measure, location="bottom")
        places = {channel: place for place, channel in enumerate(order)}
        for group in self.groups:
            start = min(places[c] for c in group) - 0.5
            frame = Rectangle((start, start), len(group), len(group), fill=False, color="black", linewidth=1)
            axes.add_patch(frame)
        axes.set_xticks([]), axes.set_yticks([])
        if len(order) <= 48:
            axes.set_yticks(range(len(order)), [str(c) for c in order], fontsize=5)
        axes.set_title(self.lines()[0].replace(": ", "\n"), fontsize=8, loc="left", color="0.3")
        if shown:
            grid = right.subplots(len(shown), max(map(len, shown)), squeeze=False)
            for row, panels in zip(grid, shown, strict=True):
                for cell, panel in itertools.zip_longest(row, panels):
                    cell.set_axis_off()
                    if panel is not None:
                        charts.show_image(cell, panel.image, panel.title)
        return figure
