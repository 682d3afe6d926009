"""Balls around images: projecting onto them, drawing from them, and the steepest way to climb in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Norm = Literal["linf", "l2", "l1"]


#: Of an l1 step, the share of the numbers that move: the largest of the gradient (Tramèr & Boneh 2019).
_MOVING = 0.01


def project(points: Tensor, images: Tensor, eps: float | Tensor, norm: Norm) -> Tensor:
    """The nearest points of the balls around ``images``, clipped to [0, 1]; never outside, rounding included.

    In "l1" they are the nearest that are in both, which clipping alone would miss. ``points``, ``images``
    (N, C, H, W); ``eps`` one radius or one each, (N, 1, 1, 1).
    """
    radius = torch.as_tensor(eps, dtype=images.dtype, device=images.device)
    # The lengths below are right to some units in the last place.
    radius = radius * (1 - 4 * torch.finfo(images.dtype).eps)
    delta = points - images
    match norm:
        case "linf":
            delta = torch.minimum(torch.maximum(delta, -radius), radius)
        case "l2":
            delta = delta * (radius / torch.maximum(length(delta), radius))
        case "l1":
            delta = _onto_l1(delta, images, radius)
    rounded = (images + delta).clamp(0, 1)
    too_far = (rounded - images).abs() > delta.abs()
    return torch.where(too_far, torch.nextafter(rounded, images), rounded)


def _onto_l1(delta: Tensor, images: Tensor, radius: Tensor) -> Tensor:
    """The nearest changes of absolute sum at most ``radius`` that leave pixels in [0, 1] (Croce & Hein 2021).

    Each is soft-thresholded and ends at the pixel's bound. Their sum grows as the threshold falls: by one
    for each number that is above it, and no more by those that are at the bound.
    """
    sizes, room = delta.abs().flatten(1), torch.where(delta > 0, 1 - images, images).flatten(1)
    marks, order = torch.cat([sizes, (sizes - room).clamp(min=0)], 1).sort(dim=1, descending=True)
    growing = torch.where(order < sizes.shape[1], 1, -1).cumsum(1)[:, :-1]
    sums = (growing * (marks[:, :-1] - marks[:, 1:])).cumsum(1)
    before = F.pad(sums, (1, 0))[:, :-1]
    place = (sums < radius.view(-1, 1)).sum(1, keepdim=True)
    outside = place < sums.shape[1]
    place = place.clamp(max=sums.shape[1] - 1)
    missing = radius.view(-1, 1) - before.gather(1, place)
    threshold = marks.gather(1, place) - missing / growing.gather(1, place).clamp(min=1)
    threshold = torch.where(outside, threshold, 0).clamp(min=0)
    shrunk = torch.minimum((sizes - threshold).clamp(min=0), room).view_as(delta)
    # What rounding left too long is shortened, so that no ball is left by it.
    total = shrunk.flatten(1).sum(1).clamp(min=torch.finfo(delta.dtype).tiny)
    shrunk = shrunk * (radius.view(-1) / total).clamp(max=1).view(-1, 1, 1, 1)
    return delta.sign() * shrunk


def length(vectors: Tensor) -> Tensor:
    """The L2 norm of each image, (N, 1, 1, 1)."""
    # Not torch.norm: in float32 it is wrong by 2e-3 on three million pixels, this by 2e-7.
    return vectors.square().sum((1, 2, 3), keepdim=True).sqrt()


def distance(points: Tensor, images: Tensor, norm: Norm) -> Tensor:
    """How far each point is from its image, (N,)."""
    delta = (points - images).flatten(1)
    match norm:
        case "linf":
            return delta.abs().amax(1)
        case "l2":
            return delta.square().sum(1).sqrt()
    return delta.abs().sum(1)


def steepness(gradient: Tensor, norm: Norm) -> Tensor:
    """By how much a step of unit ``norm`` raises what has this gradient, (N,): the dual norm."""
    match norm:
        case "linf":
            return gradient.abs().sum((1, 2, 3))
        case "l2":  # not the root of a sum of squares, which may overflow or come to nothing
            return (gradient * unit(gradient)).sum((1, 2, 3))
    return gradient.abs().amax((1, 2, 3))


def drawn_back(
    points: Tensor, images: Tensor, norm: Norm, holds: Callable[[Tensor], Tensor], halvings: int
) -> Tensor:
    """Each point inside the smallest ball that bisection finds in which ``holds(points) -> (N,)`` still."""
    low, high = torch.zeros_like(points[:, 0, 0, 0]), distance(points, images, norm)
    nearest = points
    for _ in range(halvings if len(points) else 0):
        middle = (low + high) / 2
        shorter = project(points, images, middle[:, None, None, None], norm)
        held = holds(shorter)
        nearest = torch.where(held[:, None, None, None], shorter, nearest)
        low, high = torch.where(held, low, middle), torch.where(held, middle, high)
    return nearest


def unit(gradient: Tensor) -> Tensor:
    """Each image's gradient at unit L2 length; zero stays zero."""
    largest = gradient.abs().amax((1, 2, 3), keepdim=True)
    # First to about one: the squares of a saturated model's gradient would underflow.
    scaled = gradient / largest.clamp(min=torch.finfo(gradient.dtype).tiny)
    return scaled / length(scaled).clamp(min=1)


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """The direction of unit ``norm`` in which the loss climbs fastest: sign, unit vector, or few numbers.

    In l1 a single number would climb fastest; the largest hundredth of them share the step.
    """
    if norm == "linf":
        return gradient.sign()
    if norm == "l2":
        return unit(gradient)
    sizes = gradient.abs().flatten(1)
    moving = max(1, round(_MOVING * sizes.shape[1]))
    chosen = torch.zeros_like(sizes).scatter_(1, sizes.topk(moving, dim=1).indices, 1.0)
    return gradient.sign() * (chosen / moving).view_as(gradient)


def random_point(images: Tensor, eps: float | Tensor, norm: Norm, generator: Generator) -> Tensor:
    """A uniformly random point of each ball, clipped to [0, 1].

    The offset is one for all, (1, C, H, W), so that no image depends on others. ``eps`` as in ``project``.
    """
    shape = (1, *images.shape[1:])
    if norm == "linf":
        offset = (2 * torch.rand(shape, generator=generator) - 1).to(images) * eps
        return project(images + offset, images, eps, norm)
    if norm == "l2":
        direction = torch.randn(shape, generator=generator)
        direction /= length(direction)
    else:  # exponentials over their sum are uniform on the simplex
        sizes = -torch.rand(shape, generator=generator).clamp(min=1e-30).log()
        direction = sizes / sizes.sum() * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)
    radius = float(torch.rand((), generator=generator)) ** (1 / direction.numel())
    return project(images + direction.to(images) * (radius * eps), images, eps, norm)
