"""``Stylization``: stylised images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Panel, Result, side_by_side_frames


@dataclass(frozen=True, eq=False, kw_only=True)
class Stylization(Result):
    """Images in other manners: ``images`` and ``stylized`` (N, 3, H, W) in [0, 1], ``style`` its name.

    ``sources`` (S, 3, H', W') are the pictures whose style it is, where there are such. Of what was painted
    step by step, ``losses`` (steps, N) and ``frames`` as in ``Synthesis``.
    """

    per_image: ClassVar[tuple[str, ...]] = ("images", "stylized")
    per_step: ClassVar[tuple[str, ...]] = ("losses", "frames")
    groups_per_row: ClassVar[int] = 2

    images: Tensor
    stylized: Tensor
    style: str
    sources: Tensor | None = None
    losses: Tensor | None = None
    frames: Tensor | None = None

    def panels(self) -> list[list[Panel]]:
        styles = [] if self.sources is None else list(self.sources)
        names = ["style"] if len(styles) == 1 else [f"style {n}" for n in range(len(styles))]
        sources = [Panel(*style) for style in zip(styles, names, strict=True)]
        return [
            [Panel(image), *sources, Panel(stylized, self.style, is_output=True)]
            for image, stylized in zip(self.images, self.stylized, strict=True)
        ]

    def animation_frames(self) -> list[Tensor]:
        return side_by_side_frames(self.frames)
