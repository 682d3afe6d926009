"""Features of images that continue periodically beyond their edges."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from phosphene import Model


def feature_maps(model: Model, images: Tensor, layers: Sequence[str], *, periodic: bool) -> list[Tensor]:
    """Feature maps (N, C, h, w) of every layer, in images (N, C, H, W) or in their periodic continuation.

    For the latter, half an image is added at each edge, and the maps are cropped to one period: they do not
    depend on the border where receptive fields are no larger than the image.
    """
    inputs = images
    if periodic:
        strides = [max(1, round(model.input_size[1] / model.map_shape(layer)[1])) for layer in layers]
        step = math.lcm(*strides)
        for axis in (2, 3):
            side = images.shape[axis]
            margin = math.ceil(side / (2 * step)) * step
            index = torch.arange(-margin, side + margin, device=images.device) % side
            inputs = inputs.index_select(axis, index)
    features = zip(model.features_of(inputs, layers), layers, strict=True)
    maps = [model.maps(values, inputs, layer) for values, layer in features]
    if not periodic:
        return maps
    return [_central(m, images, stride) for m, stride in zip(maps, strides, strict=True)]


def _central(maps: Tensor, images: Tensor, stride: int) -> Tensor:
    """One period of the maps of a layer, in the middle."""
    rows, columns = (max(1, round(side / stride)) for side in images.shape[2:])
    top, left = (maps.shape[2] - rows) // 2, (maps.shape[3] - columns) // 2
    return maps[:, :, top : top + rows, left : left + columns]
