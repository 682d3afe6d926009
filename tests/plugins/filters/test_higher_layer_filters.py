"""Filters of higher layers: rows of slices, groups, defaults and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from phosphene import Model, ModelError, UnknownName, load_model, methods

higher_layer_filters = methods["filters.higher_layer_filters"]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 10, 3, groups=2), nn.BatchNorm2d(10),
        nn.Sequential(nn.Conv2d(10, 12, (1, 3)), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3),
    ]  # fmt: skip
    return load_model(nn.Sequential(*layers), input_size=(3, 16, 16))


def test_oracle():
    higher_layer_filters.spec.oracle()


def test_default_is_the_second_convolution_larger_than_1x1(model):
    bank = higher_layer_filters(model)
    assert bank.layer == "3"
    assert bank.weights.shape == (8, 3, 3, 3)  # of a group, a filter has three slices
    assert bank.tiles.shape == (24, 3, 3, 3) and bank.columns == 3
    assert bank.captions[4] == "1[1]"


def test_slices_of_a_filter_share_one_scale(model):
    tiles = higher_layer_filters(model).tiles.reshape(8, -1)
    assert tiles.amin(1).eq(0).all() and tiles.amax(1).eq(1).all()


def test_numbers_of_filters_and_slices(model):
    bank = higher_layer_filters(model, layer="5.0", filters=2, slices=4)
    assert torch.equal(bank.weights, model.module[5][0].weight[:2, :4])
    assert bank.tiles.shape == (8, 3, 1, 3)
    assert bank.figure() is not None


def test_layer_without_filters_is_refused_and_the_nearest_convolutions_named(model):
    with pytest.raises(ModelError, match=r"'4' \(BatchNorm2d\).*near it: '2', '3', '5.0'"):
        higher_layer_filters(model, layer="4")
    with pytest.raises(ModelError, match="near it: '5.0'$"):
        higher_layer_filters(model, layer="5")
    with pytest.raises(ModelError, match="Linear"):
        higher_layer_filters(model, layer="8")
    with pytest.raises(UnknownName):
        higher_layer_filters(model, layer="conv9")


def test_model_with_one_convolution_is_referred_to_first_layer_filters():
    layers = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    with pytest.raises(ModelError, match="first_layer_filters"):
        higher_layer_filters(load_model(layers, input_size=(3, 8, 8)))
