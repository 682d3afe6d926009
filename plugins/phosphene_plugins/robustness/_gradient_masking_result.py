"""``GradientMasking``: the verdicts of the checks for masked gradients, and success rates of attacks."""

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

Verdict = Literal["pass", "suspicious", "inconclusive"]
_COLORS: dict[str, str] = {"pass": "#3a9a5b", "suspicious": "#d1342f", "inconclusive": "#8a8a8a"}
#: Characters per line of a reason in the figure.
_LINE_WIDTH = 72


@dataclass(frozen=True)
class Check:
    """One check: its name, the verdict, the reason in words, and the numbers behind it."""

    name: str
    verdict: Verdict
    reason: str
    numbers: Mapping[str, float]


@dataclass(frozen=True, eq=False, kw_only=True)
class GradientMasking(Result):
    """Checks for masked gradients: ``names``, ``verdicts``, ``reasons`` and ``numbers`` of each.

    ``checks`` lists them one by one; ``masked`` is true if any is suspicious. ``success_by_steps`` (S + 1,)
    is the white-box attack's success rate after each number of steps, ``success_by_eps`` (E,) the one in
    balls of the ``radii``. ``images``, ``adversarial`` (n, C, H, W) in [0, 1] are some of the images and
    the attack's last points; ``names_before``, ``names_after`` their predicted classes.
    """

    groups_per_row: ClassVar[int] = 3

    names: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    reasons: tuple[str, ...]
    numbers: tuple[Mapping[str, float], ...]
    eps: float
    success_by_steps: Tensor
    radii: tuple[float, ...]
    success_by_eps: Tensor
    images: Tensor
    adversarial: Tensor
    names_before: tuple[str, ...]
    names_after: tuple[str, ...]

    @property
    def checks(self) -> list[Check]:
        """The checks one by one."""
        return [
            Check(*row) for row in zip(self.names, self.verdicts, self.reasons, self.numbers, strict=True)
        ]

    @property
    def masked(self) -> bool:
        """Whether any check is suspicious."""
        return "suspicious" in self.verdicts

    def lines(self) -> list[str]:
        return [f"{check.verdict:12}  {check.name}: {check.reason}" for check in self.checks]

    def table(self) -> dict[str, list[Any]]:
        """A row for each check: its name, verdict and reason."""
        return {"check": [*self.names], "verdict": [*self.verdicts], "reason": [*self.reasons]}

    def panels(self) -> list[list[Panel]]:
        examples = zip(self.images, self.names_before, self.adversarial, self.names_after, strict=True)
        return [
            [Panel(image, before), Panel(adversarial, f"-> {after}", is_output=True)]
            for image, before, adversarial, after in examples
        ]

    def draw(self) -> Figure:
        """The verdicts with their reasons, and the success rate over the steps and over the radius."""
        reasons = [textwrap.wrap(check.reason, _LINE_WIDTH) for check in self.checks]
        heights = [max(1, len(lines)) + 0.6 for lines in reasons]
        height = 0.19 * sum(heights)
        figure = new_figure(height + 2.7)
        halves: Any = figure.subfigures(2, 1, height_ratios=(height, 2.7))
        self._draw_verdicts(halves[0].add_axes((0, 0, 1, 1)), reasons, heights)
        left, right = halves[1].subplots(1, 2)
        left.plot(self.success_by_steps.float().cpu(), ".-")
        left.set_xlabel(f"steps (eps = {self.eps:.3g})", size=8)
        left.set_ylabel("success rate", size=8)
        right.semilogx(self.radii, self.success_by_eps.float().cpu(), ".-")
        right.axvline(self.eps, color="0.8", lw=1, zorder=0)
        right.set_xlabel("eps (at 1 the ball holds every image)", size=8)
        for axes in (left, right):
            axes.set_ylim(-0.04, 1.04), axes.tick_params(labelsize=7.5)
            axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
            axes.spines[["top", "right"]].set_visible(False)
        return figure

    def _draw_verdicts(self, axes: Axes, reasons: list[list[str]], heights: list[float]) -> None:
        axes.set_xlim(0, 1), axes.set_ylim(sum(heights), 0)
        axes.set_axis_off()
        top = 0.0
        for check, lines, height in zip(self.checks, reasons, heights, strict=True):
            middle = top + height / 2
            box = {"boxstyle": "round,pad=0.35", "facecolor": _COLORS[check.verdict], "edgecolor": "none"}
            axes.text(
                0.058, middle, check.verdict, ha="center", va="center", size=7.5, color="white", bbox=box
            )
            axes.text(0.125, middle, check.name, va="center", size=8, weight="bold")
            axes.text(0.37, middle, "\n".join(lines), va="center", size=7.5, color="0.25")
            axes.axhline(top, color="0.9", lw=0.6)
            top += height
