"""Does a map point at the object? Peaks counted against the bundled scenes' own truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Localization:
    """Fractions of ``count`` maps whose highest place lies in the object, or at most ``radius`` pixels off.

    The ``chance`` of each is what a peak thrown anywhere in the picture would score.
    """

    count: int
    radius: int
    inside: float
    near: float
    chance_inside: float
    chance_near: float


def localization(heat: Tensor, masks: Tensor, *, radius: int = 4) -> Localization:
    """The pointing game: ``heat`` (N, H, W), higher is hotter; ``masks`` (N, H, W) bool, the objects."""
    grown = dilated(masks, radius)
    peaks = heat.flatten(1).argmax(1, keepdim=True)
    hits = [places.flatten(1).gather(1, peaks) for places in (masks, grown)]
    return Localization(len(heat), radius, *(float(t.double().mean()) for t in (*hits, masks, grown)))


def dilated(masks: Tensor, radius: int) -> Tensor:
    """(N, H, W) bool: every pixel at most ``radius`` pixels (Euclidean) from the object."""
    steps = torch.arange(-radius, radius + 1, device=masks.device)
    disc = (steps[:, None] ** 2 + steps**2 <= radius**2).float()
    return F.conv2d(masks[:, None].float(), disc[None, None], padding=radius)[:, 0] > 0.5
