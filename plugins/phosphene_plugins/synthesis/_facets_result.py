"""``Facets``, the result of ``facets``: prototype images of a unit's facets, with examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from phosphene.results import Panel, Synthesis


@dataclass(frozen=True, eq=False, kw_only=True)
class Facets(Synthesis):
    """Facets of units: prototypes ``images`` (K, C, H, W), started at ``sources``, the facets' mean images.

    ``sizes`` (K,) is the number of images in each facet, ``mean_scores`` (K,) their mean score, and
    ``example_counts`` (K,) how many of the ``examples`` (E, C, H, W), with data set ``ids``, belong to each,
    nearest to the facet's center first.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "sizes": "N",
        "mean_scores": "N",
        "examples": "E C p q",
        "example_counts": "N",
        "ids": "E",
    }

    per_image: ClassVar[tuple[str, ...]] = (
        "images",
        "targets",
        "sources",
        "sizes",
        "mean_scores",
        "examples",
        "example_counts",
        "ids",
    )
    groups_per_row: ClassVar[int] = 1

    sources: Tensor
    sizes: Tensor
    mean_scores: Tensor
    examples: Tensor
    example_counts: Tensor
    ids: tuple[str, ...]

    def panels(self) -> list[list[Panel]]:
        """Per facet: the prototype, the mean image and the examples."""
        groups = []
        examples_by_facet = self.examples.split(self.example_counts.tolist())
        for n, examples in enumerate(examples_by_facet):
            score_change = f"{float(self.mean_scores[n]):.3g} -> {float(self.scores[-1, n]):.3g}"
            prototype = Panel(self.images[n], f"{self.targets[n]}: {score_change}", is_output=True)
            source = Panel(self.sources[n], f"mean of its images ({int(self.sizes[n])})")
            groups.append([prototype, source, *map(Panel, examples)])
        return groups
