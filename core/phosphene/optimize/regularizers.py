"""Image regularizers: L2 norm, total variation, clipping of small contributions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..images.noise import broadcast_color


def l2_penalty(images: Tensor, center: float | Tensor = 0.5) -> Tensor:
    """||I - center||^2 of each image (N,), center a number or a colour (C,): the seed's (lecture 21.6.1)."""
    return (images - broadcast_color(center, images)).square().sum((1, 2, 3))


def total_variation(images: Tensor, beta: float = 2.0) -> Tensor:
    """Sum of (dx^2 + dy^2)^(beta/2) over channels and the (H-1) x (W-1) corners: (N,), beta > 0.

    Differentiable everywhere; where an image is flat the gradient is 0, also for beta < 2.
    Source: Mahendran and Vedaldi 2015 (lecture 21.9).
    """
    corner = images[..., :-1, :-1]
    square = (images[..., :-1, 1:] - corner).square() + (images[..., 1:, :-1] - corner).square()
    steep = square > 0
    # the root's slope at 0 is infinite: keep flat corners out of it, on the way back as well
    power = torch.where(steep, square, 1) ** (beta / 2)
    return torch.where(steep, power, 0).sum((1, 2, 3))


def clip_smallest(
    images: Tensor, percentile: float, center: float | Tensor = 0.5, *, gradient: Tensor | None = None
) -> Tensor:
    """Set the pixels that matter least to center: (N, C, H, W) -> the same.

    A pixel matters by its norm ||x - center|| over the channels or, given the objective's gradient g
    (N, C, H, W), by its contribution |sum_c (x - center) g|; those below that percentile (0 to 100)
    of their own image go. Source: Yosinski et al. 2015.
    """
    away = images - broadcast_color(center, images)
    size = away.norm(dim=1, keepdim=True)
    if gradient is not None:
        size = (away * gradient).sum(1, keepdim=True).abs()
    least = torch.quantile(size.flatten(1), percentile / 100, dim=1).view(-1, 1, 1, 1)
    return torch.where(size < least, broadcast_color(center, images), images)
