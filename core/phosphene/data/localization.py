"""Localization accuracy of attribution maps: the pointing game."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Localization:
    """Fractions of ``count`` maps whose maximum lies in the object, or at most ``radius`` pixels from it.

    ``chance_inside`` and ``chance_near`` are the fractions that a uniformly random position would reach.
    """

    count: int
    radius: int
    inside: float
    near: float
    chance_inside: float
    chance_near: float


def localization(heat: Tensor, masks: Tensor, *, radius: int = 4) -> Localization:
    """The pointing game: ``heat`` (N, H, W), higher is hotter; ``masks`` (N, H, W) bool, the objects."""
    inside, near = peak_hits(heat, masks, radius=radius).cpu().double().mean(0).tolist()
    chances = (float(hits.cpu().double().mean()) for hits in (masks, dilate_masks(masks, radius)))
    return Localization(len(heat), radius, inside, near, *chances)


def peak_hits(heat: Tensor, masks: Tensor, *, radius: int = 4) -> Tensor:
    """Whether each map's maximum lies in the object, and at most ``radius`` pixels from it: (N, 2), 0 or 1.

    Where several pixels share the maximum, the fraction of them that do.
    """
    peaks = heat == heat.amax((1, 2), keepdim=True)
    fractions = [
        (peaks & region).sum((1, 2)) / peaks.sum((1, 2)) for region in (masks, dilate_masks(masks, radius))
    ]
    return torch.stack(fractions, 1)


def dilate_masks(masks: Tensor, radius: int) -> Tensor:
    """(N, H, W) bool: every pixel at most ``radius`` pixels (Euclidean) from the object."""
    steps = torch.arange(-radius, radius + 1, device=masks.device)
    disc = (steps[:, None] ** 2 + steps**2 <= radius**2).float()
    return F.conv2d(masks[:, None].float(), disc[None, None], padding=radius)[:, 0] > 0.5
