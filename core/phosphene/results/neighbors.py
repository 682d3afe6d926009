"""``Neighbors``: nearest neighbours of queries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Panel, Result


@dataclass(frozen=True, eq=False, kw_only=True)
class Neighbors(Result):
    """The nearest pictures of a data set in feature space, and beside them in raw pixels.

    ``images`` (N, C, H, W) the queries; ``indices``, ``distances`` (N, k), nearest first;
    ``neighbors`` (N, k, C, H, W). The same with ``pixel_`` for the comparison in pixel space.
    """

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
            for what, (found, far) in (("features", features), ("pixels", pixels)):
                near = [Panel(f, f"{d:.2f}") for f, d in zip(found[n], far[n].tolist(), strict=True)]
                groups.append([Panel(image, f"by {what}"), *near])
        return groups
