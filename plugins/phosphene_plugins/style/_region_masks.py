"""Regions of feature maps: which positions of a layer lie inside a mask, eroded by the receptive field."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phosphene import Model, at_least_float32, receptive_fields
from phosphene.optimize import gram_matrix

#: Longest side of the images in which the extent of receptive fields is measured.
_PROBE_SIDE = 224


def field_reach(model: Model, layer: str, size: tuple[int, int]) -> int:
    """Most pixels that a receptive field of a layer extends beyond the cell (stride x stride) of its unit."""
    height, width = (min(side, _PROBE_SIDE) for side in size)
    _, rows, columns = model.at_size((model.input_size[0], height, width)).map_shape(layer)
    center = (rows // 2, columns // 2)
    top, left, bottom, right = receptive_fields(model, layer, (height, width), [center])[0].tolist()
    down, across = height / rows, width / columns
    extents = (
        center[0] * down - top, bottom - (center[0] + 1) * down,
        center[1] * across - left, right - (center[1] + 1) * across,
    )  # fmt: skip
    return max(0, round(max(extents)))


def erode(masks: Tensor, radius: int) -> Tensor:
    """Masks (N, H, W) without the pixels at most ``radius`` from a pixel outside; borders do not erode."""
    outside = (~masks).to(torch.float32)[:, None]
    for kernel in ((2 * radius + 1, 1), (1, 2 * radius + 1)):
        padding = (kernel[0] // 2, kernel[1] // 2)
        outside = F.max_pool2d(outside, kernel, 1, padding)
    return outside[:, 0] == 0


def region_weights(masks: Tensor, shape: torch.Size) -> Tensor:
    """1 at the positions (N, 1, h, w) of maps of this shape whose cells lie inside the masks, else 0."""
    return (F.adaptive_avg_pool2d(masks[:, None].float(), (shape[-2], shape[-1])) > 1 - 1e-6).float()


def region_gram(features: Tensor, weights: Tensor) -> Tensor:
    """G_r = sum_p m_r(p) F_p F_p^T / sum_p m_r(p) of maps (N, C, h, w), m_r (N, 1, h, w): (N, C, C).

    0 where the region has no positions; ``gram_matrix`` where it has all, with the same rounding.
    """
    if bool(weights.all()):
        return gram_matrix(features)
    features = at_least_float32(features)
    weights = weights.to(features)
    grams = torch.einsum("nchw,ndhw->ncd", features * weights, features)
    return grams / weights.sum((1, 2, 3)).clamp(min=1)[:, None, None]
