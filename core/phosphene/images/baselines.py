"""Baseline images: what replaces hidden pixels."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import UnknownName
from .blur import gaussian_blur
from .noise import noise_images

#: What stands in for hidden pixels.
Baseline = Literal["grey", "zero", "mean", "blur", "noise"]


def baseline_images(images: Tensor, kind: Baseline, *, sigma: float, seed: int | None = None) -> Tensor:
    """What stands in for hidden pixels, (N, C, H, W) like the images.

    Mid-grey, zero (black), each picture's mean colour, its blur by ``sigma`` pixels, or noise about
    mid-grey, the same for all images.
    """
    match kind:
        case "grey":
            return torch.full_like(images, 0.5)
        case "zero":
            return torch.zeros_like(images)
        case "mean":
            return images.mean((2, 3), keepdim=True).expand_as(images)
        case "blur":
            return gaussian_blur(images, sigma)
        case "noise":
            return noise_images(images.shape, seed=seed, sd=0.3).to(images)
    raise UnknownName("baseline", kind, get_args(Baseline))
