"""``AttentionDistances``: how far each head attends, drawn by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from phosphene.images import charts
from phosphene.results import Panel, Result

from ._tokens import layer_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionDistances(Result):
    """Mean distance between a query and what it attends to, for each of M heads of all layers.

    ``images`` (N, C, H, W); ``distances`` (N, M) in pixels; ``uniform`` (M), the distance if each query
    attended to all patches of its window equally. ``layers`` and ``heads`` (M): the layer and the number of
    each head.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "distances": "N M",
        "uniform": "M",
        "layers": "M",
        "heads": "M",
    }
    per_image: ClassVar[tuple[str, ...]] = ("images", "distances")

    images: Tensor
    distances: Tensor
    uniform: Tensor
    layers: tuple[str, ...]
    heads: tuple[int, ...]

    def panels(self) -> list[list[Panel]]:
        return [
            [Panel(image, ", ".join(f"{name} {value:.3g}" for name, value in self._by_layer(row)))]
            for image, row in zip(self.images, self.distances, strict=True)
        ]

    def lines(self) -> list[str]:
        """The mean distance of each layer's heads over all images."""
        return [f"{name}: {value:.3g} px" for name, value in self._by_layer(self.distances.mean(0))]

    def _by_layer(self, values: Tensor) -> list[tuple[str, float]]:
        return [(layer, float(values[rows].mean())) for layer, rows in layer_rows(self.layers).items()]

    def draw(self) -> Figure:
        from matplotlib.figure import Figure

        rows = layer_rows(self.layers)
        figure = Figure(figsize=(max(4.0, 0.45 * len(rows) + 2), 3.2), dpi=110, layout="constrained")
        axes = figure.subplots()
        mean, uniform = self.distances.float().cpu().mean(0), self.uniform.float().cpu()
        for position, heads in enumerate(rows.values()):
            label = "a head" if position == 0 else None
            axes.scatter([position] * len(heads), mean[heads], s=14, color="C0", alpha=0.7, label=label)
        steps = list(range(len(rows)))
        axes.plot(steps, [float(mean[heads].mean()) for heads in rows.values()], color="C0", label="mean")
        axes.plot(
            steps, [float(uniform[heads].mean()) for heads in rows.values()], "--", color="0.5", lw=1,
            label="uniform attention",
        )  # fmt: skip
        axes.set_xticks(steps, [charts.plain_label(name, 24) for name in rows], rotation=90, fontsize=6)
        axes.set_ylabel("mean distance in pixels", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7, frameon=False)
        axes.tick_params(axis="y", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        return figure
