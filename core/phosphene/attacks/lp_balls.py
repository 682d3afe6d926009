"""l_p balls around images: projection, random points, distances, steepest directions and dual norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Norm = Literal["linf", "l2", "l1"]

#: The fraction of the components that an l1 step moves: the largest of the gradient (Tramèr & Boneh 2019).
_L1_FRACTION = 0.01


def project(points: Tensor, images: Tensor, eps: float | Tensor, norm: Norm) -> Tensor:
    """The nearest points of the balls around ``images``, clipped to [0, 1]; never outside, rounding included.

    In "l1" they are the nearest points of the intersection of ball and pixel range, which clipping after the
    projection would miss. ``points``, ``images`` (N, C, H, W); ``eps`` one radius, or one for each image,
    (N, 1, 1, 1).
    """
    radius = torch.as_tensor(eps, dtype=images.dtype, device=images.device)
    # The norms below are exact only up to some units of the last digit.
    radius = radius * (1 - 4 * torch.finfo(images.dtype).eps)
    delta = points - images
    match norm:
        case "linf":
            delta = torch.minimum(torch.maximum(delta, -radius), radius)
        case "l2":
            delta = delta * (radius / torch.maximum(l2_norm(delta), radius))
        case "l1":
            delta = _project_l1(delta, images, radius)
    rounded = (images + delta).clamp(0, 1)
    too_far = (rounded - images).abs() > delta.abs()
    return torch.where(too_far, torch.nextafter(rounded, images), rounded)


def _project_l1(delta: Tensor, images: Tensor, radius: Tensor) -> Tensor:
    """The nearest perturbations of l1 norm at most ``radius`` with pixels in [0, 1] (Croce & Hein 2021).

    Each component is soft-thresholded and clipped at the pixel's bound. The norm is piecewise linear in the
    threshold: as it falls, the norm grows by one for each component above it that is not at its bound.
    """
    sizes, margins = delta.abs().flatten(1), torch.where(delta > 0, 1 - images, images).flatten(1)
    knots, order = torch.cat([sizes, (sizes - margins).clamp(min=0)], 1).sort(dim=1, descending=True)
    slopes = torch.where(order < sizes.shape[1], 1, -1).cumsum(1)[:, :-1]
    norms = (slopes * (knots[:, :-1] - knots[:, 1:])).cumsum(1)
    norms_before = F.pad(norms, (1, 0))[:, :-1]
    segment = (norms < radius.view(-1, 1)).sum(1, keepdim=True)
    outside = segment < norms.shape[1]
    segment = segment.clamp(max=norms.shape[1] - 1)
    missing = radius.view(-1, 1) - norms_before.gather(1, segment)
    threshold = knots.gather(1, segment) - missing / slopes.gather(1, segment).clamp(min=1)
    threshold = torch.where(outside, threshold, 0).clamp(min=0)
    shrunk = torch.minimum((sizes - threshold).clamp(min=0), margins).view_as(delta)
    # Scaled to the radius where rounding made the norm larger, so that no point lies outside its ball.
    total = shrunk.flatten(1).sum(1).clamp(min=torch.finfo(delta.dtype).tiny)
    shrunk = shrunk * (radius.view(-1) / total).clamp(max=1).view(-1, 1, 1, 1)
    return delta.sign() * shrunk


def l2_norm(vectors: Tensor) -> Tensor:
    """The l2 norm of each image, (N, 1, 1, 1)."""
    # Not torch.norm: in float32 it is wrong by 2e-3 on three million pixels, this by 2e-7.
    return vectors.square().sum((1, 2, 3), keepdim=True).sqrt()


def per_image(values: Tensor) -> Tensor:
    """One value for each image (N,) as (N, 1, 1, 1), to be multiplied with images."""
    return values[:, None, None, None]


def distance(points: Tensor, images: Tensor, norm: Norm) -> Tensor:
    """The norm of each point's difference from its image, (N,)."""
    delta = (points - images).flatten(1)
    match norm:
        case "linf":
            return delta.abs().amax(1)
        case "l2":
            return delta.square().sum(1).sqrt()
    return delta.abs().sum(1)


def dual_norm(gradient: Tensor, norm: Norm) -> Tensor:
    """The dual norm of each gradient, (N,): the largest increase over a step of unit ``norm``."""
    match norm:
        case "linf":
            return gradient.abs().sum((1, 2, 3))
        case "l2":  # not the root of a sum of squares, which may overflow or underflow
            return (gradient * normalize_l2(gradient)).sum((1, 2, 3))
    return gradient.abs().amax((1, 2, 3))


def shrink_to_boundary(
    points: Tensor, images: Tensor, norm: Norm, succeeds: Callable[[Tensor], Tensor], halvings: int
) -> Tensor:
    """Each point projected onto the smallest ball, by bisection, where ``succeeds(points) -> (N,)``."""
    low, high = torch.zeros_like(points[:, 0, 0, 0]), distance(points, images, norm)
    nearest = points
    for _ in range(halvings if len(points) else 0):
        middle = (low + high) / 2
        shorter = project(points, images, per_image(middle), norm)
        success = succeeds(shorter)
        nearest = torch.where(per_image(success), shorter, nearest)
        low, high = torch.where(success, low, middle), torch.where(success, middle, high)
    return nearest


def normalize_l2(gradient: Tensor) -> Tensor:
    """Each image's gradient divided by its l2 norm; zero stays zero."""
    largest = gradient.abs().amax((1, 2, 3), keepdim=True)
    # Scaled to a maximum of 1 first: the squares of a saturated model's gradient would underflow.
    scaled = gradient / largest.clamp(min=torch.finfo(gradient.dtype).tiny)
    return scaled / l2_norm(scaled).clamp(min=1)


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """The direction of unit ``norm`` in which the loss grows fastest: sign, unit vector, or sparse sign.

    In "l1" a single component would be steepest; here the largest hundredth of them share the step.
    """
    if norm == "linf":
        return gradient.sign()
    if norm == "l2":
        return normalize_l2(gradient)
    sizes = gradient.abs().flatten(1)
    count = max(1, round(_L1_FRACTION * sizes.shape[1]))
    selected = torch.zeros_like(sizes).scatter_(1, sizes.topk(count, dim=1).indices, 1.0)
    return gradient.sign() * (selected / count).view_as(gradient)


def random_point(images: Tensor, eps: float | Tensor, norm: Norm, generator: Generator) -> Tensor:
    """A uniformly random point of each ball, clipped to [0, 1].

    All images share one offset, (1, C, H, W), so that no image depends on others. ``eps`` as in ``project``.
    """
    shape = (1, *images.shape[1:])
    if norm == "linf":
        offset = (2 * torch.rand(shape, generator=generator) - 1).to(images) * eps
        return project(images + offset, images, eps, norm)
    if norm == "l2":
        direction = torch.randn(shape, generator=generator)
        direction /= l2_norm(direction)
    else:  # exponentials over their sum are uniform on the simplex
        sizes = -torch.rand(shape, generator=generator).clamp(min=1e-30).log()
        direction = sizes / sizes.sum() * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)
    radius = float(torch.rand((), generator=generator)) ** (1 / direction.numel())
    return project(images + direction.to(images) * (radius * eps), images, eps, norm)
