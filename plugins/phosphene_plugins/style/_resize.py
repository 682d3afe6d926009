"""Image sizes: a limit on the longer side, and a factor of both sides."""

from __future__ import annotations

from torch import Tensor

from phosphene.images import resize


def shrink_to(images: Tensor, longest: int) -> Tensor:
    """The images, shrunk so that no side is longer than ``longest``; smaller ones as they are."""
    return scale_images(images, min(1.0, longest / max(images.shape[2:])))


def scale_images(images: Tensor, factor: float) -> Tensor:
    """The images (N, C, H, W) at ``factor`` times their height and width."""
    height, width = (max(1, round(side * factor)) for side in images.shape[2:])
    return images if factor == 1 else resize(images, (height, width))
