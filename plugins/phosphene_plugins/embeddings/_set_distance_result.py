"""How far two sets of pictures are apart, and how it is drawn."""

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
    """How far apart two sets of pictures lie in a model's features.

    ``frechet`` and ``kernel`` the distances, scalars; ``points`` two tensors (N, 2) and (M, 2), the sets on
    their common principal components; ``means`` (2, 3, s, s) their mean pictures, bytes; ``samples``
    some of each, (n, 3, s, s) bytes; ``names`` what they are called.
    """

    frechet: Tensor
    kernel: Tensor
    points: tuple[Tensor, Tensor]
    means: Tensor
    samples: tuple[Tensor, Tensor]
    names: tuple[str, str]

    def panels(self) -> list[list[Panel]]:
        return [
            [
                Panel(
                    charts.frame_thumbnails(mean[None])[0],
                    f"mean of {shorten_title(name, 40)}",
                    is_output=True,
                ),
                Panel(charts.image_grid(charts.frame_thumbnails(some), 8), "some of them"),
            ]
            for mean, some, name in zip(self.means, self.samples, self.names, strict=True)
        ]

    def lines(self) -> list[str]:
        numbers = f"Fréchet distance {float(self.frechet):.4g}, kernel distance {float(self.kernel):.4g}"
        return [f"{numbers} between {' and '.join(self.names)}"]

    def figure(self) -> Figure:
        """Both sets on one map, beside their mean pictures and some of each."""
        figure = charts.new_figure()
        left, right = cast(Sequence[Any], figure.subfigures(1, 2, width_ratios=(1, 1.08)))
        chart = left.subplots()
        # Drawn in turn, so that neither set hides the other.
        names = [shorten_title(f"{n}: {name}", 40) for n, name in enumerate(self.names, 1)]
        owners = [name for name, part in zip(names, self.points, strict=True) for _ in part]
        order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(0)).tolist()
        paint, meaning = charts.label_colors(owners, len(owners))
        points = torch.cat([part.cpu() for part in self.points])
        charts.scatter(chart, points[order], [paint[i] for i in order], meaning)
        chart.set_xlabel("component 1", fontsize=9), chart.set_ylabel("component 2", fontsize=9)
        told = f"Fréchet distance {float(self.frechet):.4g}, kernel distance {float(self.kernel):.4g}"
        chart.set_title(told, fontsize=8, loc="left", color="0.3")
        grid = right.subplots(2, 2, width_ratios=(1, 4))
        for row, mean, some, name in zip(grid, self.means, self.samples, names, strict=True):
            frames = [meaning[name]]
            charts.show_image(row[0], charts.frame_thumbnails(mean[None], frames)[0], "mean")
            charts.show_image(
                row[1], charts.image_grid(charts.frame_thumbnails(some, frames * len(some)), 8), name
            )
        return figure
