"""``TransferTable``: how often examples computed on one model fool another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from phosphene.images import charts
from phosphene.results import Panel, Result

from ..models._ensembles import strip_schemes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The number of examples beside the table.
_EXAMPLES = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class TransferTable(Result):
    """How often examples computed on one model fool another.

    ``rates`` (M, M): of the images that models ``names[i]`` and ``names[j]`` both classify correctly, the
    fraction that j misclassifies once they are attacked through i (targeted: of those that neither
    classifies as the target, the fraction that j then does); ``counts`` (M, M): the number of these images.
    ``images`` (N, C, H, W) and ``adversarial`` (M, N, C, H, W), the examples computed on each model, in
    [0, 1]; ``fooled`` (M, M, N) bool.
    """

    groups_per_row: ClassVar[int] = 1

    names: tuple[str, ...]
    rates: Tensor
    counts: Tensor
    images: Tensor
    adversarial: Tensor
    fooled: Tensor

    def panels(self) -> list[list[Panel]]:
        """The examples of the first model that fool the most models."""
        groups = []
        order = self.fooled[0].sum(0).argsort(descending=True, stable=True)[:_EXAMPLES].tolist()
        for n in order:
            title = f"fools {int(self.fooled[0, :, n].sum())} of {len(self.names)}"
            image, attacked = self.images[n], self.adversarial[0, n]
            difference = Panel.difference(image, attacked)
            groups.append([Panel(image, "original"), Panel(attacked, title, is_output=True), difference])
        return groups

    def lines(self) -> list[str]:
        lines = []
        for name, row in zip(self.names, self.rates.tolist(), strict=True):
            rates = [
                f"{strip_schemes(other)} {rate:.0%}" for other, rate in zip(self.names, row, strict=True)
            ]
            lines.append(f"{strip_schemes(name)} -> {', '.join(rates)}")
        return lines

    def table(self) -> dict[str, list[Any]]:
        """A row for each pair of models: the share of images fooled, and the number of images."""
        pairs = [(i, j) for i in range(len(self.names)) for j in range(len(self.names))]
        return {
            "computed_on": [self.names[i] for i, _ in pairs],
            "evaluated_on": [self.names[j] for _, j in pairs],
            "rate": [float(self.rates[pair]) for pair in pairs],
            "images": [int(self.counts[pair]) for pair in pairs],
        }

    def draw(self) -> Figure:
        """The table as a heat map beside some of the examples."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4.4), dpi=150, layout="constrained")
        halves: Any = figure.subfigures(1, 2, width_ratios=(1.5, 1))
        left, right = halves
        axes, rates = left.subplots(), self.rates.float().cpu()
        axes.imshow(rates.numpy(), cmap="Reds", vmin=0, vmax=1)
        for row, column in torch.cartesian_prod(torch.arange(len(rates)), torch.arange(len(rates))).tolist():
            value = float(rates[row, column])
            color = "white" if value > 0.6 else "black"
            text = f"{value:.0%}\nof {int(self.counts[row, column])}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=10)
        names = [charts.plain_label(strip_schemes(name)) for name in self.names]
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel("evaluated on", fontsize=9), axes.set_ylabel("computed on", fontsize=9)
        axes.spines[:].set_visible(False), axes.tick_params(length=0)
        groups = self.panels()
        for cells, group in zip(right.subplots(len(groups), 3, squeeze=False), groups, strict=True):
            for cell, panel in zip(cells, group, strict=True):
                charts.show_image(cell, panel.image, panel.title)
        return figure
