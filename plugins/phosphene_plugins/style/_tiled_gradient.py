"""The style-transfer loss and its gradient computed tile by tile, in bounded memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, NamedTuple, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from phosphene import ModelError, receptive_fields
from phosphene.optimize import PerImage, gram_matrix
from phosphene.spec import ceil, either, param, size

from ._style_loss import StyleLoss, StyleTargets

TileSide: TypeAlias = Annotated[
    int | None,
    Field(ge=16, le=4096, description="longest side of tiles to process one at a time; default: no tiles"),
]

#: Largest number of tiles of an image; a tile may be half as large as ``tile`` allows.
TILE_COUNT = ceil(2 * size.height / either(param.tile, 2 * size.height)) * ceil(
    2 * size.width / either(param.tile, 2 * size.width)
)

#: Loss (N,) of the features (N, C, h, w) at all layers of a ``StyleLoss`` and of the images themselves.
FeatureLoss: TypeAlias = Callable[[list[Tensor], Tensor], Tensor]


class Tile(NamedTuple):
    """A part of an image, and the window around it that its features depend on."""

    #: Rows and columns of the window, in pixels.
    window: tuple[slice, slice]
    #: For each layer, rows and columns of the tile's features in the window's feature map.
    in_window: list[tuple[slice, slice]]
    #: For each layer, rows and columns of the same features in the image's feature map.
    in_image: list[tuple[slice, slice]]


def split_into_tiles(loss_network: StyleLoss, images: Tensor, side: int) -> list[Tile] | None:
    """Tiles of at most ``side`` pixels a side that cover images (N, C, H, W); None where one tile does.

    A window begins at a multiple of the coarsest layer's stride, so that its features equal those of the
    image. Raises ModelError for a layer whose receptive field covers images of any size.
    """
    model, (height, width) = loss_network.model, images.shape[2:]
    layers = loss_network.layers
    strides = [max(1, round(model.input_size[1] / model.map_shape(layer)[1])) for layer in layers]
    step = math.lcm(*strides)
    side = max(step, side // step * step)
    if max(height, width) <= side:
        return None
    # reach: most pixels that a receptive field extends beyond the stride x stride cell of its position.
    probe, reach = min(height, width) // (2 * step) * 2 * step, 0
    for layer, stride in dict(zip(layers, strides, strict=True)).items():
        center = probe // 2 // stride
        box = receptive_fields(model, layer, (probe, probe), [(center, center)])[0].tolist()
        if box == [0, 0, probe, probe]:
            size = f"{probe} pixels or more"
            raise ModelError(
                f"layer {layer!r} has a receptive field of {size}, too large for tiles of {side}"
            )
        reach = max(reach, center * stride - min(box), max(box) - (center + 1) * stride)
    margin = math.ceil(reach / step) * step

    def spans(length: int) -> list[tuple[int, int, int, int]]:
        """Start and end of every tile, and of its window, along one side."""
        cuts = [*range(0, max(1, length - step + 1), side), length]
        return [(a, b, max(0, a - margin), min(length, b + margin)) for a, b in itertools.pairwise(cuts)]

    def feature_slices(span: tuple[int, int, int, int], length: int, stride: int) -> tuple[slice, slice]:
        """A tile's features along one side, in the window's feature map and in the image's."""
        start, end, window_start, _ = span
        stop = None if end == length else end // stride
        window_stop = None if stop is None else stop - window_start // stride
        return slice((start - window_start) // stride, window_stop), slice(start // stride, stop)

    tiles = []
    for down, across in itertools.product(spans(height), spans(width)):
        rows = [feature_slices(down, height, stride) for stride in strides]
        columns = [feature_slices(across, width, stride) for stride in strides]
        pairs = list(zip(rows, columns, strict=True))
        in_window, in_image = ([(r[k], c[k]) for r, c in pairs] for k in (0, 1))
        tiles.append(Tile((slice(*down[2:]), slice(*across[2:])), in_window, in_image))
    return tiles


def tiled_loss(
    loss_network: StyleLoss,
    targets: StyleTargets,
    tiles: Sequence[Tile],
    content_weight: float,
    style_weight: float | Tensor,
    images: Tensor,
) -> Tensor:
    """The loss (N,) of ``neural_style`` and its gradient, tile by tile.

    A Gram matrix is a sum over positions, so a first pass computes all of them. With dL/dG computed the
    gradient is a sum over tiles, too: dL = sum_j <dL/dG_j, d(F_j F_j^T)> / M_j. The value that is returned
    depends on ``images`` linearly, with that gradient.
    """
    pixels = images.detach()
    content_norm = targets.content.square().sum((1, 2, 3)).clamp(min=1e-30)

    def evaluate(tile: Tile, window: Tensor) -> tuple[list[Tensor], Tensor]:
        """The style layers' features in a tile, and its share of the relative content error: (N,)."""
        features = loss_network.features(window)
        features = [f[..., y, x] for f, (y, x) in zip(features, tile.in_window, strict=True)]
        y, x = tile.in_image[-1]
        error = (features[-1] - targets.content[..., y, x]).square().sum((1, 2, 3))
        return features[:-1], error / content_norm

    content_loss = torch.zeros_like(content_norm)
    gram_sums = [content_norm.new_zeros(())] * len(loss_network.weights)
    positions = [0] * len(loss_network.weights)
    with torch.no_grad():
        for tile in tiles:
            features, error = evaluate(tile, pixels[..., *tile.window])
            content_loss = content_loss + error
            gram_sums = [
                s + gram_matrix(f) * f[0, 0].numel() for s, f in zip(gram_sums, features, strict=True)
            ]
            positions = [n + f[0, 0].numel() for n, f in zip(positions, features, strict=True)]
    with torch.enable_grad():
        grams = [(s / n).requires_grad_() for s, n in zip(gram_sums, positions, strict=True)]
        style_loss = style_weight * loss_network.style_loss(grams, targets.style_grams)
        gram_gradients = torch.autograd.grad(style_loss.sum(), grams)
        gradient = torch.zeros_like(pixels)
        for tile in tiles:
            window = pixels[..., *tile.window].clone().requires_grad_()
            features, error = evaluate(tile, window)
            tile_loss = content_weight * error.sum()
            for gram_gradient, f, n in zip(gram_gradients, features, positions, strict=True):
                tile_loss = tile_loss + (gram_gradient * gram_matrix(f)).sum() * (f[0, 0].numel() / n)
            gradient[..., *tile.window] += torch.autograd.grad(tile_loss, window)[0]
    loss = (content_weight * content_loss + style_loss).detach()
    return loss + (gradient * (images - pixels)).sum((1, 2, 3))


def image_loss(loss_network: StyleLoss, loss: FeatureLoss, images: Tensor, tile: int | None) -> PerImage:
    """A loss of features as one of images of the size of ``images``, in tiles where ``tile`` is a number."""
    tiles = None if tile is None else split_into_tiles(loss_network, images, tile)
    if tiles is None:
        return lambda candidates: loss(loss_network.features(candidates), candidates)
    return partial(tiled_feature_loss, loss_network, loss, tiles)


def tiled_feature_loss(
    loss_network: StyleLoss, loss: FeatureLoss, tiles: Sequence[Tile], images: Tensor
) -> Tensor:
    """A loss (N,) of features, with its gradient computed tile by tile.

    A first pass computes the feature maps, tile by tile, which unlike all activations of the network stay in
    memory. With dL/dF computed the gradient is a sum over tiles: dL = sum_j <dL/dF_j, dF_j>. The value that
    is returned depends on ``images`` linearly, with that gradient.
    """
    pixels = images.detach()

    def features_of(tile: Tile, window: Tensor) -> list[Tensor]:
        maps = loss_network.features(window)
        return [f[..., y, x] for f, (y, x) in zip(maps, tile.in_window, strict=True)]

    with torch.no_grad():
        parts = [[f.clone() for f in features_of(tile, pixels[..., *tile.window])] for tile in tiles]
        maps = []
        for j, layer_parts in enumerate(zip(*parts, strict=True)):
            corners = [(y.start, x.start) for y, x in (tile.in_image[j] for tile in tiles)]
            ends = [
                (top + part.shape[2], left + part.shape[3])
                for (top, left), part in zip(corners, layer_parts, strict=True)
            ]
            height, width = (max(sides) for sides in zip(*ends, strict=True))
            complete = layer_parts[0].new_empty(*layer_parts[0].shape[:2], height, width)
            for tile, part in zip(tiles, layer_parts, strict=True):
                complete[..., *tile.in_image[j]] = part
            maps.append(complete)
        del parts
    with torch.enable_grad():
        maps = [complete.requires_grad_() for complete in maps]
        variable = pixels.clone().requires_grad_()
        values = loss(maps, variable)
        *map_gradients, gradient = torch.autograd.grad(values.sum(), [*maps, variable], allow_unused=True)
        gradient = torch.zeros_like(pixels) if gradient is None else gradient.clone()
        for tile in tiles:
            window = pixels[..., *tile.window].clone().requires_grad_()
            products = [
                (f * g[..., *slices]).sum()
                for f, g, slices in zip(
                    features_of(tile, window), map_gradients, tile.in_image, strict=True
                )
                if g is not None
            ]  # fmt: skip
            gradient[..., *tile.window] += torch.autograd.grad(torch.stack(products).sum(), window)[0]
    return values.detach() + (gradient * (images - pixels)).sum((1, 2, 3))
