"""``Synthesis``: images synthesized by optimization, with the objective at every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from .base import Panel, Result, side_by_side_frames


@dataclass(frozen=True, eq=False, kw_only=True)
class Synthesis(Result):
    """Synthesized images.

    ``images`` (N, C, H, W) in [0, 1], with a name in ``targets`` each; ``scores`` (steps, N), the objective
    at every step, (0, N) without optimization; ``sources`` (N, C, H, W), the samples or
    inputs that they were computed from, if any; ``frames`` (F, N, C, H, W), uint8, the images during the
    optimization, and ``alpha`` (N, H, W) in [0, 1], the images' opacity, if any were asked for. ``layout``
    (R, K) is the number of the image in every cell of the figure, for images that form a grid.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "scores": "steps N",
        "targets": "N",
        "sources": "N c h w",
        "frames": "F N C p q",
        "alpha": "N H W",
        "layout": "R K",
    }

    per_image: ClassVar[tuple[str, ...]] = ("images", "targets", "sources", "alpha")
    per_step: ClassVar[tuple[str, ...]] = ("scores", "frames")
    groups_per_row: ClassVar[int] = 5

    images: Tensor
    scores: Tensor
    targets: tuple[str, ...]
    sources: Tensor | None = None
    frames: Tensor | None = None
    alpha: Tensor | None = None
    layout: Tensor | None = None

    def on_background(self, background: float = 1.0) -> Tensor:
        """Images (N, C, H, W) blended by their opacity with a gray level in [0, 1]; unchanged without one."""
        if self.alpha is None:
            return self.images
        alpha = self.alpha[:, None].to(self.images)
        return alpha * self.images + (1 - alpha) * background

    def panels(self) -> list[list[Panel]]:
        """Per image: its source, if any, the image, and the image on white, if it has an opacity."""
        groups = [
            [Panel(image, name, is_output=True)]
            for image, name in zip(self.images, self.targets, strict=True)
        ]
        if self.alpha is not None:
            groups = [
                [*group, Panel(image, "only what the score depends on", is_output=True)]
                for group, image in zip(groups, self.on_background(), strict=True)
            ]
        if self.sources is None:
            return groups
        return [[Panel(s, "sample"), *group] for s, group in zip(self.sources, groups, strict=True)]

    def rows(self) -> list[list[Panel]]:
        """The rows of the figure: those of ``layout``, else five images each."""
        if self.layout is None:
            return super().rows()
        groups = self.panels()
        return [[panel for n in row for panel in groups[n]] for row in self.layout.tolist()]

    def select(self, rows: Sequence[int]) -> Self:
        """The result of some images alone: their rows, in this order, without a layout."""
        return dataclasses.replace(super().select(rows), layout=None)

    def animation_frames(self) -> list[Tensor]:
        return side_by_side_frames(self.frames)
