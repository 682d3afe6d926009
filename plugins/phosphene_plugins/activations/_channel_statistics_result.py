"""``ChannelStatistics``: activation frequency, class selectivity and background reliance of channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from phosphene.images import charts
from phosphene.results import Panel, Result, shorten_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class ChannelStatistics(Result):
    """Statistics of a layer's C channels over a data set of N images. A channel is active where it is > 0.

    Per channel (C,): ``active_fraction`` of all positions, ``active_image_fraction`` of images with an active
    position, ``mean`` and ``std`` of the activations, class ``selectivity`` and the ``preferred_class`` (an
    index into ``classes``), and ``background_reliance``, the fraction of the positive activation that lies
    on the background, beside ``background_area``, that fraction for a constant map. None where the data set
    has no classes or no masks. ``dead`` and ``always_on`` are channel numbers. Per image (N,):
    ``image_active_fraction`` of the layer's units, and ``ids``.
    """

    layer: str
    active_fraction: Tensor
    active_image_fraction: Tensor
    mean: Tensor
    std: Tensor
    dead: tuple[int, ...]
    always_on: tuple[int, ...]
    image_active_fraction: Tensor
    ids: tuple[str, ...]
    selectivity: Tensor | None = None
    preferred_class: Tensor | None = None
    classes: tuple[str, ...] = ()
    background_reliance: Tensor | None = None
    background_area: Tensor | None = None

    def most_selective(self, count: int = 12) -> list[tuple[int, str, float]]:
        """The channels of largest selectivity: channel number, class name, selectivity."""
        if self.selectivity is None or self.preferred_class is None:
            return []
        values, channels = self.selectivity.sort(descending=True, stable=True)
        names = [self.classes[i] for i in self.preferred_class[channels].tolist()]
        return list(zip(channels.tolist(), names, values.tolist(), strict=True))[:count]

    def table(self) -> dict[str, list[Any]]:
        """A row for each channel of the layer."""
        count = len(self.active_fraction)
        columns: dict[str, list[Any]] = {"channel": list(range(count))}
        for name in ("active_fraction", "active_image_fraction", "mean", "std", "selectivity"):
            if (values := getattr(self, name)) is not None:
                columns[name] = values.cpu().tolist()
        if self.preferred_class is not None:
            columns["preferred_class"] = [self.classes[i] for i in self.preferred_class.tolist()]
        if self.background_reliance is not None:
            columns["background_reliance"] = self.background_reliance.cpu().tolist()
        return columns

    def panels(self) -> list[list[Panel]]:
        heights = torch.linspace(1, 0, 64, device=self.active_fraction.device)[:, None]
        # A bar chart of the sorted values, one pixel column per channel.
        return [
            [Panel((heights > values.sort(descending=True).values)[None].float() * 0.9, name)]
            for name, values in self._channel_values().items()
        ]

    def lines(self) -> list[str]:
        lines = [f"{self.layer}: {len(self.active_fraction)} channels, {len(self.ids)} images"]
        for name, channels in (("dead", self.dead), ("always on", self.always_on)):
            numbers = ", ".join(map(str, channels[:20])) + (", ..." if len(channels) > 20 else "")
            lines.append(f"{name}: {len(channels)}" + (f" ({numbers})" if channels else ""))
        if best := self.most_selective(6):
            lines.append("most selective: " + ", ".join(f"{c} {name} {v:.2f}" for c, name, v in best))
        if self.background_reliance is not None and self.background_area is not None:
            count = int((self.background_reliance > self.background_area).sum())
            area = f"{float(self.background_area):.0%}"
            lines.append(f"background reliance above the background's area ({area}): {count} channels")
        return lines

    def draw(self) -> Figure:
        """Sorted active fractions, selectivity against background reliance, the most selective channels."""
        figure = charts.new_figure(3.6)
        left, middle, right = figure.subplots(1, 3)
        self._draw_active_fraction(left)
        if len(values := self._channel_values()) > 1:
            self._draw_scatter(middle, dict(list(values.items())[-2:]))
        else:
            self._draw_histogram(middle, self.std, "standard deviation", "channels")
        if best := self.most_selective()[::-1]:
            names = [f"{c}: {shorten_title(name)}" for c, name, _ in best]
            right.barh(names, [v for _, _, v in best], color="C0")
            right.set_xlabel("class selectivity", fontsize=8)
        else:
            self._draw_histogram(right, self.image_active_fraction, "fraction active in an image", "images")
        for axes in (left, middle, right):
            axes.tick_params(labelsize=7), axes.spines[["top", "right"]].set_visible(False)
        return figure

    def _channel_values(self) -> dict[str, Tensor]:
        """The statistics of channels that are drawn, by their axis label."""
        values = {
            "fraction active": self.active_fraction,
            "class selectivity": self.selectivity,
            "background reliance": self.background_reliance,
        }
        return {name: value for name, value in values.items() if value is not None}

    def _draw_active_fraction(self, axes: Axes) -> None:
        values, channels = self.active_fraction.float().cpu().sort(descending=True, stable=True)
        axes.fill_between(range(len(values)), values, step="mid", color="C0", alpha=0.35, linewidth=0)
        axes.step(range(len(values)), values, where="mid", color="C0", linewidth=1)
        for name, group, color in (("always on", self.always_on, "C1"), ("dead", self.dead, "C3")):
            ranks = [rank for rank, channel in enumerate(channels.tolist()) if channel in set(group)]
            label = f"{name}: {len(ranks)}"
            axes.scatter(ranks, values[ranks], s=12, color=color, label=label, zorder=3, clip_on=False)
        axes.legend(fontsize=7, frameon=False)
        axes.set_ylim(0, 1), axes.set_ylabel("fraction active", fontsize=8)
        axes.set_xlabel("channels, sorted", fontsize=8)
        title = f"{shorten_title(self.layer, 30)}, {len(self.ids)} images"
        axes.set_title(title, fontsize=8, loc="left", color="0.3")

    def _draw_scatter(self, axes: Axes, values: dict[str, Tensor]) -> None:
        """Two statistics against each other, the most selective and the most background-reliant labeled."""
        (x_name, x), (y_name, y) = values.items()
        charts.scatter(axes, torch.stack([x, y], 1), *charts.label_colors(None, len(x)))
        axes.set_xlabel(x_name, fontsize=8), axes.set_ylabel(y_name, fontsize=8)
        axes.set_ylim(-0.03, 1.08)
        if self.background_area is not None and y_name == "background reliance":
            axes.axhline(float(self.background_area), color="0.5", linewidth=0.8, linestyle="--")
            axes.set_title("dashed: the background's area", fontsize=8, loc="left", color="0.3")
        labeled = dict.fromkeys(channel for channel, _, _ in self.most_selective(4))
        if self.background_reliance is not None:
            labeled[int(self.background_reliance.argmax())] = None
        for channel in labeled:
            point = float(x[channel]), float(y[channel])
            axes.annotate(str(channel), point, (3, 3), textcoords="offset points", fontsize=7)

    def _draw_histogram(self, axes: Axes, values: Tensor, x_label: str, y_label: str) -> None:
        axes.hist(values.float().cpu().numpy(), bins=24, color="C0", alpha=0.6)
        axes.set_xlabel(x_label, fontsize=8), axes.set_ylabel(y_label, fontsize=8)
