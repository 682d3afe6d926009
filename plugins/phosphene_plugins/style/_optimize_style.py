"""Painting by descent on the pixels: what neural style and its sweeps share."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, NonNegativeFloat
from torch import Tensor

from phosphene import InputError, Reference
from phosphene.images import resize
from phosphene.optimize import Optimization, PixelImage, gram_matrix, optimize_image
from phosphene.optimize import total_variation as variation
from phosphene.roles import LayerName

from ._style_loss import Aim, Perception, relative
from ._tiled_gradient import by_tiles, tiles

GATYS = Reference(
    key="gatys2016",
    title="Image Style Transfer Using Convolutional Neural Networks",
    authors="Gatys, Ecker, Bethge",
    year=2016,
    url="https://openaccess.thecvf.com/content_cvpr_2016/html/Gatys_Image_Style_Transfer_CVPR_2016_paper.html",
)


Blend: TypeAlias = Annotated[
    list[NonNegativeFloat] | None, Field(description="gamma_s: each style's share, of their sum; all alike")
]


ContentLayer: TypeAlias = Annotated[LayerName | None, Field(description="phi; the middle stage")]


StyleLayers: TypeAlias = Annotated[list[LayerName] | None, Field(description="the G_j; every stage")]


def paint(
    look: Perception,
    start: Tensor,
    aim: Aim,
    *,
    content_weight: float,
    style_weight: float | Tensor,
    total_variation: float = 0.0,
    tile: int | None = None,
    steps: int,
    optimizer: Literal["lbfgs", "adam"] = "lbfgs",
    lr: float | None = None,
    frames: int = 0,
) -> Optimization:
    """Descend from ``start`` (N, C, H, W) to an aim; the style may have a weight (N,) for each image."""

    def loss(images: Tensor) -> Tensor:
        *styles, content = look.maps(images)
        style = look.style_loss([gram_matrix(f) for f in styles], aim)
        return content_weight * relative(content, aim.content) + style_weight * style

    def roughness(images: Tensor) -> Tensor:
        return total_variation * variation(images) / images[0, 0].numel()

    parts = None if tile is None else tiles(look, start, tile)
    return optimize_image(
        loss if parts is None else partial(by_tiles, look, aim, parts, content_weight, style_weight),
        PixelImage(start),
        steps=steps,
        lr=lr or (1.0 if optimizer == "lbfgs" else 0.02),
        optimizer=optimizer,
        maximize=False,
        regularizer=roughness if total_variation else None,
        frames=frames,
    )


def shares_of(blend: list[float] | None, styles: Tensor) -> Tensor:
    """gamma (S,): the blend over its sum. Raises InputError where it does not fit the styles."""
    shares = styles.new_tensor([1.0] * len(styles) if blend is None else blend)
    if len(shares) != len(styles) or not shares.sum() > 0:
        raise InputError(f"{len(styles)} styles need one share each, some above zero, not {blend}")
    return shares / shares.sum()


def called(shares: Tensor) -> str:
    """What a picture painted in these shares (S,) of some styles is called."""
    if len(shares) == 1:
        return "in the style"
    return " + ".join(f"{share:.0%} of style {n}" for n, share in enumerate(shares.tolist()) if share)


def at_most(images: Tensor, longest: int) -> Tensor:
    """The images, where they are larger shrunk to that longer side."""
    return resized(images, min(1.0, longest / max(images.shape[2:])))


def resized(images: Tensor, factor: float) -> Tensor:
    """The images at so many times their size."""
    height, width = (max(1, round(side * factor)) for side in images.shape[2:])
    return images if factor == 1 else resize(images, (height, width))
