"""``RecoveredImages``, the result of ``training_set_recovery``: inversions beside training images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from phosphene.results import Panel, Synthesis


@dataclass(frozen=True, eq=False, kw_only=True)
class RecoveredImages(Synthesis):
    """Inversions of classes ``images`` (N, C, H, W) and the training image most similar to each.

    ``neighbors`` (N, C, H, W) with ``indices`` (N,) and data set ``ids``; ``recovered`` (N,), the similarity
    of the inversion to that training image; ``baseline`` (N,), the similarity of another training image to
    it, the most similar one.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "neighbors": "N C H W",
        "indices": "N",
        "ids": "N",
        "recovered": "N",
        "baseline": "N",
    }

    per_image: ClassVar[tuple[str, ...]] = (
        "images",
        "targets",
        "sources",
        "neighbors",
        "indices",
        "ids",
        "recovered",
        "baseline",
    )
    groups_per_row: ClassVar[int] = 2

    neighbors: Tensor
    indices: Tensor
    ids: tuple[str, ...]
    recovered: Tensor
    baseline: Tensor

    def panels(self) -> list[list[Panel]]:
        """Per image: the inversion, and the training image with the two similarities."""
        rows = zip(self.images, self.targets, self.neighbors, self.ids, strict=True)
        values = zip(self.recovered.tolist(), self.baseline.tolist(), strict=True)
        groups = []
        for (image, name, neighbor, id), (recovered, baseline) in zip(rows, values, strict=True):
            verdict = "recovered" if recovered > baseline else "not recovered"
            similarities = f"similarity {recovered:.2f}, of training images {baseline:.2f}"
            groups.append(
                [
                    Panel(image, f"{name}, from the network", is_output=True),
                    Panel(neighbor, f"nearest training image ({id}), {verdict}: {similarities}"),
                ]
            )
        return groups

    def lines(self) -> list[str]:
        """How many inversions are nearer to a training image than all others are, and the panels."""
        count = int((self.recovered > self.baseline).sum())
        total = len(self.images)
        return [
            f"{count} of {total} are more similar to a training image than any other is",
            *super().lines(),
        ]
