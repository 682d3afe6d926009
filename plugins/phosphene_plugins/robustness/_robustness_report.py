"""What attacks leave of a model's accuracy, picture by picture, and how that is shown."""

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


#: What the row and the curve of all attacks together are called.
WORST = "worst case"


@dataclass(frozen=True, eq=False, kw_only=True)
class RobustnessReport(Result):
    """How far each picture had to be moved before the model was wrong about it, by each of several attacks.

    Of P pictures ``right`` (P,) tells which the model takes for what they are, ``found`` (A, P) for which an
    attack found an example, and ``radii`` (A, P) how far that is in ``norm``, 0 where there is none. Attack
    a has seen the first ``counts[a]``. Of the first pictures there are the ``images`` (E, C, H, W), their
    nearest ``adversarial`` ones, the image itself where there is none, and by which attack, ``broken_by``.
    """

    model: str
    attacks: tuple[str, ...]
    norm: Literal["linf", "l2", "l1"]
    eps: tuple[float, ...]
    right: Tensor
    found: Tensor
    radii: Tensor
    counts: tuple[int, ...]
    images: Tensor
    adversarial: Tensor
    broken_by: tuple[str, ...]

    def radius(self, attack: str | None = None) -> Tensor:
        """How far each picture withstands an attack, or all of them: 0 where the model is wrong, or infinity.

        (n,) for the pictures that the attack has seen; of all attacks (P,).
        """
        far = torch.where(self.found, self.radii, torch.inf)
        if attack is None:
            return torch.where(self.right, far.amin(0), 0)
        a = self.attacks.index(attack)
        return torch.where(self.right, far[a], 0)[: self.counts[a]]

    def accuracy(self, eps: float, attack: str | None = None) -> float:
        """The share of pictures that withstand an attack, or all of them, within ``eps``."""
        return float((self.radius(attack) > eps).double().mean())

    def lines(self) -> list[str]:
        """The table in words, as Markdown writes one: what is left of the accuracy at each eps."""
        cells = [["attack", "pictures", "clean", *map(self._told, self.eps)]]
        for name, count in [*zip(self.attacks, self.counts, strict=True), (WORST, len(self.right))]:
            row = [self.accuracy(eps, None if name == WORST else name) for eps in (0.0, *self.eps)]
            cells.append([name, str(count), *(f"{value:.1%}" for value in row)])
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        padded = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in cells]
        padded.insert(1, ["-" * width for width in widths])
        return [f"| {' | '.join(row)} |" for row in padded]

    def _told(self, eps: float) -> str:
        return f"{eps * 255:.3g}/255" if self.norm == "linf" else f"{eps:.3g}"

    def panels(self) -> list[list[Panel]]:
        groups = []
        radii = self.radius()
        for n, (image, attacked, by) in enumerate(
            zip(self.images, self.adversarial, self.broken_by, strict=True)
        ):
            told = f"{by} at {self._told(float(radii[n]))}" if by else "withstood"
            told = "wrong already" if not self.right[n] else told
            change = Panel.difference(image, attacked)
            groups.append([Panel(image, "original"), Panel(attacked, told, is_output=True), change])
        return groups

    def figure(self) -> Figure:
        """A curve for each attack and for all, a step down at each picture's radius, and some pictures."""
        groups = self.panels()
        figure = charts.new_figure(max(3.6, 1.3 * len(groups)))
        halves: Any = figure.subfigures(1, 2, width_ratios=(1.5, 1))
        left, right = halves
        axes = left.subplots()
        for name in (*self.attacks, WORST):
            radii = self.radius(None if name == WORST else name).double().cpu()
            place = torch.tensor([0.0, *radii[radii.isfinite()].unique().tolist(), *self.eps]).unique()
            height = (radii[None] > place[:, None].to(radii)).double().mean(1)
            behind = {"color": "0.75", "linewidth": 6, "zorder": 1}
            how: dict[str, Any] = behind if name == WORST else {}
            (line,) = axes.step(place.numpy(), height.numpy(), where="post", label=name, **how)
            marks = [self.accuracy(eps, None if name == WORST else name) for eps in self.eps]
            axes.plot(self.eps, marks, "o", color=line.get_color(), markersize=4)
        axes.set(xlim=(0, 1.03 * self.eps[-1]), ylim=(0, 1.03), xlabel=f"eps ({self.norm})")
        axes.set_ylabel("accuracy"), axes.set_title(f"{self.model}, {len(self.right)} pictures", fontsize=9)
        axes.set_xticks(self.eps, [self._told(eps) for eps in self.eps], fontsize=7)
        axes.spines[["top", "right"]].set_visible(False), axes.legend(fontsize=8, frameon=False)
        for cells, group in zip(right.subplots(len(groups), 3, squeeze=False), groups, strict=True):
            for cell, panel in zip(cells, group, strict=True):
                charts.show_image(cell, panel.image, panel.title)
        return figure
