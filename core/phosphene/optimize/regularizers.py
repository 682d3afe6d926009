"""Image regularizers: L2 penalty, total variation, clipping of small pixels, gradients or contributions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..images.noise import broadcast_color


def l2_penalty(images: Tensor, center: float | Tensor = 0.5) -> Tensor:
    """||I - center||^2 of each image, (N,), for a number or a color (C,) as center (lecture 21.6.1)."""
    return (images - broadcast_color(center, images)).square().sum((1, 2, 3))


def total_variation(images: Tensor, beta: float = 2.0) -> Tensor:
    """Total variation: sum of (dx^2 + dy^2)^(beta/2) over channels and pixels with both neighbors, (N,).

    Differentiable everywhere for beta > 0: where an image is flat the gradient is 0, also for beta < 2.

    Source:
        Mahendran and Vedaldi 2015 (lecture 21.9).
    """
    corner = images[..., :-1, :-1]
    square = (images[..., :-1, 1:] - corner).square() + (images[..., 1:, :-1] - corner).square()
    is_edge = square > 0
    # The power has an infinite slope at 0: flat pixels are replaced before it, or their gradient is NaN.
    power = torch.where(is_edge, square, 1) ** (beta / 2)
    return torch.where(is_edge, power, 0).sum((1, 2, 3))


def clip_smallest(
    images: Tensor, percentile: float, center: float | Tensor = 0.5, *, gradient: Tensor | None = None
) -> Tensor:
    """Set the pixels of smallest norm, or contribution, to center: images (N, C, H, W) of the same shape.

    Clips the pixels below the percentile (0 to 100) of their image, by the norm ||x - center|| over the
    channels or, with the objective's gradient g (N, C, H, W), by the contribution |sum_c (x - center) g|.

    Source:
        Yosinski et al. 2015, section 3.
    """
    offset = images - broadcast_color(center, images)
    importance = offset.norm(dim=1, keepdim=True)
    if gradient is not None:
        importance = (offset * gradient).sum(1, keepdim=True).abs()
    threshold = torch.quantile(importance.flatten(1), percentile / 100, dim=1).view(-1, 1, 1, 1)
    return torch.where(importance < threshold, broadcast_color(center, images), images)


def clip_gradient(images: Tensor, percentile: float) -> Tensor:
    """The images themselves, (N, C, H, W), through which the smallest gradients flow back as zero.

    Clips the gradient of the pixels below the percentile (0 to 100) of their image, by its norm over the
    channels, so that a step of gradient ascent changes the other pixels only.

    Source:
        Lecture 21.6.1; the contribution (gradient times pixel) of Yosinski et al. 2015 is ``clip_smallest``.
    """
    clipped: Tensor = _ClipGradient.apply(images, percentile)
    return clipped


class _ClipGradient(torch.autograd.Function):
    """Identity, with the smallest gradients set to zero."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, percentile: float) -> Tensor:
        ctx.percentile = percentile
        return images.view_as(images)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        norms = gradient.norm(dim=1, keepdim=True)
        threshold = torch.quantile(norms.flatten(1), ctx.percentile / 100, dim=1).view(-1, 1, 1, 1)
        return torch.where(norms < threshold, 0, gradient), None
