"""A network with a map whose units have no center of their own, for oracles."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def dense_map_network() -> tuple[nn.Sequential, Tensor]:
    """A network of images (2, 6, 8), and the weights (2, 3, 4, 2, 6, 8) of its layer "2", a map of 3 x 4.

    Each unit of the map depends on all pixels. In double precision.
    """
    dense = nn.Linear(96, 24).double()
    draw = torch.Generator().manual_seed(0)
    weight = dense.weight.detach().normal_(generator=draw).view(2, 3, 4, 2, 6, 8)
    above = nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(24, 2)
    return nn.Sequential(nn.Flatten(), dense, nn.Unflatten(1, (2, 3, 4)), *above).double(), weight
