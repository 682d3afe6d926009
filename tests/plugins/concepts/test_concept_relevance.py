"""Concept relevance: sums, layers of all layouts, what bypasses a layer, refused channels and layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phosphene import InputError, ModelError, load_model, methods, run
from phosphene_plugins.concepts.concept_relevance import ConceptRelevance

concept_relevance = methods["concept_relevance"]
lrp = methods["lrp"]
IMAGES = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Bypassed(nn.Module):
    """A convolution beside another path, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.relu(self.norm(self.second(x)))
        return self.head(x.mean((2, 3)))


def all_channels(model: object, layer: str, images: Tensor, **params: object) -> ConceptRelevance:
    return concept_relevance(model, images, 1, layer=layer, k=1000, **params)


@pytest.mark.parametrize(("layer", "rule"), [("stem.3", "epsilon_gamma_box"), ("patch_embed", "epsilon")])
def test_maps_of_all_channels_sum_to_that_of_lrp_where_nothing_bypasses_the_layer(
    layer: str, rule: str
) -> None:
    model = load_model(load_model("builtin:shapes-vit").module.double(), input_size=(3, 64, 64))
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    result = all_channels(model, layer, images, rule=rule)
    maps = lrp(model, images, 1, rule=rule).maps
    torch.testing.assert_close(result.maps.sum(1), maps, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("layer", ["blocks.1", "blocks.2.mlp.0", "norm"])
def test_layers_of_tokens_have_channels_on_their_last_axis(layer: str) -> None:
    model = load_model("builtin:shapes-vit")
    images = torch.rand(2, 3, 64, 64)
    result = concept_relevance(model, images, 1, layer=layer, channels=[3, 0])
    width = model.structure.layers[layer].shape[-1]
    assert result.relevance.shape == (2, width) and result.maps.shape == (2, 2, 64, 64)
    single = concept_relevance(model, images[1:], 1, layer=layer, channels=[0])
    torch.testing.assert_close(result.maps[1:, 1:], single.maps, rtol=1e-3, atol=1e-7)


def test_what_bypasses_the_layer_does_not_count() -> None:
    torch.manual_seed(0)
    network = Bypassed().double().eval()
    model = load_model(network, input_size=(3, 8, 8))
    result = all_channels(model, "relu", IMAGES, rule="epsilon", epsilon=0)
    behind = (
        network.relu(network.norm(network.second(network.first(IMAGES))))
        * network.head.weight[1][:, None, None]
    )
    torch.testing.assert_close(result.relevance.sort(1).values, behind.mean((2, 3)).sort(1).values)
    through_both = lrp(model, IMAGES, 1, rule="epsilon", epsilon=0).maps
    assert (result.maps.sum(1) - through_both).abs().max() > 0.1 * through_both.abs().max()
    # A convolution whose batch norm follows has relevance of its own.
    assert all_channels(model, "second", IMAGES, rule="epsilon").relevance.any()


def test_wrong_channels_and_layers_are_refused() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).double().eval()
    model = load_model(network, input_size=(3, 8, 8))
    with pytest.raises(InputError, match="layer '0' has 4 channels, so there is no number 4"):
        concept_relevance(model, IMAGES, 0, layer="0", channels=[4])
    with pytest.raises(ModelError, match="layer '2' has not run"):
        concept_relevance(model, IMAGES, "layer:0", layer="2", channels=[0])


def test_figure_has_a_map_for_each_channel() -> None:
    result = run("concept_relevance", images="builtin:scenes/2", layer="features.11", k=3, progress=False)
    assert [len(group) for group in result.rows()] == [4, 4]
    assert result.rows()[0][1].title.startswith(f"channel {int(result.channels[0, 0])}: +")
    assert len(result.lines()) == 3
