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
    (N, k), ``neighbors`` (N, k, C, H, W), ``ids``. The same with ``pixel_`` in pixel space.
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
    }

    images: Tensor
    neighbors: Tensor
    indices: Tensor
    distances: Tensor
    ids: tuple[tuple[str, ...], ...]
    pixel_neighbors: Tensor
    pixel_indices: Tensor
    pixel_distances: Tensor

    def panels(self) -> list[list[Panel]]:
        groups = []
        features, pixels = (self.neighbors, self.distances), (self.pixel_neighbors, self.pixel_distances)
        for n, image in enumerate(self.images):
            for space, (neighbors, distances) in (("features", features), ("pixels", pixels)):
                pairs = zip(neighbors[n], distances[n].tolist(), strict=True)
                panels = [Panel(neighbor, f"{distance:.2f}") for neighbor, distance in pairs]
                groups.append([Panel(image, f"by {space}"), *panels])
        return groups
