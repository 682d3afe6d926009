"""First-layer filters: composites, gray ones, slices, and both scales."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from phosphene import Model, ModelError, load_model, load_result, methods, run

first_layer_filters = methods["filters.first_layer_filters"]


def network(channels: int) -> Model:
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return load_model(nn.Sequential(*layers), input_size=(channels, 12, 12))


def test_oracle():
    first_layer_filters.spec.oracle()


def test_color_filters_are_scaled_over_their_channels():
    model = network(3)
    bank = first_layer_filters(model)
    assert bank.layer == "0" and bank.tiles.shape == (5, 3, 3, 3) and len(bank.captions) == 5
    assert torch.equal(bank.weights, model.module[0].weight)
    assert bank.tiles.amin((1, 2, 3)).eq(0).all() and bank.tiles.amax((1, 2, 3)).eq(1).all()


def test_shared_scale_keeps_weak_filters_weak_and_constant_filters_black():
    model = network(3)
    with torch.no_grad():
        model.module[0].weight[1] *= 0.01
        model.module[0].weight[2] = 0.3
    shared, each = first_layer_filters(model, scale="shared").tiles, first_layer_filters(model).tiles
    assert shared.min() == 0 and shared.max() == 1
    assert shared[1].max() - shared[1].min() < 0.02
    assert each[1].max() == 1 and each[2].max() == 0


@pytest.mark.parametrize(("channels", "tiles", "columns"), [(1, 5, 8), (2, 10, 2), (4, 20, 4)])
def test_other_channel_counts_are_gray_tiles(channels, tiles, columns):
    bank = first_layer_filters(network(channels))
    assert bank.tiles.shape == (tiles, 3, 3, 3) and bank.columns == columns
    assert torch.equal(bank.tiles[:, 0], bank.tiles[:, 2])


def test_patch_embedding_is_a_first_layer():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    bank = first_layer_filters(load_model(vit, input_size=(3, 32, 32)))
    assert bank.layer == "patch_embed.proj" and bank.tiles.shape == (192, 3, 16, 16)


def test_model_without_convolutions_is_refused():
    model = load_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), input_size=(3, 2, 2))
    with pytest.raises(ModelError, match="has no convolution"):
        first_layer_filters(model)


def test_figure_and_saving(tmp_path):
    bank = run("first_layer_filters", out=tmp_path / "filters")
    again = load_result(tmp_path / "filters")
    assert torch.equal(again.tiles, bank.tiles) and again.captions == bank.captions
    assert (tmp_path / "filters" / "pictures" / "000.png").is_file()
