"""Planes: the smallest change that brings a picture onto one, its pixels staying in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from ._lp_balls import Norm


def onto_plane(points: Tensor, slope: Tensor, rise: Tensor, norm: Norm) -> Tensor:
    """The change d (N, C, H, W) of least ``norm`` with <slope, d> = rise (N,) and 0 <= points + d <= 1.

    Every pixel can help as far as its range lets it. In "linf" all go equally far, in "l2" in proportion to
    the slope, until each is at its bound: how far, the plane tells, a new guess for as long as further pixels
    arrive at theirs. In "l1" those go first on which the slope is the steepest. A plane that the range does
    not reach is approached as far as that allows; a zero slope moves nothing.
    """
    x, weight = points.flatten(1), (slope * rise.sign()[:, None, None, None]).flatten(1)
    largest = weight.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1)  # so that no square underflows
    weight, rise = weight / scale, rise.abs()[:, None] / scale
    # What each pixel's range leaves it, and what it is worth to move it.
    room, worth = torch.where(weight > 0, 1 - x, x), weight.abs()
    way = _steepest_first(room, worth, rise) if norm == "l1" else _together(room, worth, rise, norm)
    return (weight.sign() * way).view_as(points)


def _together(room: Tensor, worth: Tensor, rise: Tensor, norm: Norm) -> Tensor:
    """min(room, k speed) for each pixel, with k such that the sum of worth times it is ``rise``."""
    speed = worth if norm == "l2" else (worth > 0).to(worth)
    arrived = speed == 0
    while True:  # at most once for each pixel: those that have arrived stay where they are
        missing = rise - torch.where(arrived, worth * room, 0).sum(1, keepdim=True)
        gain = torch.where(arrived, 0, worth * speed).sum(1, keepdim=True)
        k = torch.where(gain > 0, missing / torch.where(gain > 0, gain, 1), 0).clamp(min=0)
        further = ~arrived & (k * speed > room)
        if not further.any():
            return torch.where(arrived, torch.where(speed > 0, room, 0), k * speed)
        arrived = arrived | further


def _steepest_first(room: Tensor, worth: Tensor, rise: Tensor) -> Tensor:
    """All of the room of those that are worth the most, and of the last one what is still needed."""
    worth, order = worth.sort(dim=1, descending=True, stable=True)
    room = room.gather(1, order)
    gained = (worth * room).cumsum(1) - worth * room
    way = (rise - gained) / torch.where(worth > 0, worth, 1)
    way = torch.where(worth > 0, torch.minimum(way.clamp(min=0), room), 0)
    return torch.empty_like(way).scatter_(1, order, way)
