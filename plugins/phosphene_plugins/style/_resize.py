"""Image sizes: a limit on the longer side, a factor of both sides, and sizes from coarse to fine."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from phosphene.images import resize


def shrink_to(images: Tensor, longest: int) -> Tensor:
    """The images, shrunk so that no side is longer than ``longest``; smaller ones as they are."""
    return scale_images(images, min(1.0, longest / max(images.shape[2:])))


def scale_images(images: Tensor, factor: float) -> Tensor:
    """The images (N, C, H, W) at ``factor`` times their height and width."""
    height, width = (max(1, round(side * factor)) for side in images.shape[2:])
    return images if factor == 1 else resize(images, (height, width))


def scale_styles(styles: Tensor, content: Tensor, style_scale: float) -> Tensor:
    """The styles, whose longer side is ``style_scale`` times the content's."""
    return scale_images(styles, style_scale * max(content.shape[2:]) / max(styles.shape[2:]))


def coarse_to_fine(
    content: Tensor, styles: Tensor, scales: int, style_scale: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Content and styles at ``scales`` sizes, each twice the last; the finest is the content's own."""
    for scale in reversed(range(scales)):
        scaled = scale_images(content, 2.0**-scale)
        yield scaled, scale_styles(styles, scaled, style_scale)
