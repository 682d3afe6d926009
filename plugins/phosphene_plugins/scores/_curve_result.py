"""``Curves``, the result of ``deletion_insertion``: areas under curves, with the curves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ._score_table import Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class Curves(Scores):
    """Scores that are areas under curves, with the curves.

    ``deletion`` and ``insertion`` (rows, steps + 1) are means over the images, ``fractions`` (steps + 1,) the
    fractions of pixels changed.
    """

    fractions: Tensor
    deletion: Tensor
    insertion: Tensor

    def draw(self) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
        for axis, c, title in zip(figure.subplots(1, 2), (0, 1), ("deletion", "insertion"), strict=True):
            for r, name in enumerate(self.names):
                label = f"{name.replace('_', ' ')}: {self._cell_text(r, c, 0)}"
                axis.plot(self.fractions.cpu(), getattr(self, title)[r].cpu(), label=label)
            better = "higher" if self.higher_is_better[c] else "lower"
            axis.set_title(f"{title} ({better} is better)", fontsize=9)
            axis.set_xlabel("fraction of the pixels", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.legend(fontsize=7, frameon=False)
            axis.spines[["top", "right"]].set_visible(False)
        return figure
