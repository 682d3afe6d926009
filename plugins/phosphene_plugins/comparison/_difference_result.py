"""``ModelDifference``: the images on which two models disagree most, with a map of each model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor

from phosphene.images import charts, min_max, overlay, to_display
from phosphene.results import Panel, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The most images in the figure.
MAX_IMAGES = 8


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelDifference(Result):
    """Disagreement of two models on M images, and the k images on which it is largest.

    ``divergences`` (M) of their predictions; ``predictions`` and ``confidences`` (M, 2): the class of each
    model and its probability. ``indices`` (k): the images of largest divergence, the largest first;
    ``images`` (k, C, H, W); ``maps`` (k, 2, H, W): each model's attribution map of its own prediction.
    ``labels`` (k): the images' classes, where the data set has them. ``names``: of both models; ``classes``
    (K); ``agreement``: the share of images for which both predict the same class.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "divergences": "M",
        "predictions": "M 2",
        "confidences": "M 2",
        "ids": "M",
        "indices": "k",
        "images": "k C H W",
        "maps": "k 2 H W",
        "labels": "k",
        "classes": "K",
    }

    names: tuple[str, str]
    measure: str
    divergences: Tensor
    predictions: Tensor
    confidences: Tensor
    ids: tuple[str, ...]
    indices: Tensor
    images: Tensor
    maps: Tensor
    attribution: str
    classes: tuple[str, ...]
    agreement: float
    labels: tuple[str, ...] | None = None

    def panels(self) -> list[list[Panel]]:
        groups = []
        for n, (image, index) in enumerate(zip(self.images, self.indices.tolist(), strict=True)):
            label = "" if self.labels is None else f", {self.labels[n]}"
            row = [Panel(image, f"{float(self.divergences[index]):.3g}{label}")]
            for model, heat in enumerate(min_max(self.maps[n])):
                panel = overlay(to_display(image), heat)
                row.append(Panel(panel, self._prediction(index, model), is_output=True))
            groups.append(row)
        return groups

    def _prediction(self, index: int, model: int) -> str:
        name = self.classes[int(self.predictions[index, model])]
        return f"{float(self.confidences[index, model]):.0%} {name.partition(',')[0]}"

    def lines(self) -> list[str]:
        count = len(self.divergences)
        mean = f"mean divergence ({self.measure}) {float(self.divergences.mean()):.3g}"
        lines = [
            f"{self.names[0]} and {self.names[1]}",
            f"same class for {self.agreement:.1%} of {count} images, {mean}",
        ]
        for n, index in enumerate(self.indices.tolist()):
            label = "" if self.labels is None else f" ({self.labels[n]})"
            both = " / ".join(self._prediction(index, model) for model in (0, 1))
            lines.append(f"{self.ids[index]}{label}: {float(self.divergences[index]):.3g}, {both}")
        return lines

    def draw(self) -> Figure:
        """Each image with both maps, two images in a row; above them the names of the models."""
        groups = self.panels()[:MAX_IMAGES]
        rows = -(-len(groups) // 2)
        figure = charts.new_figure(0.7 + 1.75 * rows)
        head = "\n".join([*self.lines()[:2], f"divergence of each image, {self.attribution} of both models"])
        figure.suptitle(charts.plain_label(head, 72), fontsize=8, x=0.01, ha="left", color="0.3")
        grid = cast(Any, figure.subplots(rows, 6, squeeze=False))
        for axes in grid.flatten():
            axes.set_axis_off()
        for n, group in enumerate(groups):
            for column, panel in enumerate(group):
                axes = grid[n // 2][3 * (n % 2) + column]
                charts.show_image(axes, panel.image, charts.plain_label(panel.title))
        return figure
