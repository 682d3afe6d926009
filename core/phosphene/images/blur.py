"""Gaussian blur."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of images (N, C, H, W), sigma in pixels: SciPy's ``gaussian_filter``, mode "reflect"."""
    radius = int(4 * sigma + 0.5)
    if radius == 0:
        return images
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    weights = torch.exp(-0.5 * (offsets.to(images.dtype) / sigma) ** 2)
    kernel = (weights / weights.sum()).view(1, 1, 1, -1)
    planes = images.reshape(-1, 1, *images.shape[-2:])
    for _ in range(2):  # horizontally, then vertically: each pass transposes
        width = planes.shape[-1]
        index = torch.arange(-radius, width + radius, device=images.device) % (2 * width)
        index = torch.minimum(index, 2 * width - 1 - index)
        planes = F.conv2d(planes.index_select(-1, index), kernel).transpose(-2, -1)
    return planes.reshape(images.shape)
