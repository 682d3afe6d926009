"""Baseline images: replacements for hidden pixels."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import UnknownName
from .blur import gaussian_blur
from .noise import noise_images

#: Kinds of baseline image.
Baseline = Literal["gray", "zero", "mean", "blur", "noise"]


def baseline_images(images: Tensor, kind: Baseline, *, sigma: float, seed: int | None = None) -> Tensor:
    """Replacement for hidden pixels, of the shape (N, C, H, W) of the images.

    "gray" is 0.5, "zero" black, "mean" each image's mean color, "blur" the image blurred by ``sigma``
    pixels, and "noise" Gaussian noise around 0.5, the same for all images.

    Raises:
        UnknownName: another kind.
    """
    match kind:
        case "gray":
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
