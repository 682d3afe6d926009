"""Projection of an image onto a hyperplane under the constraint that pixels stay in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from phosphene.attacks import Norm


def project_onto_hyperplane(points: Tensor, normal: Tensor, offset: Tensor, norm: Norm) -> Tensor:
    """The change d (N, C, H, W) of least ``norm`` with <normal, d> = offset (N,) and 0 <= points + d <= 1.

    In "linf" all pixels move equally far, in "l2" in proportion to the normal, until each is at its bound:
    the factor is recomputed for as long as further pixels reach theirs. In "l1" the pixels of the largest
    components of the normal move first, each to its bound. A hyperplane outside the pixel range is
    approached as far as the range allows; a zero normal moves nothing.
    """
    x, oriented = points.flatten(1), (normal * offset.sign()[:, None, None, None]).flatten(1)
    largest = oriented.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1)  # so that no square underflows
    oriented, offset = oriented / scale, offset.abs()[:, None] / scale
    # How far each pixel can move, and by how much <normal, d> grows per unit of that.
    limit, gain = torch.where(oriented > 0, 1 - x, x), oriented.abs()
    if norm == "l1":
        size = _largest_gain_first(limit, gain, offset)
    else:
        size = _all_together(limit, gain, offset, norm)
    return (oriented.sign() * size).view_as(points)


def _all_together(limit: Tensor, gain: Tensor, offset: Tensor, norm: Norm) -> Tensor:
    """min(limit, k speed) for each pixel, with k such that the sum of gain times it is ``offset``."""
    # equivalent mutants: a component of 0 has the sign 0
    speed = gain if norm == "l2" else (gain > 0).to(gain)
    at_limit = speed == 0
    while True:  # at most one iteration for each pixel: a pixel at its limit stays there
        missing = offset - torch.where(at_limit, gain * limit, 0).sum(1, keepdim=True)
        rate = torch.where(at_limit, 0, gain * speed).sum(1, keepdim=True)
        k = torch.where(rate > 0, missing / torch.where(rate > 0, rate, 1), 0).clamp(min=0)
        # equivalent mutants: a pixel exactly at its limit moves as far
        beyond = ~at_limit & (k * speed > limit)
        if not beyond.any():
            return torch.where(at_limit, limit, k * speed)
        at_limit = at_limit | beyond


def _largest_gain_first(limit: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """The limit of the pixels of largest gain, and of the last one only what is still missing."""
    gain, order = gain.sort(dim=1, descending=True, stable=True)
    limit = limit.gather(1, order)
    gained = (gain * limit).cumsum(1) - gain * limit
    # equivalent mutants: a component of 0 has the sign 0
    size = (offset - gained) / torch.where(gain > 0, gain, 1)
    size = torch.minimum(size.clamp(min=0), limit)
    return torch.empty_like(size).scatter_(1, order, size)
