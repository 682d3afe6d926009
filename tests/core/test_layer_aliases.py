"""Layer names of a VGG as papers write them, accepted for every layer argument."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.perceptual_networks import load_decoder, load_small_vgg19, load_vgg19
from torch import nn

from phosphene import Channel, Class, UnknownName, load_model, methods, scores
from phosphene.images import read_image, resize


@pytest.mark.parametrize(
    ("name", "aliases"),
    [
        (
            "vgg16",
            {"conv1_1": "0", "relu2_2": "8", "pool2": "9", "relu5_3": "29", "pool5": "30"},
        ),
        ("vgg19", {"relu1_1": "1", "conv3_4": "16", "conv4_2": "21", "pool4": "27", "relu5_1": "29"}),
        ("vgg19_bn", {"conv1_1": "0", "relu1_1": "2", "conv4_2": "30", "pool4": "39"}),
    ],
)
def test_aliases_of_torchvisions_vggs(name: str, aliases: dict[str, str]) -> None:
    with torch.device("meta"):
        model = load_model(f"torchvision:{name}")
    for alias, own in aliases.items():
        assert model.layer_name(alias) == f"features.{own}"
        kind = {"conv": nn.Conv2d, "relu": nn.ReLU, "pool": nn.MaxPool2d}[alias[:4]]
        assert isinstance(model.layers[model.layer_name(alias)], kind)
    with pytest.raises(UnknownName, match="relu5_1"):
        model.layer_name("relu51")


def test_aliases_are_accepted_for_every_layer_argument() -> None:
    model, images = load_model("builtin:shapes-vgg"), torch.rand(2, 3, 64, 64)
    own = model.features(images, "features.11")
    assert torch.equal(model.features(images, "relu3_1"), own)
    assert torch.equal(model.features_of(images, ["conv1_1", "relu3_1"])[1], own)
    with model.tap("relu3_1") as tap:
        model(images)
    assert torch.equal(tap["relu3_1"], own)
    with model.tap("relu3_1", replace=torch.zeros_like) as tap:
        assert not torch.equal(model(images), tap["relu3_1"])
    assert torch.equal(scores(model, images, "relu3_1[4]"), scores(model, images, Channel("features.11", 4)))
    assert model.map_shape("pool1") == (24, 32, 32)
    result = methods["grad_cam"](model, images, Class(1), layer="relu4_2")
    assert torch.equal(result.maps, methods["grad_cam"](model, images, Class(1), layer="features.18").maps)


def test_other_networks_have_no_aliases() -> None:
    assert not load_model("builtin:shapes-resnet").vgg_layer_aliases
    for uri in ("torchvision:squeezenet1_0", "torchvision:mobilenet_v2"):
        with torch.device("meta"):
            assert not load_model(uri).vgg_layer_aliases


def test_decoder_inverts_features_of_the_real_network(assets: Path) -> None:
    model, decoder = load_vgg19(assets), load_decoder(assets)
    image = resize(read_image(assets / "images" / "demo" / "tubingen.jpg"), (96, 128))[None]
    with torch.no_grad():
        error = (decoder(model.features(image, "relu3_1")) - image).square().mean()
    assert -10 * error.log10() > 24
    small = load_small_vgg19(assets)
    assert small.layer_name("relu5_1") == small.stages[-1]
    assert small.map_shape("conv4_2") == (128, 8, 8)
