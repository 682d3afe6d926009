"""``Segmentation``: masks of objects, with the maps that they were computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images.color import to_display
from .attribution import Attribution
from .base import Panel, Result


@dataclass(frozen=True, eq=False, kw_only=True)
class Segmentation(Result):
    """A mask of the target's object for each image.

    ``images`` (N, C, H, W) in [0, 1]; ``maps`` (N, H, W) the attribution that the masks come from; ``masks``
    (N, H, W) bool, true on the object; ``targets`` the target of each mask; ``iou`` (N,) in [0, 1], the
    intersection over union with the true mask, None without true masks.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "maps": "N H W",
        "masks": "N H W",
        "targets": "N",
        "iou": "N",
    }

    per_image: ClassVar[tuple[str, ...]] = ("images", "maps", "masks", "targets", "iou")
    groups_per_row: ClassVar[int] = 2

    images: Tensor
    maps: Tensor
    masks: Tensor
    targets: tuple[str, ...]
    iou: Tensor | None = None

    def panels(self) -> list[list[Panel]]:
        attribution = Attribution(images=self.images, maps=self.maps, targets=self.targets, layout="map")
        groups = attribution.panels()
        # Erosion by one pixel: what a mask has beyond it is the outline.
        interior = -F.max_pool2d(-self.masks[:, None].float(), 3, 1, 1)[:, 0] > 0.5
        for n, group in enumerate(groups):
            mask, image = self.masks[n], to_display(self.images[n])
            red = image.new_tensor([1.0, 0.0, 0.2])[:, None, None]
            title = "" if self.iou is None else f"IoU {self.iou[n]:.2f}"
            group.append(Panel(torch.where(mask & ~interior[n], red, image), title))
            group.append(Panel(torch.where(mask, image, 1), "cut out", is_output=True))
        return groups
