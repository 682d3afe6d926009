"""The network of the tests of style transfer; a file with another one has a fixture of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from phosphene import Model, load_model


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()
    )
    return load_model(network.double())
