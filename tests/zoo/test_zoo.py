"""Architectures of many families, randomly initialized: their structure, and the basic methods on them.

Each states the expected last map, whether CAM's equation holds, and the number of ReLUs between pixels
and logits (0: guided backpropagation must be refused).
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from phosphene import Model, ModelError, guided, load_model, methods, rewrite_backward, scores


@dataclass(frozen=True)
class Architecture:
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


def torchvision(name: str, *expected: Any, zero_head: bool = False, **options: Any) -> Architecture:
    return Architecture(f"torchvision:{name}", *expected, options=options, zero_head=zero_head)


def timm(name: str, *expected: Any, zero_head: bool = False, **options: Any) -> Architecture:
    return Architecture(f"timm:{name}", *expected, options=options, zero_head=zero_head)


ARCHITECTURES = [
    # Plain and residual convolutional networks; in-place, reused and functional ReLUs.
    torchvision("alexnet", 96, "features", (256, 2, 2), None, 7),
    torchvision("vgg11", 64, "features", (512, 2, 2), None, 10, init_weights=False),
    torchvision("vgg11_bn", 64, "features", (512, 2, 2), None, 10, init_weights=False),
    torchvision("resnet18", 64, "layer4", (512, 2, 2), True, 17),
    torchvision("resnext50_32x4d", 64, "layer4", (2048, 2, 2), True, 49),
    torchvision("densenet121", 64, "features", (1024, 2, 2), "relu", 121),
    torchvision("googlenet", 64, "inception5b", (1024, 2, 2), True, 57),
    torchvision("inception_v3", 128, "Mixed_7c", (2048, 2, 2), True, 94),
    torchvision("squeezenet1_1", 64, "features", (512, 3, 3), None, 26),
    torchvision("regnet_y_400mf", 64, "trunk_output", (440, 2, 2), True, 65),
    torchvision("shufflenet_v2_x0_5", 64, "conv5", (1024, 2, 2), True, 37),
    torchvision("mnasnet0_5", 64, "layers", (1280, 2, 2), True, 35),
    timm("resnet10t", 64, "layer4", (512, 2, 2), True, 11),
    timm("resnetv2_50", 64, "norm", (2048, 2, 2), True, 49),
    timm("repvgg_a0", 64, "stages", (1280, 2, 2), True, 22),
    timm("dla34", 64, "level5", (512, 2, 2), True, 33),
    timm("hrnet_w18_small", 64, "final_layer", (2048, 2, 2), True, 75),
    timm("dpn48b", 64, "features", (832, 2, 2), True, 52),
    timm("legacy_seresnet18", 64, "layer4", (512, 2, 2), True, 33),
    timm("cspdarknet53", 64, "stages", (1024, 2, 2), True, 0),
    # ReLU6, hard-swish, SiLU.
    torchvision("mobilenet_v2", 64, "features", (1280, 2, 2), True, 35),
    torchvision("mobilenet_v3_small", 64, "features", (576, 2, 2), None, 14),
    torchvision("efficientnet_b0", 64, "features", (1280, 2, 2), True, 0),
    timm("efficientnet_lite0", 64, "bn2", (1280, 2, 2), True, 33),
    timm("ghostnet_050", 64, "blocks", (480, 2, 2), None, 42),
    timm("rexnet_100", 64, "features", (1280, 2, 2), True, 29),
    timm("mobilevit_xxs", 64, "final_conv", (320, 2, 2), True, 0),
    # No ReLU at all: GELU convolutional networks; the norm after pooling is no GAP + linear head.
    torchvision("convnext_tiny", 64, "features", (768, 2, 2), None, 0),
    timm("convnext_atto", 64, "stages", (320, 2, 2), None, 0),
    timm("poolformer_s12", 64, "stages", (512, 2, 2), None, 0),
    timm("convmixer_768_32", 64, "blocks", (768, 9, 9), True, 65),
    # Class, distillation and register tokens before the patches; the last block's patch tokens are unused
    torchvision("vit_b_32", 64, "encoder.layers.encoder_layer_11.ln_1", (768, 2, 2), None, 0, image_size=64,
       zero_head=True),
    timm("vit_tiny_patch16_224", 64, "blocks.11.norm1", (192, 4, 4), None, 0, img_size=64),
    timm("deit_tiny_distilled_patch16_224", 64, "blocks.11.norm1", (192, 4, 4), None, 0, img_size=64),
    timm("vit_medium_patch16_reg4_gap_256", 64, "blocks", (512, 4, 4), None, 0, img_size=64),
    timm("vit_small_patch14_reg4_dinov2", 56, "blocks.11.norm1", (384, 4, 4), None, 0, img_size=56,
       num_classes=10),
    timm("eva02_tiny_patch14_224", 56, "blocks.11", (192, 4, 4), None, 0, img_size=56, num_classes=10),
    timm("xcit_nano_12_p16_224", 224, "cls_attn_blocks.1.norm1", (128, 14, 14), None, 0),
    timm("pvt_v2_b0", 64, "stages", (256, 2, 2), True, 0),
    # The last norm of every block is initialized to zero: nothing behind the last such layer can respond.
    timm("levit_128s", 224, "stages.2.downsample.attn_downsample.q", (256, 4, 4), None, 0),
    timm("mixer_s32_224", 224, "norm", (512, 7, 7), True, 0, zero_head=True),
    # Channels last; Swin V2's ReLUs compute its position bias and do not depend on pixels.
    torchvision("swin_t", 64, "norm", (768, 2, 2), True, 0),
    torchvision("swin_v2_t", 64, "norm", (768, 2, 2), True, 0),
    timm("swin_tiny_patch4_window7_224", 64, "norm", (768, 2, 2), True, 0, img_size=64),
]  # fmt: skip


@pytest.fixture(params=ARCHITECTURES, ids=lambda architecture: architecture.uri, scope="module")
def network(request: pytest.FixtureRequest) -> tuple[Architecture, Model, torch.Tensor]:
    architecture: Architecture = request.param
    torch.manual_seed(0)
    model = load_model(
        architecture.uri, input_size=(3, architecture.side, architecture.side), **architecture.options
    )
    return architecture, model, torch.rand(1, 3, architecture.side, architecture.side)


def test_last_map_is_the_expected_layer(network):
    architecture, model, images = network
    assert model.last_map == architecture.last_map
    with model.guard(), torch.no_grad():
        maps = model.maps(model.features(images, model.last_map), images, model.last_map)
    assert maps.shape == (1, *architecture.maps)
    assert maps.isfinite().all()


def test_head_exists_where_pooled_maps_give_the_logits(network):
    architecture, model, images = network
    if architecture.head is None:
        with pytest.raises(ModelError, match=r"has no GAP \+ linear head, which CAM needs; use grad_cam"):
            _ = model.head
        return
    assert model.head.relu == (architecture.head == "relu")
    with model.guard(), torch.no_grad():
        maps = model.maps(model.features(images, model.head.layer), images)
        maps = maps.relu() if model.head.relu else maps
        logits = maps.mean((2, 3)) @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(logits, model(images), rtol=1e-3, atol=1e-3)


def test_saliency_is_finite(network):
    architecture, model, images = network
    maps = methods["saliency"](model, images, 3).maps
    assert maps.shape == (1, architecture.side, architecture.side)
    assert maps.isfinite().all()
    assert maps.any() == (not architecture.zero_head)


def test_grad_cam_is_finite(network):
    architecture, model, images = network
    maps = methods["grad_cam"](model, images, 3).maps
    assert len(maps) == 1
    assert maps.ndim == 3
    assert maps.isfinite().all()


def test_activation_maps_have_the_shape_of_the_last_map(network):
    architecture, model, images = network
    result = methods["activation_maps"](model, images, layer=model.last_map)
    assert result.maps.shape == (1, *architecture.maps)
    assert result.maps.isfinite().all()


def test_guided_rule_applies_to_every_relu_or_is_refused(network):
    architecture, model, images = network
    pixels = images.clone().requires_grad_()

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(scores(model, pixels, 3).sum(), pixels)[0]

    with model.guard():
        if architecture.relus == 0:
            with (
                pytest.raises(ModelError, match="found no ReLU in this model .* use saliency"),
                rewrite_backward(guided),
            ):
                gradient()
            return
        with rewrite_backward(guided) as rewrite:
            rewritten = gradient()
        assert rewrite.count == architecture.relus
        assert rewritten.shape == images.shape
        assert rewritten.isfinite().all()
        assert not torch.equal(rewritten, gradient())
