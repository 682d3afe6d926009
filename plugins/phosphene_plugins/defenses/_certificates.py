"""Radii within which an answer is proven to stay, and how they are shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from phosphene import Result
from phosphene.images import charts, resize
from phosphene.results import Panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: The most pictures beside the curve.
_SHOWN = 12


def rounded_down(radius: Tensor, like: Tensor) -> Tensor:
    """A radius in another tensor's precision, never more than it was."""
    found = radius.to(like)
    return torch.where(found.double() > radius, torch.nextafter(found, torch.zeros_like(found)), found)


@dataclass(frozen=True, eq=False, kw_only=True)
class Certificates(Result):
    """How far around each image the answer is proven to stay.

    ``images`` (N, C, H, W) in [0, 1]; ``labels`` (N,) the answers, ``names`` what they are called; ``radius``
    (N,) how far, in ``norm`` and pixel units, 0 where nothing is proven; ``abstained`` (N,) where that is so.
    ``share`` (N,) of the votes that the answer got, where there was a vote. The proof is about
    ``subject``: the model itself, or what was made of it.
    """

    per_image: ClassVar[tuple[str, ...]] = ("images", "labels", "names", "radius", "abstained", "share")

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    radius: Tensor
    abstained: Tensor
    norm: Literal["l2", "linf"]
    subject: str
    share: Tensor | None = None

    def panels(self) -> list[list[Panel]]:
        return [[Panel(image, self._told(n), is_output=True)] for n, image in enumerate(self.images)]

    def _told(self, n: int) -> str:
        told = "abstains" if self.abstained[n] else f"{self.norm} {float(self.radius[n]):.3g}"
        return f"{self.names[n]}: {told}"

    def figure(self) -> Figure:
        """The images with their radii, and beside them how many answers are proven up to which radius."""
        chosen = charts.evenly_spaced(len(self.images), _SHOWN)
        columns = min(4, len(chosen))
        rows = -(-len(chosen) // columns)
        figure = charts.new_figure(max(3.0, 1.35 * rows))
        halves: Any = figure.subfigures(1, 2, width_ratios=[1.2, 1])
        left, right = halves
        axes = left.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes:
            axis.set_axis_off()
        panels = self.panels()
        for axis, n in zip(axes, chosen, strict=False):
            charts.show_image(axis, resize(panels[n][0].image, (96, 96)).clamp(0, 1), panels[n][0].title)
        radii = np.sort(self.radius[~self.abstained].double().cpu().numpy())
        curve = right.subplots()
        # A step down at each image's radius: proven at r are those whose radius is r or more.
        shares = (len(radii) - np.arange(len(radii) + 1)) / len(self.images)
        ends = [0.0, *radii, 1.1 * radii[-1] if len(radii) and radii[-1] > 0 else 1.0]
        curve.stairs(shares, ends, baseline=None, linewidth=2)
        curve.set(ylim=(0, 1.05), xlim=(0, ends[-1]), xlabel=f"radius ({self.norm})")
        curve.set_ylabel("share of answers proven")
        curve.set_title(self.subject, fontsize=8, loc="left")
        curve.spines[["top", "right"]].set_visible(False)
        return figure
