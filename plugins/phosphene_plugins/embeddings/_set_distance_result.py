"""``SetDistance``: Fréchet and kernel distance between two data sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from phosphene.images import charts
from phosphene.results import Panel, Result, shorten_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class SetDistance(Result):
    """Distances between two sets of images in a model's feature space.

    ``frechet`` and ``kernel``: the distances, scalars; ``points``: two tensors (N, 2) and (M, 2), the sets on
    their common principal components; ``mean_thumbnails`` (2, 3, s, s), bytes; ``sample_thumbnails``: two
    tensors (n, 3, s, s), bytes; ``names`` of the sets.
    """

    frechet: Tensor
    kernel: Tensor
    points: tuple[Tensor, Tensor]
    mean_thumbnails: Tensor
    sample_thumbnails: tuple[Tensor, Tensor]
    names: tuple[str, str]

    def panels(self) -> list[list[Panel]]:
        return [
            [
                Panel(
                    charts.frame_thumbnails(mean[None])[0],
                    f"mean of {shorten_title(name, 40)}",
                    is_output=True,
                ),
                Panel(charts.image_grid(charts.frame_thumbnails(samples), 8), "samples"),
            ]
            for mean, samples, name in zip(
                self.mean_thumbnails, self.sample_thumbnails, self.names, strict=True
            )
        ]

    def lines(self) -> list[str]:
        distances = f"Fréchet distance {float(self.frechet):.4g}, kernel distance {float(self.kernel):.4g}"
        return [f"{distances} between {' and '.join(self.names)}"]

    def draw(self) -> Figure:
        """Both sets on their common principal components, beside mean and sample images."""
        figure = charts.new_figure()
        left, right = cast(Sequence[Any], figure.subfigures(1, 2, width_ratios=(1, 1.08)))
        chart = left.subplots()
        names = [shorten_title(f"{n}: {name}", 40) for n, name in enumerate(self.names, 1)]
        owners = [name for name, part in zip(names, self.points, strict=True) for _ in part]
        # Drawn in random order, so that neither set covers the other.
        order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(0)).tolist()
        colors, legend = charts.label_colors(owners, len(owners))
        points = torch.cat([part.cpu() for part in self.points])
        charts.scatter(chart, points[order], [colors[i] for i in order], legend)
        chart.set_xlabel("component 1", fontsize=9), chart.set_ylabel("component 2", fontsize=9)
        title = f"Fréchet distance {float(self.frechet):.4g}, kernel distance {float(self.kernel):.4g}"
        chart.set_title(title, fontsize=8, loc="left", color="0.3")
        grid = right.subplots(2, 2, width_ratios=(1, 4))
        for row, mean, samples, name in zip(
            grid, self.mean_thumbnails, self.sample_thumbnails, names, strict=True
        ):
            frames = [legend[name]]
            charts.show_image(row[0], charts.frame_thumbnails(mean[None], frames)[0], "mean")
            charts.show_image(
                row[1], charts.image_grid(charts.frame_thumbnails(samples, frames * len(samples)), 8), name
            )
        return figure
