"""Small networks on which attributions have a closed form, for the oracles of the family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from phosphene import Model, load_model

#: Not 0 and 1, and different for each channel: an oracle then notices a confusion of pixels with what the
#: network receives.
NORMALIZATION: dict[str, Any] = {"mean": [0.375, 0.5, 0.625], "std": [0.25, 0.5, 0.75]}


def pooled_network() -> tuple[Model, nn.Linear, Tensor]:
    """A model with global average pooling and one linear layer, that layer, and images (3, 3, 8, 10).

    Layer "1" has the feature maps (3, 8, 8, 10) that are pooled, of 80 positions each.
    """
    torch.manual_seed(0)
    conv, head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 3)
    network = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()
    model = load_model(network, input_size=(3, 8, 10), **NORMALIZATION)
    return model, head, torch.rand(3, 3, 8, 10, dtype=torch.float64)


class _Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square()


def quadratic_network() -> tuple[Model, Tensor, Tensor]:
    """A model with S_k = sum w_k z^2 of normalized pixels z, the weights w (2, 3, 8, 6) and three images."""
    torch.manual_seed(0)
    head = nn.Linear(3 * 8 * 6, 2, bias=False)
    network = nn.Sequential(_Square(), nn.Flatten(), head).double()
    model = load_model(network, input_size=(3, 8, 6), **NORMALIZATION)
    return model, head.weight.detach().view(2, 3, 8, 6), torch.rand(3, 3, 8, 6, dtype=torch.float64)
