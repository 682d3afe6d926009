"""CAM methods on token layouts with registers, channels-last layouts and convolutions of real networks."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from phosphene import Model, ModelError, load_model, methods

#: Narrow and shallow ones, since two methods run a pass for every channel.
NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "vit_medium_patch16_reg4_gap_256": ({"depth": 2, "embed_dim": 32, "num_heads": 2}, (32, 4, 4)),
    "vit_tiny_patch16_224": (
        {"depth": 3, "embed_dim": 24, "num_heads": 2, "reg_tokens": 4},
        (24, 4, 4),
    ),
    "swin_tiny_patch4_window7_224": (
        {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)},
        (64, 2, 2),
    ),
    "convnext_atto": ({"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}, (32, 2, 2)),
}
CAM_METHODS = ["grad_cam", "grad_cam_plus_plus", "hires_cam", "layer_cam", "xgrad_cam", "score_cam"]
CAM_METHODS += ["ablation_cam", "eigen_cam"]


@pytest.fixture(params=NETWORKS, scope="module")
def network(request: pytest.FixtureRequest) -> tuple[Model, torch.Tensor, tuple[int, int, int]]:
    options, maps = NETWORKS[request.param]
    size = {} if "convnext" in request.param else {"img_size": 64}
    torch.manual_seed(0)
    module = timm.create_model(request.param, num_classes=6, **options, **size)
    for parameter in module.parameters():  # the logits of a new timm network hardly depend on the image
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return load_model(module, input_size=(3, 64, 64)), torch.rand(2, 3, 64, 64), maps


@pytest.mark.parametrize("name", CAM_METHODS)
def test_maps_have_the_token_grid_without_class_tokens(name, network):
    model, images, (channels, height, width) = network
    assert model.map_shape(model.last_map) == (channels, height, width)
    target = () if name == "eigen_cam" else (3,)
    result = methods[name](model, images, *target).as_convention("captum")
    assert result.maps.shape == (2, height, width)
    assert result.maps.isfinite().all()
    assert (result.maps.amax((1, 2)) > result.maps.amin((1, 2))).all()
    assert not torch.allclose(result.maps[0], result.maps[1])


def test_several_layers_are_averaged(network):
    model, images, _ = network
    layers = [*model.stages[:2], model.last_map]
    result = methods["grad_cam"](model, images, 3, layer=layers)
    assert result.more.shape == (2, 3, 64, 64)
    assert result.maps.isfinite().all()


def test_cam_and_guided_grad_cam_need_a_linear_head_and_relus(network):
    model, images, (_, height, width) = network
    if "Swin" in model.name:
        assert methods["cam"](model, images, 3).maps.shape == (2, height, width)
    else:
        with pytest.raises(ModelError, match="use grad_cam"):
            methods["cam"](model, images, 3)
    with pytest.raises(ModelError, match="found no ReLU"):
        methods["guided_grad_cam"](model, images, 3)
