"""The network of the tests of synthesis; a file with another one has a fixture of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from phosphene import Model, load_model


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    return load_model(network.double(), mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.2], input_size=(3, 12, 12))
