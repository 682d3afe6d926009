"""``Embedding``: features or their projection to two dimensions."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor

from ..images import charts
from .base import Panel, Result, shorten_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from .patches import _ROWS


@dataclass(frozen=True, eq=False, kw_only=True)
class Embedding(Result):
    """Pictures of a data set as points of a feature space; row i of everything is the picture ``ids[i]``.

    ``features`` (N, D); ``thumbnails`` (N, 3, s, s) bytes; ``labels`` where they are known. ``points``
    (N, 2 or more) are where a picture lies on the ``axes``; ``clusters`` (N,) which one it is in, and
    ``centrality`` (N,) how far from its middle. ``numbers`` are scalars, by what was measured.
    ``layout`` says how it is drawn: a map; rows of every cluster; those far out on either axis.
    """

    ids: tuple[str, ...]
    features: Tensor
    thumbnails: Tensor
    labels: tuple[str, ...] | None = None
    points: Tensor | None = None
    axes: tuple[str, ...] = ()
    clusters: Tensor | None = None
    centrality: Tensor | None = None
    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    layout: Literal["map", "clusters", "outliers"] = "map"

    def panels(self) -> list[list[Panel]]:
        return [[Panel(picture, title, is_output=True)] for title, picture in self._sheets()]

    def lines(self) -> list[str]:
        numbers = [f"{name}: {float(value):.4g}" for name, value in self.numbers.items()]
        size = f"{len(self.ids)} pictures, {self.features.shape[1]} features"
        return [", ".join([size, *numbers]), *(title for title, _ in self._sheets() if title)]

    def farthest(self, axis: int, most: int = 12) -> list[int]:
        """The rows that lie farthest out on an axis, the farthest first."""
        assert self.points is not None
        return self.points[:, axis].sort(descending=True, stable=True).indices[:most].tolist()

    def _sheets(self) -> list[tuple[str, Tensor]]:
        """What is to be seen of the thumbnails: titles and pictures (3, H, W)."""
        paint = None if self.labels is None else charts.label_colors(self.labels, len(self.ids))[0]
        if self.layout == "clusters":
            return self._cluster_rows()
        if self.layout == "outliers" and self.points is not None:
            sheets = []
            for axis, name in enumerate(self.axes):
                rows = self.farthest(axis)
                far = ", ".join(
                    f"{shorten_title(self.ids[i])} ({self.points[i, axis]:.3g})" for i in rows[:1]
                )
                sheets.append((f"by {name}: {far}", self._strip(rows, 6, None)))
            return sheets
        if self.points is None or self.points.shape[1] < 2:
            rows = charts.evenly_spaced(len(self.ids), 100)
            return [("", self._strip(rows, math.ceil(math.sqrt(len(rows))), paint))]
        return [("", charts.thumbnail_scatter(self.thumbnails, self.points, paint))]

    def _strip(self, rows: list[int], columns: int, paint: Sequence[charts.Color] | None) -> Tensor:
        frames = None if paint is None else [paint[i] for i in rows]
        return charts.image_grid(charts.frame_thumbnails(self.thumbnails[rows], frames), columns)

    def _cluster_names(self) -> tuple[str, ...]:
        assert self.clusters is not None
        return tuple(f"cluster {n}" for n in self.clusters.tolist())

    def _cluster_rows(self) -> list[tuple[str, Tensor]]:
        """Every cluster, the largest first: those in its middle, and what they are."""
        assert self.clusters is not None and self.centrality is not None
        paint = charts.label_colors(self._cluster_names(), len(self.ids))[0]
        sheets = []
        for cluster, size in Counter(self.clusters.tolist()).most_common():
            inside = (self.clusters == cluster).nonzero()[:, 0]
            rows = inside[self.centrality[inside].sort(stable=True).indices].tolist()
            title = f"cluster {cluster}: {size}"
            if self.labels is not None:
                name, most = Counter(self.labels[i] for i in rows).most_common(1)[0]
                title += f", {most / size:.0%} {name}"
            sheets.append((title, self._strip(rows[:10], 10, paint)))
        return sheets

    def figure(self) -> Figure:
        """The points beside their thumbnails; without points, how alike the pictures are."""
        sheets = self._sheets()[:_ROWS]
        figure = charts.new_figure(max(4.8, 0.62 * len(sheets)))
        left, right = cast(Sequence[Any], figure.subfigures(1, 2, width_ratios=(1, 1.08)))
        chart = left.subplots()
        if self.points is None:
            self._draw_likeness(chart)
        else:
            self._draw_points(chart)
        numbers = [f"{name}: {float(value):.3g}" for name, value in self.numbers.items()]
        groups = [", ".join(numbers[start : start + 3]) for start in range(0, len(numbers), 3)]
        chart.set_title("\n".join(groups), fontsize=8, loc="left", color="0.3")
        for axes, (title, picture) in zip(
            right.subplots(len(sheets), squeeze=False)[:, 0], sheets, strict=True
        ):
            charts.show_image(axes, picture, title)
        return figure

    def _draw_points(self, chart: Any) -> None:
        assert self.points is not None
        labels = self.labels
        if self.layout == "clusters" and self.clusters is not None:
            labels = self._cluster_names()
        points = self.points if self.points.shape[1] > 1 else self.points.expand(-1, 2)
        charts.scatter(chart, points, *charts.label_colors(labels, len(points)))
        for name, label in zip(self.axes, (chart.set_xlabel, chart.set_ylabel), strict=False):
            label(name, fontsize=9)
        if self.layout == "outliers":
            for place in dict.fromkeys(n for axis in (0, 1) for n in self.farthest(axis, 3)):
                where = self.points[place, :2].tolist()
                chart.annotate(
                    shorten_title(self.ids[place]), where, (4, 3), textcoords="offset points", fontsize=7
                )
        elif not self.axes:
            chart.set_xticks([]), chart.set_yticks([])

    def _draw_likeness(self, chart: Any) -> None:
        """The cosine between every two pictures' features, their mean taken off, class by class."""
        rows = charts.evenly_spaced(len(self.ids), 600)
        if self.labels is not None:
            rows.sort(key=lambda i: self.labels[i])  # type: ignore[index]
        features = self.features[rows].float().cpu()
        features = F.normalize(features - features.mean(0))
        image = chart.imshow(
            (features @ features.T).numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="antialiased"
        )
        chart.figure.colorbar(image, ax=chart, shrink=0.6, label="cosine of features", location="bottom")
        chart.set_xticks([]), chart.set_yticks([])
        if self.labels is not None:
            sizes = Counter(self.labels[i] for i in rows)
            ends = list(itertools.accumulate(sizes.values()))
            if len(ends) <= 20:
                middles = [end - size / 2 for end, size in zip(ends, sizes.values(), strict=True)]
                chart.set_yticks(middles, list(sizes), fontsize=8)
                for end in ends[:-1]:
                    chart.axhline(end - 0.5, color="0.2", linewidth=0.5)
                    chart.axvline(end - 0.5, color="0.2", linewidth=0.5)
