"""What checks for masked gradients found: a verdict for each, why, and how far attacks got."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from phosphene.images.charts import new_figure
from phosphene.results import Panel, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Verdict = Literal["pass", "suspicious", "could not tell"]


_COLOURS: dict[str, str] = {"pass": "#3a9a5b", "suspicious": "#d1342f", "could not tell": "#8a8a8a"}


#: So many letters of a reason fit into a line of the picture.
_WIDTH = 100


@dataclass(frozen=True)
class Check:
    """One check: its name, the verdict, a reason in words, and the numbers that it rests on."""

    name: str
    verdict: Verdict
    reason: str
    numbers: Mapping[str, float]


@dataclass(frozen=True, eq=False, kw_only=True)
class GradientMasking(Result):
    """Whether a model's gradients can be believed: ``names``, ``verdicts``, ``reasons`` and ``numbers``.

    ``checks`` has them row by row; ``masked`` says whether any is suspicious. ``by_steps`` (S + 1,) is the
    share of the images that the white-box attack has fooled the model on after so many steps, ``by_eps`` (E,)
    by the end in balls of the radii ``radii``. ``images``, ``adversarial`` (n, C, H, W) in [0, 1] are some of
    the images and what that attack made of them; ``before``, ``after`` what the model calls them.
    """

    groups_per_row: ClassVar[int] = 3

    names: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    reasons: tuple[str, ...]
    numbers: tuple[Mapping[str, float], ...]
    eps: float
    by_steps: Tensor
    radii: tuple[float, ...]
    by_eps: Tensor
    images: Tensor
    adversarial: Tensor
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def checks(self) -> list[Check]:
        """The checks, one by one."""
        return [
            Check(*row) for row in zip(self.names, self.verdicts, self.reasons, self.numbers, strict=True)
        ]

    @property
    def masked(self) -> bool:
        """Whether anything is suspicious."""
        return "suspicious" in self.verdicts

    def lines(self) -> list[str]:
        return [f"{check.verdict:14}  {check.name}: {check.reason}" for check in self.checks]

    def panels(self) -> list[list[Panel]]:
        told = zip(self.images, self.before, self.adversarial, self.after, strict=True)
        return [
            [Panel(image, before), Panel(attacked, f"-> {after}", is_output=True)]
            for image, before, attacked, after in told
        ]

    def figure(self) -> Figure:
        """The verdicts with their reasons, above how success grows with steps and with the radius."""
        told = [textwrap.wrap(check.reason, _WIDTH) for check in self.checks]
        rows = [max(1, len(lines)) + 0.6 for lines in told]
        height = 0.19 * sum(rows)
        figure = new_figure(height + 2.7)
        halves: Any = figure.subfigures(2, 1, height_ratios=(height, 2.7))
        self._draw_verdicts(halves[0].add_axes((0, 0, 1, 1)), told, rows)
        left, right = halves[1].subplots(1, 2)
        left.plot(self.by_steps.float().cpu(), ".-")
        left.set_xlabel(f"steps (eps = {self.eps:.3g})", size=8)
        left.set_ylabel("images that fool the model", size=8)
        right.semilogx(self.radii, self.by_eps.float().cpu(), ".-")
        right.axvline(self.eps, color="0.8", lw=1, zorder=0)
        right.set_xlabel("eps (at 1 any picture may be made)", size=8)
        for axes in (left, right):
            axes.set_ylim(-0.04, 1.04), axes.tick_params(labelsize=7.5)
            axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
            axes.spines[["top", "right"]].set_visible(False)
        return figure

    def _draw_verdicts(self, axes: Axes, told: list[list[str]], rows: list[float]) -> None:
        axes.set_xlim(0, 1), axes.set_ylim(sum(rows), 0)
        axes.set_axis_off()
        top = 0.0
        for check, lines, room in zip(self.checks, told, rows, strict=True):
            middle = top + room / 2
            box = {"boxstyle": "round,pad=0.35", "facecolor": _COLOURS[check.verdict], "edgecolor": "none"}
            axes.text(
                0.058, middle, check.verdict, ha="center", va="center", size=7.5, color="white", bbox=box
            )
            axes.text(0.125, middle, check.name, va="center", size=8, weight="bold")
            axes.text(0.37, middle, "\n".join(lines), va="center", size=7.5, color="0.25")
            axes.axhline(top, color="0.9", lw=0.6)
            top += room
