"""``Neighbors``: nearest neighbors of images by features and by pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Panel, Result


@dataclass(frozen=True, eq=False, kw_only=True)
class Neighbors(Result):
    """The k nearest images of a data set to each of N images, in feature space and in pixel space.

    ``images`` (N, C, H, W): the query images. In feature space, nearest first: ``indices`` and ``distances``
    (N, k), ``neighbors`` (N, k, C, H, W), ``ids``. The same with ``pixel_`` in pixel space. Where the data set's
    features were searched instead of its images, there are only ``thumbnails`` (N, k, 3, s, s), bytes.
    ``recall``: the fraction of the nearest neighbors that an approximate search returned in its test.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "neighbors": "N k C H W",
        "indices": "N k",
        "distances": "N k",
        "ids": "N",
        "pixel_neighbors": "N k C H W",
        "pixel_indices": "N k",
        "pixel_distances": "N k",
        "thumbnails": "N k 3 s s",
    }

    images: Tensor
    neighbors: Tensor | None = None
    indices: Tensor
    distances: Tensor
    ids: tuple[tuple[str, ...], ...]
    pixel_neighbors: Tensor | None = None
    pixel_indices: Tensor | None = None
    pixel_distances: Tensor | None = None
    thumbnails: Tensor | None = None
    recall: float | None = None

    def panels(self) -> list[list[Panel]]:
        groups = []
        nearest = self.thumbnails.float() / 255 if self.thumbnails is not None else self.neighbors
        features, pixels = (nearest, self.distances), (self.pixel_neighbors, self.pixel_distances)
        for n, image in enumerate(self.images):
            for space, (neighbors, distances) in (("features", features), ("pixels", pixels)):
                if neighbors is not None and distances is not None:
                    pairs = zip(neighbors[n], distances[n].tolist(), strict=True)
                    panels = [Panel(neighbor, f"{distance:.2f}") for neighbor, distance in pairs]
                    groups.append([Panel(image, f"by {space}"), *panels])
        return groups

    def lines(self) -> list[str]:
        if self.recall is None:
            return super().lines()
        return [f"approximate search: recall {self.recall:.3f} in its test", *super().lines()]
