"""``Synthesis``: images made by optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Panel, Result, side_by_side_frames


@dataclass(frozen=True, eq=False, kw_only=True)
class Synthesis(Result):
    """Images made by optimisation: ``images`` (N, C, H, W) in [0, 1], ``scores`` (steps, N), one name each.

    What is made without optimisation has no steps: ``scores`` (0, N). ``sources`` (N, C, H, W) are the
    pictures they were made after, where there are such; ``frames`` (F, N, C, H, W), bytes, how they came
    about, where that was asked for.
    """

    per_image: ClassVar[tuple[str, ...]] = ("images", "targets", "sources")
    per_step: ClassVar[tuple[str, ...]] = ("scores", "frames")
    groups_per_row: ClassVar[int] = 5

    images: Tensor
    scores: Tensor
    targets: tuple[str, ...]
    sources: Tensor | None = None
    frames: Tensor | None = None

    def panels(self) -> list[list[Panel]]:
        groups = [[Panel(i, t, is_output=True)] for i, t in zip(self.images, self.targets, strict=True)]
        if self.sources is None:
            return groups
        return [[Panel(s, "sample"), *group] for s, group in zip(self.sources, groups, strict=True)]

    def animation_frames(self) -> list[Tensor]:
        return side_by_side_frames(self.frames)
