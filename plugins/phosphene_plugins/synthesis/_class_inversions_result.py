"""``ClassInversions``, the result of ``deep_inversion``: images of classes, and how typical they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from phosphene.results import Panel, Synthesis


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassInversions(Synthesis):
    """Images of classes ``images`` (N, C, H, W) with the ``probabilities`` (N,) of their classes.

    ``distances`` (B, 2): the distance of each batch's feature statistics from those stored in the network's
    batch norms, at the start and at the end.
    """

    shapes: ClassVar[Mapping[str, str]] = {"probabilities": "N", "distances": "B 2"}

    probabilities: Tensor
    distances: Tensor

    def panels(self) -> list[list[Panel]]:
        """Per image its class and the class's probability."""
        rows = zip(self.images, self.targets, self.probabilities.tolist(), strict=True)
        return [[Panel(image, f"{name}, {p:.0%}", is_output=True)] for image, name, p in rows]

    def lines(self) -> list[str]:
        """The mean distance of the batches' statistics, and the panels."""
        start, end = self.distances.double().mean(0).tolist()
        return [f"distance from the stored statistics: {start:.4g} -> {end:.4g}", *super().lines()]
