"""Architectures of many families, randomly initialized: their structure, and the basic methods on them.

A row states the expected last map, whether CAM's equation holds, and the number of ReLUs between pixels
and logits (0: guided backpropagation must be refused).
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from phosphene import Model, ModelError, guided, load_model, methods, rewrite_backward, scores


@dataclass(frozen=True)
class Row:
    uri: str
    side: int
    last_map: str
    maps: tuple[int, int, int]
    #: True: GAP + linear on the last map; "relu": with a functional ReLU between; None: no such head.
    head: bool | str | None
    relus: int
    options: dict[str, Any] = field(default_factory=dict)
    #: Whether the head is initialized to zero, so that all gradients are zero.
    zero_head: bool = False


def tv(name: str, *row: Any, zero_head: bool = False, **options: Any) -> Row:
    return Row(f"torchvision:{name}", *row, options=options, zero_head=zero_head)


def tm(name: str, *row: Any, zero_head: bool = False, **options: Any) -> Row:
    return Row(f"timm:{name}", *row, options=options, zero_head=zero_head)


ZOO = [
    # Plain and residual convolutional networks; in-place, reused and functional ReLUs.
    tv("alexnet", 96, "features", (256, 2, 2), None, 7),
    tv("vgg11", 64, "features", (512, 2, 2), None, 10, init_weights=False),
    tv("vgg11_bn", 64, "features", (512, 2, 2), None, 10, init_weights=False),
    tv("resnet18", 64, "layer4", (512, 2, 2), True, 17),
    tv("resnext50_32x4d", 64, "layer4", (2048, 2, 2), True, 49),
    tv("densenet121", 64, "features", (1024, 2, 2), "relu", 121),
    tv("googlenet", 64, "inception5b", (1024, 2, 2), True, 57),
    tv("inception_v3", 128, "Mixed_7c", (2048, 2, 2), True, 94),
    tv("squeezenet1_1", 64, "features", (512, 3, 3), None, 26),
    tv("regnet_y_400mf", 64, "trunk_output", (440, 2, 2), True, 65),
    tv("shufflenet_v2_x0_5", 64, "conv5", (1024, 2, 2), True, 37),
    tv("mnasnet0_5", 64, "layers", (1280, 2, 2), True, 35),
    tm("resnet10t", 64, "layer4", (512, 2, 2), True, 11),
    tm("resnetv2_50", 64, "norm", (2048, 2, 2), True, 49),
    tm("repvgg_a0", 64, "stages", (1280, 2, 2), True, 22),
    tm("dla34", 64, "level5", (512, 2, 2), True, 33),
    tm("hrnet_w18_small", 64, "final_layer", (2048, 2, 2), True, 75),
    tm("dpn48b", 64, "features", (832, 2, 2), True, 52),
    tm("legacy_seresnet18", 64, "layer4", (512, 2, 2), True, 33),
    tm("cspdarknet53", 64, "stages", (1024, 2, 2), True, 0),
    # ReLU6, hard-swish, SiLU.
    tv("mobilenet_v2", 64, "features", (1280, 2, 2), True, 35),
    tv("mobilenet_v3_small", 64, "features", (576, 2, 2), None, 14),
    tv("efficientnet_b0", 64, "features", (1280, 2, 2), True, 0),
    tm("efficientnet_lite0", 64, "bn2", (1280, 2, 2), True, 33),
    tm("ghostnet_050", 64, "blocks", (480, 2, 2), None, 42),
    tm("rexnet_100", 64, "features", (1280, 2, 2), True, 29),
    tm("mobilevit_xxs", 64, "final_conv", (320, 2, 2), True, 0),
    # No ReLU at all: GELU convolutional networks; the norm after pooling is no GAP + linear head.
    tv("convnext_tiny", 64, "features", (768, 2, 2), None, 0),
    tm("convnext_atto", 64, "stages", (320, 2, 2), None, 0),
    tm("poolformer_s12", 64, "stages", (512, 2, 2), None, 0),
    tm("convmixer_768_32", 64, "blocks", (768, 9, 9), True, 65),
    # Class, distillation and register tokens before the patches; the last block's patch tokens are unused
    tv("vit_b_32", 64, "encoder.layers.encoder_layer_11.ln_1", (768, 2, 2), None, 0, image_size=64,
       zero_head=True),
    tm("vit_tiny_patch16_224", 64, "blocks.11.norm1", (192, 4, 4), None, 0, img_size=64),
    tm("deit_tiny_distilled_patch16_224", 64, "blocks.11.norm1", (192, 4, 4), None, 0, img_size=64),
    tm("vit_medium_patch16_reg4_gap_256", 64, "blocks", (512, 4, 4), None, 0, img_size=64),
    tm("vit_small_patch14_reg4_dinov2", 56, "blocks.11.norm1", (384, 4, 4), None, 0, img_size=56,
       num_classes=10),
    tm("eva02_tiny_patch14_224", 56, "blocks.11", (192, 4, 4), None, 0, img_size=56, num_classes=10),
    tm("xcit_nano_12_p16_224", 224, "cls_attn_blocks.1.norm1", (128, 14, 14), None, 0),
    tm("pvt_v2_b0", 64, "stages", (256, 2, 2), True, 0),
    tm("levit_128s", 224, "stages", (384, 4, 4), None, 0),
    tm("mixer_s32_224", 224, "norm", (512, 7, 7), True, 0, zero_head=True),
    # Channels last; Swin V2's ReLUs compute its position bias and do not depend on pixels.
    tv("swin_t", 64, "norm", (768, 2, 2), True, 0),
    tv("swin_v2_t", 64, "norm", (768, 2, 2), True, 0),
    tm("swin_tiny_patch4_window7_224", 64, "norm", (768, 2, 2), True, 0, img_size=64),
]  # fmt: skip


@pytest.fixture(params=ZOO, ids=lambda row: row.uri, scope="module")
def network(request: pytest.FixtureRequest) -> tuple[Row, Model, torch.Tensor]:
    row: Row = request.param
    torch.manual_seed(0)
    model = load_model(row.uri, input_size=(3, row.side, row.side), **row.options)
    return row, model, torch.rand(1, 3, row.side, row.side)


def test_last_map(network):
    row, model, images = network
    assert model.last_map == row.last_map
    with model.guard(), torch.no_grad():
        maps = model.maps(model.features(images, model.last_map), images)
    assert maps.shape == (1, *row.maps)
    assert maps.isfinite().all()


def test_head_exists_where_pooled_maps_give_the_logits(network):
    row, model, images = network
    if row.head is None:
        with pytest.raises(ModelError, match=r"has no GAP \+ linear head, which CAM needs; use grad_cam"):
            _ = model.head
        return
    assert model.head.relu == (row.head == "relu")
    with model.guard(), torch.no_grad():
        maps = model.maps(model.features(images, model.head.layer), images)
        maps = maps.relu() if model.head.relu else maps
        logits = maps.mean((2, 3)) @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(logits, model(images), rtol=1e-3, atol=1e-3)


def test_saliency_is_finite(network):
    row, model, images = network
    maps = methods["saliency"](model, images, 3).maps
    assert maps.shape == (1, row.side, row.side)
    assert maps.isfinite().all()
    assert maps.any() == (not row.zero_head)


def test_grad_cam_is_finite(network):
    row, model, images = network
    maps = methods["grad_cam"](model, images, 3).maps
    assert len(maps) == 1
    assert maps.ndim == 3
    assert maps.isfinite().all()


def test_activation_maps_of_the_last_map(network):
    row, model, images = network
    result = methods["activation_maps"](model, images, layer=model.last_map)
    assert result.maps.shape == (1, *row.maps)
    assert result.maps.isfinite().all()


def test_guided_rule_applies_to_every_relu_or_is_refused(network):
    row, model, images = network
    pixels = images.clone().requires_grad_()

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(scores(model, pixels, 3).sum(), pixels)[0]

    with model.guard():
        if row.relus == 0:
            with (
                pytest.raises(ModelError, match="found no ReLU in this model .* use saliency"),
                rewrite_backward(guided),
            ):
                gradient()
            return
        with rewrite_backward(guided) as rewrite:
            rewritten = gradient()
        assert rewrite.count == row.relus
        assert rewritten.shape == images.shape
        assert rewritten.isfinite().all()
        assert not torch.equal(rewritten, gradient())
