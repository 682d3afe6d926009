"""Layouts: which outputs of layers are maps; class tokens, queries, other orders; families of networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from phosphene import Model, ModelError, load_model, methods
from phosphene.results import Attribution

# --- layouts of one layer ---------------------------------------------------------------------------


class Tokens(nn.Module):
    """Patches of 4 pixels as maps or tokens, with tokens that are no patches before and after them."""

    def __init__(self, layout: str, before: int = 0, after: int = 0) -> None:
        super().__init__()
        self.layout, self.before, self.after = layout, before, after
        self.conv = nn.Conv2d(3, 20, 4, stride=4)
        self.block = nn.Identity()
        self.fc = nn.Linear(20, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images)
        if self.layout == "NhwC":
            return self.fc(self.block(x.permute(0, 2, 3, 1).tanh()).mean((1, 2)))
        if self.layout == "NChw":
            return self.fc(self.block(x.tanh()).mean((2, 3)))
        tokens = F.pad(x.flatten(2).tanh(), (self.before, self.after), value=0.3)
        if self.layout == "NCT":
            return self.fc(self.block(tokens).mean(2))
        return self.fc(self.block(tokens.transpose(1, 2)).mean(1))


@pytest.mark.parametrize("size", [(8, 12), (24, 16), (64, 64), (8, 100), (12, 120)])
@pytest.mark.parametrize(
    "network",
    [
        ("NChw",),
        ("NhwC",),
        ("NTC",),
        ("NTC", 1),
        ("NTC", 5),
        ("NTC", 0, 2),
        ("NTC", 1, 3),
        ("NCT",),
        ("NCT", 2),
    ],
    ids=str,
)
def test_all_layouts_are_the_maps_of_the_convolution(network, size):
    torch.manual_seed(0)
    model = load_model(Tokens(*network), input_size=(3, *size))
    images = torch.rand(2, 3, *size)
    expected = model.features(images, "conv").tanh()
    for layer in (None, "block"):
        assert torch.equal(model.maps(model.features(images, "block"), images, layer), expected)
    assert model.last_map in ("block", "conv")
    assert model.map_shape("block") == (20, size[0] // 4, size[1] // 4)


def test_maps_at_another_size_than_the_models():
    model = load_model(Tokens("NTC", 1), input_size=(3, 32, 32))
    images = torch.rand(2, 3, 20, 64)
    assert model.maps(model.features(images, "block"), images).shape == (2, 20, 5, 16)


def test_cells_are_those_of_the_network_also_in_elongated_images():
    model = load_model(torchvision.models.resnet18(num_classes=10), input_size=(3, 64, 64))
    for height, width in ((64, 512), (72, 224), (72, 400), (100, 1000), (104, 288), (33, 300), (500, 40)):
        result = methods["grad_cam"](model, torch.rand(1, 3, height, width), 0)
        assert result.maps.shape == (1, math.ceil(height / 32), math.ceil(width / 32))


# --- outputs whose positions are not positions in the image -----------------------------------------


class Latents(nn.Module):
    """Queries that attend to all patches, as in DETR's decoder and Perceiver."""

    def __init__(self, queries: int) -> None:
        super().__init__()
        self.stem, self.tokens = nn.Conv2d(3, 16, 8, 8), nn.Tanh()
        self.queries = nn.Parameter(torch.randn(1, queries, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(self.stem(x).flatten(2).transpose(1, 2))
        latents = self.queries.expand(len(x), -1, -1)
        return self.head(self.norm(self.attention(latents, tokens, tokens)[0] + latents).mean(1))


@pytest.mark.parametrize("queries", [64, 100, 50, 49, 16, 1])
def test_latents_are_no_maps(queries):
    torch.manual_seed(0)
    model = load_model(Latents(queries), input_size=(3, 64, 64))
    images = torch.rand(1, 3, 64, 64)
    assert model.last_map == "tokens"
    for layer in ("norm", "attention"):
        with pytest.raises(ModelError, match="is not a map over a 64x64 image"):
            methods["grad_cam"](model, images, layer=layer)
    # The map follows an image that is rolled by half of its width.
    here, there = (methods["grad_cam"](model, x, 0).maps for x in (images, torch.roll(images, 32, 3)))
    assert here.shape == (1, 8, 8)
    torch.testing.assert_close(torch.roll(here, 4, 2), there, atol=1e-6, rtol=1e-4)


def test_a_shape_of_both_maps_and_latents_needs_the_layers_name():
    model = load_model(Latents(64), input_size=(3, 64, 64))
    images = torch.rand(1, 3, 64, 64)
    features = model.features(images, "tokens")
    with pytest.raises(ModelError, match=r"name its layer: model.maps\(features, images, layer\)"):
        model.maps(features, images)
    assert model.maps(features, images, "tokens").shape == (1, 16, 8, 8)


class Reordered(nn.Module):
    """Tokens in mask-unit order (Hiera): all cells of one 2x2 or larger unit behind each other."""

    def __init__(self, unit: int) -> None:
        super().__init__()
        self.unit = unit
        self.stem, self.block, self.head = nn.Conv2d(3, 12, 4, 4), nn.Identity(), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        n, c, h, w = y.shape
        units = y.view(n, c, h // self.unit, self.unit, w // self.unit, self.unit)
        return self.head(self.block(units.permute(0, 2, 4, 3, 5, 1).reshape(n, h * w, c).tanh()).mean(1))


@pytest.mark.parametrize("unit", [2, 4])
def test_tokens_in_another_order_are_no_maps(unit):
    model = load_model(Reordered(unit), input_size=(3, 64, 64))
    assert model.last_map == "stem"
    with pytest.raises(ModelError, match="not a map"):
        model.map_shape("block")


def test_pooled_vectors_and_mixed_tokens_are_no_maps():
    mixer = load_model("timm:mixer_s32_224", num_classes=5)
    for layer in ("blocks.0.mlp_tokens", "blocks.0.mlp_tokens.fc1"):
        with pytest.raises(ModelError, match=r"output of layer 'blocks.0.mlp_tokens.*is not a map"):
            mixer.map_shape(layer)
    assert mixer.map_shape("blocks.0") == (512, 7, 7)


def test_attention_windows_are_not_read_as_images():
    model = load_model("timm:swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), num_classes=3)
    images = torch.rand(1, 3, 224, 224)
    with pytest.raises(ModelError, match="64 rows for 1 images"):
        model.maps(model.features(images, "layers.0.blocks.0.attn"), images)
    assert model.maps(model.features(images, "layers.0"), images).shape == (1, 96, 56, 56)


def test_outputs_that_are_not_maps_are_refused():
    model = load_model(Tokens("NTC", 1), input_size=(3, 32, 32))
    for shape in ((1, 10), (1, 199, 8), (1,), (1, 20, 65)):
        with pytest.raises(ModelError, match="is not a map over a 32x32 image"):
            model.maps(torch.zeros(shape), torch.rand(1, 3, 32, 32))


def test_networks_that_draw_random_numbers_have_maps():
    class Noisy(Tokens):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images + 0.5 * torch.rand_like(images))

    assert load_model(Noisy("NTC", 1), input_size=(3, 32, 32)).map_shape("block") == (20, 8, 8)


# --- families -----------------------------------------------------------------------------------


def of_timm(name: str, size: tuple[int, int], **options: Any) -> Model:
    import timm

    return load_model(timm.create_model(name, num_classes=5, **options), input_size=(3, *size))


def of_torchvision(name: str, size: tuple[int, int], **options: Any) -> Model:
    return load_model(torchvision.models.get_model(name, num_classes=5, **options), input_size=(3, *size))


def of_transformers(name: str, size: tuple[int, int], **options: Any) -> Model:
    import transformers

    config = getattr(transformers, f"{name}Config")(num_labels=5, **options)
    network = getattr(transformers, f"{name}ForImageClassification")(config)
    return load_model(network, input_size=(3, *size))


_VIT = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
_SWIN = {"embed_dim": 16, "depths": [2, 2, 2], "num_heads": [2, 2, 4], "window_size": 4}
_SEGFORMER = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4]}
_TIMM_VIT = {"embed_dim": 48, "depth": 3, "num_heads": 3}

#: A dozen families at two sizes: function, name, options at the first and at the second size, sizes.
FAMILIES: dict[
    str, tuple[Callable[..., Model], str, dict[str, Any], dict[str, Any], tuple[int, int], tuple[int, int]]
]
FAMILIES = {
    "timm vit": (
        of_timm,
        "vit_tiny_patch16_224",
        _TIMM_VIT | {"img_size": 64},
        _TIMM_VIT | {"img_size": (48, 160)},
        (64, 64),
        (48, 160),
    ),
    "timm registers": (
        of_timm,
        "vit_medium_patch16_reg4_gap_256",
        _TIMM_VIT | {"img_size": 64},
        _TIMM_VIT | {"img_size": (48, 160)},
        (64, 64),
        (48, 160),
    ),
    "timm swin": (
        of_timm,
        "swin_tiny_patch4_window7_224",
        {"img_size": 112, "embed_dim": 24, "depths": (2, 2, 2)},
        {"img_size": (112, 224), "embed_dim": 24, "depths": (2, 2, 2)},
        (112, 112),
        (112, 224),
    ),
    "timm mixer": (of_timm, "mixer_s32_224", {"img_size": 128}, {"img_size": 160}, (128, 128), (160, 160)),
    "DeiT": (
        of_transformers,
        "DeiT",
        _VIT | {"image_size": 64},
        _VIT | {"image_size": (48, 160)},
        (64, 64),
        (48, 160),
    ),
    "torchvision vit": (
        of_torchvision,
        "vit_b_16",
        {"image_size": 64},
        {"image_size": 96},
        (64, 64),
        (96, 96),
    ),
    "torchvision resnet": (of_torchvision, "resnet18", {}, {}, (96, 96), (72, 400)),
    "ViT": (
        of_transformers,
        "ViT",
        _VIT | {"image_size": 64},
        _VIT | {"image_size": (48, 160)},
        (64, 64),
        (48, 160),
    ),
    "Swin": (
        of_transformers,
        "Swin",
        _SWIN | {"image_size": 64},
        _SWIN | {"image_size": (64, 192)},
        (64, 64),
        (64, 192),
    ),
    "Dinov2WithRegisters": (
        of_transformers,
        "Dinov2WithRegisters",
        _VIT | {"image_size": 56},
        _VIT | {"image_size": 56},
        (56, 56),
        (56, 140),
    ),
    "ConvNext": (
        of_transformers,
        "ConvNext",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        (96, 96),
        (72, 400),
    ),
    "Segformer": (of_transformers, "Segformer", _SEGFORMER, _SEGFORMER, (96, 96), (64, 224)),
}

#: More families at one size, in the nightly run. Deep networks of convolutions whose random weights spread
#: every change over the entire map (EfficientNet, ConvMixer, RepViT, MobileViT of transformers) cannot be
#: tested so.
MORE: dict[str, tuple[Callable[..., Model], str, dict[str, Any], tuple[int, int]]] = {
    "timm hiera": (of_timm, "hiera_tiny_224", {"stages": (1, 1, 1, 1)}, (224, 224)),
    "timm hiera, wide": (
        of_timm,
        "hiera_tiny_224",
        {"img_size": (224, 448), "stages": (1, 1, 1, 1)},
        (224, 448),
    ),
    "Swinv2": (of_transformers, "Swinv2", _SWIN | {"image_size": 64}, (64, 64)),
    "Dinov2": (of_transformers, "Dinov2", _VIT | {"image_size": 70}, (70, 70)),
    "Beit": (of_transformers, "Beit", _VIT | {"image_size": 64}, (64, 64)),
    "Pvt": (of_transformers, "Pvt", _SEGFORMER | {"image_size": 128}, (128, 128)),
    "PvtV2": (of_transformers, "PvtV2", _SEGFORMER | {"image_size": 128}, (128, 128)),
    "MobileViTV2": (of_transformers, "MobileViTV2", {"image_size": 256}, (256, 256)),
    "PoolFormer": (of_transformers, "PoolFormer", {"depths": [1, 1, 1, 1]}, (96, 96)),
    "LevIt": (of_transformers, "Levit", {"image_size": 224}, (224, 224)),
    "Cvt": (of_transformers, "Cvt", {}, (224, 224)),
    "ResNet": (of_transformers, "ResNet", {"depths": [1, 1, 1, 1]}, (96, 96)),
    "RegNet": (of_transformers, "RegNet", {"depths": [1, 1, 1, 1]}, (96, 96)),
    "ViTMSN": (of_transformers, "ViTMSN", _VIT | {"image_size": 64}, (64, 64)),
    "timm dinov2": (of_timm, "vit_small_patch14_reg4_dinov2", {"img_size": 70}, (70, 70)),
    "torchvision swin_t": (of_torchvision, "swin_t", {}, (112, 224)),
    "torchvision swin_v2_t": (of_torchvision, "swin_v2_t", {}, (128, 128)),
    "torchvision maxvit_t": (of_torchvision, "maxvit_t", {}, (224, 224)),
    "torchvision convnext_tiny": (of_torchvision, "convnext_tiny", {}, (96, 160)),
    **{
        f"timm {name}": (of_timm, name, {}, (side, side))
        for name, side in (
            ("beit_base_patch16_224", 224),
            ("cait_xxs24_224", 224),
            ("coat_tiny", 224),
            ("convit_tiny", 224),
            ("convnext_atto", 96),
            ("crossvit_9_240", 240),
            ("davit_tiny", 224),
            ("deit_tiny_distilled_patch16_224", 224),
            ("edgenext_xx_small", 96),
            ("efficientformer_l1", 224),
            ("efficientformerv2_s0", 224),
            ("eva02_tiny_patch14_224", 224),
            ("fastvit_t8", 96),
            ("flexivit_small", 240),
            ("focalnet_tiny_srf", 224),
            ("gcvit_xxtiny", 224),
            ("gmlp_ti16_224", 224),
            ("inception_next_tiny", 96),
            ("levit_128s", 224),
            ("mambaout_femto", 96),
            ("maxvit_tiny_tf_224", 224),
            ("mobilevit_xxs", 256),
            ("mvitv2_tiny", 224),
            ("nest_tiny", 224),
            ("nextvit_small", 96),
            ("pit_ti_224", 224),
            ("poolformer_s12", 96),
            ("pvt_v2_b0", 96),
            ("resmlp_12_224", 224),
            ("samvit_base_patch16", 224),
            ("sequencer2d_s", 224),
            ("shvit_s1", 224),
            ("starnet_s1", 96),
            ("swiftformer_xs", 96),
            ("swinv2_cr_tiny_ns_224", 224),
            ("swinv2_tiny_window8_256", 256),
            ("tiny_vit_5m_224", 224),
            ("tnt_s_legacy_patch16_224", 224),
            ("twins_pcpvt_small", 224),
            ("visformer_tiny", 224),
            ("volo_d1_224", 224),
            ("xcit_nano_12_p16_224", 224),
        )
    },
}


def calibrate(network: nn.Module, images: Tensor) -> None:
    """Set the statistics of batch norms: without, random weights make all features of deep networks equal."""
    for part in network.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.momentum = 1.0
    with torch.no_grad():
        network.train()(images)
    network.eval()


def assert_the_map_follows_the_image(model: Model) -> None:
    """A change in one corner of the image moves the last map nearer to that corner than one opposite.

    The center of mass of its change, minus what a change elsewhere also adds, lies by at least a twentieth
    of the map nearer to the corner, along both axes.
    """
    images = torch.rand(1, 3, *model.input_size[1:], generator=torch.Generator().manual_seed(1))
    height, width = images.shape[-2:]
    calibrate(model.module, torch.rand(4, *images.shape[1:]))
    before = model.maps(model.features(images, model.last_map), images, model.last_map).detach()
    _, h, w = model.map_shape(model.last_map)
    assert before.shape[2:] == (h, w) and h * w > 1
    changes = []
    for bottom, right in ((False, False), (False, True), (True, False), (True, True)):
        changed = images.clone()
        rows = slice(height * 2 // 3, None) if bottom else slice(0, height // 3)
        columns = slice(width * 2 // 3, None) if right else slice(0, width // 3)
        changed[..., rows, columns] = 1 - changed[..., rows, columns]
        difference = (
            model.maps(model.features(changed, model.last_map), changed, model.last_map).detach() - before
        )
        difference = difference - difference.mean((2, 3), keepdim=True)
        changes.append(difference.square().sum((0, 1)))
    shares = torch.stack([change / change.sum() for change in changes])
    shares = shares / shares.mean(0)
    y, x = torch.arange(h).div(max(h - 1, 1))[:, None], torch.arange(w).div(max(w - 1, 1))
    vertical, horizontal = ((shares * axis).sum((1, 2)) / shares.sum((1, 2)) for axis in (y, x))
    if h > 1:
        assert min(vertical[2] - vertical[0], vertical[3] - vertical[1]) > 0.05
    if w > 1:
        assert min(horizontal[1] - horizontal[0], horizontal[3] - horizontal[2]) > 0.05


@pytest.mark.parametrize("second", [False, True], ids=["first size", "second size"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_map_of_a_family_follows_the_image(family, second):
    create, name, first_options, second_options, first_size, second_size = FAMILIES[family]
    torch.manual_seed(0)
    size = second_size if second else first_size
    model = create(name, size, **(second_options if second else first_options))
    assert_the_map_follows_the_image(model)


@pytest.mark.nightly
@pytest.mark.parametrize("family", MORE)
def test_the_last_map_of_more_families_follows_the_image(family):
    create, name, options, size = MORE[family]
    torch.manual_seed(0)
    assert_the_map_follows_the_image(create(name, size, **options))


def test_the_last_map_of_a_swin_of_transformers_is_its_last_stage():
    model = of_transformers("Swin", (64, 64), **_SWIN, image_size=64)
    assert model.last_map == "swin.layernorm"
    result = methods["grad_cam"](model, torch.rand(1, 3, 64, 64), 0)
    assert isinstance(result, Attribution) and result.maps.shape == (1, 4, 4)
    with pytest.raises(ModelError, match="is not a map"):
        model.map_shape("swin.pooler")
