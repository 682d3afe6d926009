"""``RobustnessReport``: accuracy against the radius under several attacks, image by image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from phosphene import Result
from phosphene.images import charts
from phosphene.results import Panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: The name of all attacks together in the table and the figure.
WORST_CASE = "worst case"


@dataclass(frozen=True, eq=False, kw_only=True)
class RobustnessReport(Result):
    """The distance of each image's nearest adversarial example under each of several attacks.

    For P images and A attacks: ``correct`` (P,) bool, which are classified correctly without attack;
    ``success`` (A, P) bool, for which an attack has an adversarial example; ``radii`` (A, P) its distance
    in ``norm``, 0 where there is none. Attack a ran on the first ``counts[a]`` images. Of the first E
    images there are the ``images`` (E, C, H, W), their nearest ``adversarial`` examples, the image itself
    where there is none, and the attack of that example, ``broken_by``.
    """

    model: str
    attacks: tuple[str, ...]
    norm: Literal["linf", "l2", "l1"]
    eps: tuple[float, ...]
    correct: Tensor
    success: Tensor
    radii: Tensor
    counts: tuple[int, ...]
    images: Tensor
    adversarial: Tensor
    broken_by: tuple[str, ...]

    def radius(self, attack: str | None = None) -> Tensor:
        """The distance of each image's nearest example by an attack, or by all of them: (n,) or (P,).

        It is 0 for a misclassified image and inf for one without an example. n is the number of images that
        the attack ran on.
        """
        distances = torch.where(self.success, self.radii, torch.inf)
        if attack is None:
            return torch.where(self.correct, distances.amin(0), 0)
        a = self.attacks.index(attack)
        return torch.where(self.correct, distances[a], 0)[: self.counts[a]]

    def accuracy(self, eps: float, attack: str | None = None) -> float:
        """The accuracy under an attack, or under all of them, within ``eps``."""
        return float((self.radius(attack) > eps).cpu().double().mean())

    def lines(self) -> list[str]:
        """A Markdown table of the accuracy at each eps."""
        cells = [["attack", "images", "clean", *map(self._format_radius, self.eps)]]
        for name, count in [*zip(self.attacks, self.counts, strict=True), (WORST_CASE, len(self.correct))]:
            row = [self.accuracy(eps, None if name == WORST_CASE else name) for eps in (0.0, *self.eps)]
            cells.append([name, str(count), *(f"{value:.1%}" for value in row)])
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        padded = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in cells]
        padded.insert(1, ["-" * width for width in widths])
        return [f"| {' | '.join(row)} |" for row in padded]

    def table(self) -> dict[str, list[Any]]:
        """A row for each attack and radius: the accuracy, and the number of images."""
        rows = [
            (name, float(eps), self.accuracy(eps, None if name == WORST_CASE else name), count)
            for name, count in [*zip(self.attacks, self.counts, strict=True), (WORST_CASE, len(self.correct))]
            for eps in (0.0, *self.eps)
        ]
        columns = ("attack", "eps", "accuracy", "images")
        return {name: list(values) for name, values in zip(columns, zip(*rows, strict=True), strict=True)}

    def _format_radius(self, eps: float) -> str:
        return f"{eps * 255:.3g}/255" if self.norm == "linf" else f"{eps:.3g}"

    def panels(self) -> list[list[Panel]]:
        groups = []
        radii = self.radius()
        for n, (image, adversarial, attack) in enumerate(
            zip(self.images, self.adversarial, self.broken_by, strict=True)
        ):
            title = f"{attack} at {self._format_radius(float(radii[n]))}" if attack else "not broken"
            title = title if self.correct[n] else "misclassified before"
            output = Panel(adversarial, title, is_output=True)
            groups.append([Panel(image, "original"), output, Panel.difference(image, adversarial)])
        return groups

    def draw(self) -> Figure:
        """Accuracy over eps for each attack and for all of them, and some examples."""
        groups = self.panels()
        figure = charts.new_figure(max(3.6, 1.3 * len(groups)))
        halves: Any = figure.subfigures(1, 2, width_ratios=(1.5, 1))
        left, right = halves
        axes = left.subplots()
        for name in (*self.attacks, WORST_CASE):
            radii = self.radius(None if name == WORST_CASE else name).cpu().double()
            steps = torch.tensor([0.0, *radii[radii.isfinite()].unique().tolist(), *self.eps]).unique()
            accuracy = (radii[None] > steps[:, None].to(radii)).double().mean(1)
            background = {"color": "0.75", "linewidth": 6, "zorder": 1}
            style: dict[str, Any] = background if name == WORST_CASE else {}
            (line,) = axes.step(steps.numpy(), accuracy.numpy(), where="post", label=name, **style)
            marks = [self.accuracy(eps, None if name == WORST_CASE else name) for eps in self.eps]
            axes.plot(self.eps, marks, "o", color=line.get_color(), markersize=4)
        axes.set(xlim=(0, 1.03 * self.eps[-1]), ylim=(0, 1.03), xlabel=f"eps ({self.norm})")
        axes.set_ylabel("accuracy"), axes.set_title(f"{self.model}, {len(self.correct)} images", fontsize=9)
        axes.set_xticks(self.eps, [self._format_radius(eps) for eps in self.eps], fontsize=7)
        axes.spines[["top", "right"]].set_visible(False), axes.legend(fontsize=8, frameon=False)
        for cells, group in zip(right.subplots(len(groups), 3, squeeze=False), groups, strict=True):
            for cell, panel in zip(cells, group, strict=True):
                charts.show_image(cell, panel.image, panel.title)
        return figure
