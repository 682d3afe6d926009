"""``EnsembleReport``: accuracy of an ensemble and its members, each under attacks on every one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from phosphene.images.charts import new_figure, plain_label, show_image
from phosphene.results import Panel, Result

from ..models._ensembles import strip_schemes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Example images in the figure.
_FIGURE_IMAGES = 3


@dataclass(frozen=True, eq=False, kw_only=True)
class EnsembleReport(Result):
    """Accuracy of an ensemble of M members and of each member, clean and under attacks.

    ``accuracy`` (M + 2, M + 1): rows are the clean images, the examples computed on each member, and those
    computed on the ensemble; columns are the members and, last, the ensemble. ``worst_transfer_accuracy``
    is the ensemble's accuracy where the worst of all members' examples counts. ``images`` (N, C, H, W) in
    [0, 1], ``adversarial`` the examples computed on the ensemble, ``success`` (N,) bool whether it
    misclassifies them.
    """

    groups_per_row: ClassVar[int] = 2

    names: tuple[str, ...]
    accuracy: Tensor
    worst_transfer_accuracy: float
    images: Tensor
    adversarial: Tensor
    success: Tensor

    @property
    def member_accuracy(self) -> Tensor:
        """(M,) each member's accuracy under the attack on it."""
        return self.accuracy[1:-1, :-1].diagonal()

    @property
    def transfer_accuracy(self) -> Tensor:
        """(M,) the ensemble's accuracy on the examples computed on each member."""
        return self.accuracy[1:-1, -1]

    @property
    def ensemble_accuracy(self) -> float:
        """The ensemble's accuracy under the attack on it."""
        return float(self.accuracy[-1, -1])

    def _bars(self) -> list[tuple[str, float, float]]:
        """Title, clean accuracy and accuracy under attack."""
        clean = self.accuracy[0].tolist()
        bars = [
            (f"{strip_schemes(name)}, attacked", before, after)
            for name, before, after in zip(self.names, clean, self.member_accuracy.tolist(), strict=False)
        ]
        bars.append(("ensemble, members' examples", clean[-1], self.worst_transfer_accuracy))
        return [*bars, ("ensemble, attacked", clean[-1], self.ensemble_accuracy)]

    def lines(self) -> list[str]:
        return [f"{title}: {before:.0%} -> {after:.0%}" for title, before, after in self._bars()]

    def table(self) -> dict[str, list[Any]]:
        """A row for each set of images and classifier: the accuracy."""
        sets = ["clean", *(f"computed on {name}" for name in self.names), "computed on the ensemble"]
        classifiers = [*self.names, "ensemble"]
        cells = [(r, c) for r in range(len(sets)) for c in range(len(classifiers))]
        return {
            "images": [sets[r] for r, _ in cells],
            "classifier": [classifiers[c] for _, c in cells],
            "accuracy": [float(self.accuracy[cell]) for cell in cells],
        }

    def panels(self) -> list[list[Panel]]:
        titles = ("ensemble: not broken", "ensemble: broken")
        examples = zip(self.images, self.adversarial, self.success.tolist(), strict=True)
        return [
            [
                Panel(image, "original"),
                Panel(adversarial, titles[success], is_output=True),
                Panel.difference(image, adversarial),
            ]
            for image, adversarial, success in examples
        ]

    def draw(self) -> Figure:
        """Bars of clean accuracy and accuracy under attack, and some examples computed on the ensemble."""
        bars = self._bars()
        figure = new_figure(1.2 + 0.42 * max(5, len(bars)))
        halves: Any = figure.subfigures(1, 2, width_ratios=(1.7, 1))
        self._plot_bars(halves[0].subplots(), bars)
        groups = self.panels()[:_FIGURE_IMAGES]
        for cells, group in zip(halves[1].subplots(len(groups), 3, squeeze=False), groups, strict=True):
            for cell, panel in zip(cells, group, strict=True):
                show_image(cell, panel.image, panel.title.replace("ensemble: ", ""))
        return figure

    def _plot_bars(self, axes: Axes, bars: list[tuple[str, float, float]]) -> None:
        positions = range(len(bars))
        axes.barh(positions, [before for _, before, _ in bars], color="0.9", label="clean")
        colors = ["tab:blue"] * len(self.names) + ["tab:orange", "tab:red"]
        axes.barh(positions, [after for *_, after in bars], color=colors, height=0.55)
        for position, (_, before, after) in enumerate(bars):
            axes.text(after + 0.01, position, f"{after:.0%}", va="center", size=8)
            axes.text(before - 0.01, position, f"{before:.0%}", va="center", ha="right", size=7, color="0.55")
        labels = [",\n".join(plain_label(part, 32) for part in title.rsplit(", ", 1)) for title, *_ in bars]
        axes.set_yticks(positions, labels, fontsize=8)
        axes.set_ylim(len(bars) - 0.5, -0.5), axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.set_xlabel("accuracy; gray: without attack")
        axes.spines[["top", "right"]].set_visible(False)
