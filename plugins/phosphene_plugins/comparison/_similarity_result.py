"""``LayerSimilarity``: a similarity for every pair of layers of two models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor

from phosphene.images import charts, colorize, enlarge
from phosphene.results import Panel, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerSimilarity(Result):
    """Similarity of the layers of a model (rows) and those of another, or of itself (columns).

    ``similarity`` (P, Q); ``layers`` and ``other_layers`` their names; ``names`` those of the two models;
    ``measure`` the name of the similarity; ``count`` how many images it was computed from.
    """

    shapes: ClassVar[Mapping[str, str]] = {"similarity": "P Q", "layers": "P", "other_layers": "Q"}

    similarity: Tensor
    layers: tuple[str, ...]
    other_layers: tuple[str, ...]
    names: tuple[str, str]
    measure: str
    count: int

    def panels(self) -> list[list[Panel]]:
        matrix = colorize(self.similarity.float().clamp(0, 1), "magma")
        factor = max(1, 160 // max(self.similarity.shape))
        return [[Panel(enlarge(matrix, factor), self.lines()[0], is_output=True)]]

    def lines(self) -> list[str]:
        head = f"{self.measure} of {self.names[0]} and {self.names[1]}, {self.count} images"
        best = self.similarity.max(1)
        rows = zip(self.layers, best.values.tolist(), best.indices.tolist(), strict=True)
        return [head, *(f"{layer}: {value:.3f} {self.other_layers[n]}" for layer, value, n in rows)]

    def draw(self) -> Figure:
        """The matrix, its first layers in the lower left corner, with the names of the layers."""
        figure = charts.new_figure(5.6)
        figure.set_size_inches(6.6, 5.6)
        axes = cast(Any, figure.subplots())
        values = self.similarity.float().cpu().numpy()
        image = axes.imshow(values, cmap="magma", vmin=0, vmax=1, origin="lower", interpolation="nearest")
        figure.colorbar(image, ax=axes, shrink=0.7, label=self.measure)
        labels = [[charts.plain_label(name) for name in names] for names in (self.layers, self.other_layers)]
        axes.set_yticks(range(len(labels[0])), labels[0], fontsize=6)
        axes.set_xticks(range(len(labels[1])), labels[1], fontsize=6, rotation=90)
        axes.set_ylabel(charts.plain_label(self.names[0], 48), fontsize=8)
        axes.set_xlabel(charts.plain_label(self.names[1], 48), fontsize=8)
        if values.size <= 144:
            for (row, column), value in zip(
                [(r, c) for r in range(values.shape[0]) for c in range(values.shape[1])],
                values.flatten(),
                strict=True,
            ):
                color = "black" if value > 0.6 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=6)
        return figure
