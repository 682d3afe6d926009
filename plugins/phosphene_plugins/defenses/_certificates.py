"""``Certificates``: predictions with the radius within which each is proven not to change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from phosphene import Model, Result
from phosphene.images import charts, resize
from phosphene.results import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The most images beside the curve.
_FIGURE_IMAGES = 12


@dataclass(frozen=True, eq=False, kw_only=True)
class Certificates(Result):
    """Predictions with certified radii.

    ``images`` (N, C, H, W) in [0, 1]; ``labels`` (N,) the predicted classes, ``names`` their names;
    ``radius`` (N,) in ``norm`` and pixel units, 0 where nothing is proven; ``abstained`` (N,) bool, where
    no prediction is made or proven. ``vote_share`` (N,) the share of the votes for the prediction, None
    without votes. ``subject`` is the classifier that the proof is about: the model itself, or one derived
    from it.
    """

    per_image: ClassVar[tuple[str, ...]] = ("images", "labels", "names", "radius", "abstained", "vote_share")

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    radius: Tensor
    abstained: Tensor
    norm: Literal["l2", "linf"]
    subject: str
    vote_share: Tensor | None = None

    @classmethod
    def build(
        cls,
        model: Model,
        images: Tensor,
        labels: Tensor,
        radius: Tensor,
        *,
        norm: Literal["l2", "linf"],
        subject: str,
        abstained: Tensor | None = None,
        vote_share: Tensor | None = None,
    ) -> Certificates:
        """Certificates of radii (N,) in double precision; default of ``abstained``: where the radius is 0."""
        return cls(
            images=images,
            labels=labels.to(images.device),
            names=tuple(map(model.class_name, labels.tolist())),
            radius=_round_down(radius, images),
            abstained=(radius == 0 if abstained is None else abstained).to(images.device),
            norm=norm,
            subject=subject,
            vote_share=vote_share,
        )

    def panels(self) -> list[list[Panel]]:
        return [[Panel(image, self._title(n), is_output=True)] for n, image in enumerate(self.images)]

    def _title(self, n: int) -> str:
        outcome = (
            "abstains" if self.abstained[n] else f"{self.norm} {self._radius_text(float(self.radius[n]))}"
        )
        return f"{self.names[n]}: {outcome}"

    def _radius_text(self, radius: float) -> str:
        """The radius, in linf as a number of gray levels, unless it is a small part of one."""
        if self.norm == "linf" and 255 * radius >= 0.01:
            return f"{255 * radius:.2g}/255"
        return f"{radius:.3g}"

    def draw(self) -> Figure:
        """The images with their radii, and the share of predictions proven at each radius."""
        chosen = charts.evenly_spaced(len(self.images), _FIGURE_IMAGES)
        columns = min(4, len(chosen))
        rows = -(-len(chosen) // columns)
        figure = charts.new_figure(max(3.0, 1.35 * rows))
        halves: Any = figure.subfigures(1, 2, width_ratios=[1.2, 1])
        left, right = halves
        title = "predicted class, right or wrong: radius in which it provably stays"
        proven = self.radius[~self.abstained]
        if proven.numel() and float(proven.max()) < 1 / 255:
            # Such a proof is about no other image that a file can hold.
            title += "\nall are below a gray level of one pixel, 1/255 = 0.0039"
        left.suptitle(title, fontsize=8)
        axes = left.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes:
            axis.set_axis_off()
        panels = self.panels()
        for axis, n in zip(axes, chosen, strict=False):
            # Two short lines: a long class name would reach the next image.
            title = charts.plain_label(panels[n][0].title.replace(": ", "\n"), 18)
            charts.show_image(axis, resize(panels[n][0].image, (96, 96)), title)
        self._plot_certified_share(right.subplots())
        return figure

    def _plot_certified_share(self, axes: Axes) -> None:
        """A step down at each image's radius: proven at r are those whose radius is at least r."""
        radii = np.sort(self.radius[~self.abstained].cpu().double().numpy())
        shares = (len(radii) - np.arange(len(radii) + 1)) / len(self.images)
        ends = np.array([0.0, *radii, 1.1 * radii[-1] if len(radii) and radii[-1] > 0 else 1.0])
        in_levels = self.norm == "linf" and 255 * ends[-1] >= 0.01
        ends = 255 * ends if in_levels else ends
        unit = ", in 1/255" if in_levels else ""
        axes.stairs(shares, ends, baseline=None, linewidth=2)
        axes.set(ylim=(0, 1.05), xlim=(0, ends[-1]), xlabel=f"radius ({self.norm}{unit})")
        axes.set_ylabel("share of predictions proven")
        axes.set_title(self.subject, fontsize=8, loc="left")
        axes.spines[["top", "right"]].set_visible(False)


def _round_down(radius: Tensor, like: Tensor) -> Tensor:
    """A radius in another tensor's dtype, never larger: a rounded-up radius would not be proven."""
    rounded = radius.to(like)
    is_larger = (rounded.cpu().double() > radius.cpu()).to(like.device)
    return torch.where(is_larger, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)
