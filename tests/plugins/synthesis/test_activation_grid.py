"""Activation grid: oracle, tiles that maximize their cells, networks of one input size, targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from phosphene import InputError, Model, load_model, max_batch, methods, run

draw_grid = methods["synthesis.activation_grid"]
FEW: dict[str, Any] = {"cells": 2, "steps": 20, "tile": 12, "jitter": 1, "seed": 0}


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    return load_model(network.double(), mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.2], input_size=(3, 12, 14))


def test_oracle() -> None:
    draw_grid.spec.oracle()


def test_a_tile_responds_most_along_its_own_cell(model: Model) -> None:
    images = torch.rand(2, 3, 12, 14, dtype=torch.float64)
    result = draw_grid(model, images, layer="2", **FEW)
    assert result.tiles.shape == (2, 2, 2, 3, 12, 12) and result.vectors.shape == (2, 2, 2, 8)
    responses = model.features(result.tiles.flatten(0, 2), "2").mean((2, 3))
    cosines = torch.cosine_similarity(responses, result.vectors.flatten(0, 2), dim=1)
    assert (cosines > 0.5).all()
    with max_batch(3):
        parts = draw_grid(model, images, layer="2", **FEW)
    torch.testing.assert_close(parts.tiles, result.tiles, atol=1e-9, rtol=0)
    assert result.mosaics().shape == (2, 3, 24, 24)
    assert torch.equal(result.mosaics(by_norm=False)[1, :, 12:, :12], result.tiles[1, 1, 0])
    norms = result.vectors[0].norm(dim=2)
    largest = divmod(int(norms.argmax()), 2)
    rows, columns = (slice(12 * n, 12 * n + 12) for n in largest)
    torch.testing.assert_close(result.mosaics()[0, :, rows, columns], result.tiles[0][largest])
    target = result.direction(1, 0, 1)
    assert torch.equal(target.vector, result.vectors[1, 0, 1]) and target.name == "2"
    with pytest.raises(InputError, match="2 images with 2x2 cells"):
        result.direction(1, 2, 0)


def test_default_tile_is_the_input_size_of_a_network_that_takes_no_other() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 72 * 80, 3))
    model = load_model(network, input_size=(3, 72, 80))
    options = {name: value for name, value in FEW.items() if name != "tile"} | {"steps": 1, "cells": 1}
    assert draw_grid(model, torch.rand(1, 3, 72, 80), layer="0", **options).tiles.shape[-2:] == (72, 80)
    assert run("activation_grid", images="builtin:scenes/1", **options).tiles.shape[-2:] == (64, 64)


def test_a_tile_whose_relus_are_closed_starts_at_other_noise() -> None:
    """Of a channel that no even gray opens the tile is drawn all the same, as by ``class_visualization``."""
    conv = nn.Conv2d(3, 2, 3, padding=1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 3, 3, 3) / 27)
        conv.bias.copy_(torch.tensor([0.35, -0.65]))  # of the means below 0.35 and above 0.65
    model = load_model(
        nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(512, 2)), input_size=(3, 16, 16)
    )
    images = torch.cat([torch.full((1, 3, 16, 16), value) for value in (0.05, 0.95)])
    result = draw_grid(model, images, layer="1", cells=1, tile=16, jitter=0, steps=5, seed=0)
    assert (result.scores > 0).all() and result.tiles[0].mean() < result.tiles[1].mean()
