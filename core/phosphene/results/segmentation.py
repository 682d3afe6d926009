"""``Segmentation``: masks of objects."""

from __future__ import annotations

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
    """What of each image belongs to the object that a target is about.

    ``images`` (N, C, H, W) in [0, 1]; ``maps`` (N, H, W) what it was found by; ``masks`` (N, H, W) bool;
    ``targets`` what each is about; ``iou`` (N,) in [0, 1], intersection over union with the true mask,
    where that is known.
    """

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
        inside = -F.max_pool2d(-self.masks[:, None].float(), 3, 1, 1)[:, 0] > 0.5
        for n, group in enumerate(groups):
            mask, image = self.masks[n], to_display(self.images[n])
            red = image.new_tensor([1.0, 0.0, 0.2])[:, None, None]
            found = "" if self.iou is None else f"IoU {self.iou[n]:.2f}"
            group.append(Panel(torch.where(mask & ~inside[n], red, image), found))
            group.append(Panel(torch.where(mask, image, 1), "cut out", is_output=True))
        return groups
