"""``Embedding``: features of a data set, and their projections, clusters or outliers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch.nn.functional as F
from torch import Tensor

from ..images import charts
from .base import Panel, Result, shorten_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Largest number of rows of thumbnails beside a chart.
MAX_ROWS = 12


@dataclass(frozen=True, eq=False, kw_only=True)
class Embedding(Result):
    """Features of the N images of a data set; row i of every tensor belongs to the image ``ids[i]``.

    ``features`` (N, D); ``thumbnails`` (N, 3, s, s), bytes; ``labels``: class names, or None. ``points``
    (N, 2 or more): coordinates on the ``axes``; ``clusters`` (N,): cluster numbers, and
    ``center_distances`` (N,): the distances to the clusters' centers. ``metrics``: scalars by name.
    ``layout`` is how figures are arranged: a scatter plot of thumbnails ("map"), a row per cluster, or the
    images of largest coordinates ("outliers").
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "ids": "N",
        "features": "N D",
        "thumbnails": "N 3 s s",
        "labels": "N",
        "points": "N axes",
        "clusters": "N",
        "center_distances": "N",
    }

    ids: tuple[str, ...]
    features: Tensor
    thumbnails: Tensor
    labels: tuple[str, ...] | None = None
    points: Tensor | None = None
    axes: tuple[str, ...] = ()
    clusters: Tensor | None = None
    center_distances: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    layout: Literal["map", "clusters", "outliers"] = "map"

    def panels(self) -> list[list[Panel]]:
        return [[Panel(image, title, is_output=True)] for title, image in self._thumbnail_images()]

    def lines(self) -> list[str]:
        metrics = [f"{name}: {float(value):.4g}" for name, value in self.metrics.items()]
        size = f"{len(self.ids)} images, {self.features.shape[1]} features"
        return [", ".join([size, *metrics]), *(title for title, _ in self._thumbnail_images() if title)]

    def farthest(self, axis: int, count: int = 12) -> list[int]:
        """The rows of largest coordinate on an axis, the largest first."""
        assert self.points is not None
        return self.points[:, axis].sort(descending=True, stable=True).indices[:count].tolist()

    def _thumbnail_images(self) -> list[tuple[str, Tensor]]:
        """Arrangements of thumbnails: titles and images (3, H, W)."""
        colors = None if self.labels is None else charts.label_colors(self.labels, len(self.ids))[0]
        if self.layout == "clusters":
            return self._cluster_rows()
        if self.layout == "outliers" and self.points is not None:
            images = []
            for axis, name in enumerate(self.axes):
                rows = self.farthest(axis)
                far = ", ".join(
                    f"{shorten_title(self.ids[i])} ({self.points[i, axis]:.3g})" for i in rows[:1]
                )
                images.append((f"by {name}: {far}", self._strip(rows, 6, None)))
            return images
        if self.points is None or self.points.shape[1] < 2:
            rows = charts.evenly_spaced(len(self.ids), 100)
            return [("", self._strip(rows, math.ceil(math.sqrt(len(rows))), colors))]
        return [("", charts.thumbnail_scatter(self.thumbnails, self.points, colors))]

    def _strip(self, rows: list[int], columns: int, colors: Sequence[charts.Color] | None) -> Tensor:
        frames = None if colors is None else [colors[i] for i in rows]
        return charts.image_grid(charts.frame_thumbnails(self.thumbnails[rows], frames), columns)

    def _cluster_names(self) -> tuple[str, ...]:
        assert self.clusters is not None
        return tuple(f"cluster {n}" for n in self.clusters.tolist())

    def _cluster_rows(self) -> list[tuple[str, Tensor]]:
        """Per cluster, the largest first: the images nearest to its center, and its most frequent class."""
        assert self.clusters is not None and self.center_distances is not None
        colors = charts.label_colors(self._cluster_names(), len(self.ids))[0]
        images = []
        for cluster, size in Counter(self.clusters.tolist()).most_common():
            inside = (self.clusters == cluster).nonzero()[:, 0]
            rows = inside[self.center_distances[inside].sort(stable=True).indices].tolist()
            title = f"cluster {cluster}: {size}"
            if self.labels is not None:
                name, frequency = Counter(self.labels[i] for i in rows).most_common(1)[0]
                title += f", {frequency / size:.0%} {name}"
            images.append((title, self._strip(rows[:10], 10, colors)))
        return images

    def draw(self) -> Figure:
        """The points beside their thumbnails; without points, the cosine similarities of the features."""
        images = self._thumbnail_images()[:MAX_ROWS]
        figure = charts.new_figure(max(4.8, 0.62 * len(images)))
        left, right = cast(Sequence[Any], figure.subfigures(1, 2, width_ratios=(1, 1.08)))
        chart = left.subplots()
        if self.points is None:
            self._draw_similarity(chart)
        else:
            self._draw_points(chart)
        metrics = [f"{name}: {float(value):.3g}" for name, value in self.metrics.items()]
        groups = [", ".join(metrics[start : start + 3]) for start in range(0, len(metrics), 3)]
        chart.set_title("\n".join(groups), fontsize=8, loc="left", color="0.3")
        for axes, (title, image) in zip(
            right.subplots(len(images), squeeze=False)[:, 0], images, strict=True
        ):
            charts.show_image(axes, image, title)
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
            for row in dict.fromkeys(n for axis in (0, 1) for n in self.farthest(axis, 3)):
                point = self.points[row, :2].tolist()
                chart.annotate(
                    shorten_title(self.ids[row]), point, (4, 3), textcoords="offset points", fontsize=7
                )
        elif not self.axes:
            chart.set_xticks([]), chart.set_yticks([])

    def _draw_similarity(self, chart: Any) -> None:
        """Cosine similarities of the centered features, sorted by class."""
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
                chart.set_yticks(middles, [charts.plain_label(name) for name in sizes], fontsize=8)
                for end in ends[:-1]:
                    chart.axhline(end - 0.5, color="0.2", linewidth=0.5)
                    chart.axvline(end - 0.5, color="0.2", linewidth=0.5)
