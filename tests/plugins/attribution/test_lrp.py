"""LRP: conservation, transformers, rules of layers, folded batch norms, refused operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from timm.layers import SwiGLU
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import Tensor, nn

from phosphene import InputError, Model, ModelError, UnknownName, load_model, methods
from phosphene.builtin.scenes import draw_scenes
from phosphene.data import localization

lrp = methods["attribution.lrp"]


class Residual(nn.Module):
    """No biases; a residual sum, in-place ReLU6, both kinds of pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.second = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu6(20 * self.first(images), inplace=True), 2)
        x = F.relu(x + self.second(x))
        return self.head(F.dropout(x.mean((2, 3)), 0.5, self.training))


def test_oracle() -> None:
    lrp.spec.oracle()


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "composite"])
def test_without_biases_the_map_sums_to_the_logit(rule: str) -> None:
    torch.manual_seed(0)
    model = load_model(
        Residual().double().eval(), mean=[0.4, 0.5, 0.6], std=[0.2] * 3, input_size=(3, 12, 10)
    )
    images = torch.rand(2, 3, 12, 10, dtype=torch.float64)
    sums = lrp(model, images, [0, 2], rule=rule, epsilon=0).maps.sum((1, 2))
    torch.testing.assert_close(sums, model(images).detach()[[0, 1], [0, 2]])


@pytest.mark.parametrize("rule", ["epsilon", "gamma"])
def test_a_batch_norm_after_a_convolution_equals_a_folded_one(rule: str) -> None:
    torch.manual_seed(0)
    conv, norm, head = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 2)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.data.normal_()
    tail = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    two = nn.Sequential(conv, norm, *tail).double().eval()
    one = nn.Sequential(torch.nn.utils.fuse_conv_bn_eval(conv, norm), *tail).double().eval()
    images = torch.rand(1, 3, 9, 9, dtype=torch.float64)
    maps = [lrp(load_model(net), images, 1, rule=rule, gamma=0.5).maps for net in (two, one)]
    torch.testing.assert_close(*maps)


def of_transformers(kind: str, **options: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(num_labels=3, **options)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


VIT: dict[str, Any] = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
TIMM: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 3,
}  # fmt: skip
SWIN: dict[str, Any] = {
    "img_size": 32, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4, "num_classes": 3,
}  # fmt: skip


def convnext() -> nn.Module:
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([block(8, 12, 2), block(12, None, 1)], num_classes=3)


#: Networks by library, and by the spelling of attention, norm and perceptron.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision vit": lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 12, 20, num_classes=3),
    "torchvision swin": lambda: torchvision.models.SwinTransformer(
        [4, 4], 8, [2, 1], [1, 2], [2, 2], num_classes=3
    ),
    "torchvision convnext": convnext,
    "torchvision mobilenet v3": lambda: torchvision.models.mobilenet_v3_small(num_classes=3, width_mult=0.25),
    "timm vit": lambda: TimmTransformer(**TIMM),
    "timm vit with gated perceptrons": lambda: TimmTransformer(
        **TIMM, mlp_layer=SwiGLU, class_token=False, global_pool="avg"
    ),
    "timm vit with rms norm": lambda: TimmTransformer(**TIMM, norm_layer=nn.RMSNorm, reg_tokens=2),
    "timm swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", **SWIN),
    "timm swin v2": lambda: timm.create_model("swinv2_tiny_window8_256", **SWIN),
    "timm convnext v2": lambda: timm.create_model(
        "convnextv2_atto", depths=(1, 1, 1, 1), dims=(4, 8, 8, 8), num_classes=3
    ),
    "timm mobilenet v3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=3),
    "transformers vit": lambda: of_transformers(
        "ViT", **VIT, intermediate_size=20, image_size=32, patch_size=8
    ),
    "transformers dinov2 with gated perceptrons": lambda: of_transformers(
        "Dinov2", **VIT, image_size=32, patch_size=8, use_swiglu_ffn=True
    ),
    "transformers swin": lambda: of_transformers(
        "Swin", embed_dim=8, depths=[2, 1], num_heads=[1, 2], image_size=32, patch_size=4, window_size=4
    ),
    "transformers convnext": lambda: of_transformers(
        "ConvNext", hidden_sizes=[8, 8, 12, 12], depths=[1, 1, 1, 1]
    ),
}


def without_biases(network: nn.Module) -> nn.Module:
    """The network in double precision with random weights; biases, positions and class tokens are 0."""
    torch.manual_seed(0)
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and "token" not in name and "pos" not in name:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            elif name == "weight" or "gamma" in name or "lambda" in name or "scale" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                nn.init.zeros_(parameter)
    return network.double().eval()


@pytest.fixture(params=NETWORKS, scope="module")
def transformer(request: pytest.FixtureRequest) -> Model:
    network = without_biases(NETWORKS[request.param]())
    return load_model(network, mean=[0.0] * 3, std=[0.25, 0.5, 0.75], input_size=(3, 32, 32))


def test_relevance_sums_to_the_score_of_a_network_of_today_without_biases(transformer: Model) -> None:
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    logits = transformer(images).detach()
    for rule in ("epsilon", "gamma"):
        sums = lrp(transformer, images, 1, rule=rule, epsilon=0).maps.sum((1, 2))
        torch.testing.assert_close(sums, logits[:, 1], rtol=1e-9, atol=1e-12)


def test_attn_lrp_of_networks_of_today_is_finite_and_depends_on_the_image(transformer: Model) -> None:
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    maps = lrp(transformer, images, 1, attention="attn_lrp", rule="epsilon_gamma_box").maps
    assert maps.isfinite().all()
    assert (maps[0] - maps[1]).abs().max() > 1e-2 * maps.abs().max() > 0


def test_unfused_attention_has_the_relevance_of_fused_attention() -> None:
    torch.manual_seed(0)
    network = TimmTransformer(**TIMM).double().eval()
    model = load_model(network, input_size=(3, 32, 32))
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    for attention in ("cp_lrp", "attn_lrp"):
        maps = []
        for fused in (True, False):
            for block in network.blocks:
                block.attn.fused_attn = fused
            maps.append(lrp(model, images, 1, attention=attention).maps)
        torch.testing.assert_close(*maps)


class Called(nn.Module):
    """A convolution, a function, and a linear layer of the mean."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 2, bias=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.conv(x)).mean((2, 3)))


def maps_of(function: Callable[[Tensor], Tensor], **params: Any) -> Tensor:
    torch.manual_seed(0)
    model = load_model(Called(function).double().eval(), input_size=(3, 8, 8))
    return lrp(model, torch.rand(1, 3, 8, 8, dtype=torch.float64), 0, **params).maps


def centered(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


#: Two spellings of the same function.
SPELLINGS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "layer norm": (
        lambda x: F.layer_norm(x.movedim(1, -1), [4]).movedim(-1, 1),
        lambda x: centered(x) / (centered(x).pow(2).mean(1, keepdim=True) + 1e-5).sqrt(),
    ),
    "group norm": (
        lambda x: F.group_norm(x, 1),
        lambda x: F.layer_norm(x, [4, 6, 6]),
    ),
    "instance norm": (F.instance_norm, lambda x: F.group_norm(x, 4)),
    "variance": (
        lambda x: F.layer_norm(x.movedim(1, -1), [4]).movedim(-1, 1),
        lambda x: centered(x) * (x.var(1, correction=0, keepdim=True) + 1e-5).rsqrt(),
    ),
    "rms norm": (
        lambda x: F.rms_norm(x.movedim(1, -1), [4], eps=1e-6).movedim(-1, 1),
        lambda x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6),
    ),
    "l2 norm": (lambda x: F.normalize(x, dim=1), lambda x: x / x.norm(dim=1, keepdim=True).expand_as(x)),
    "cosine similarity": (
        lambda x: x * F.cosine_similarity(x, x.flip(1))[:, None],
        lambda x: x * ((x / x.norm(dim=1)[:, None]) * (x.flip(1) / x.norm(dim=1)[:, None])).sum(1)[:, None],
    ),
    "silu": (F.silu, lambda x: x * x.sigmoid()),
    "gelu": (F.gelu, lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
    "hardswish in place": (lambda x: F.hardswish(x, inplace=True), lambda x: x * F.hardsigmoid(x)),
    "in-place product": (lambda x: x.clone().mul_(2 * x.flip(1)), lambda x: x * (2 * x.flip(1))),
    "square": (torch.square, lambda x: x * x),
    "matrix product": (
        lambda x: F.linear(x, torch.ones(5, 6).double()), lambda x: x @ torch.ones(6, 5).double(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_spelling_of_an_operation_does_not_matter(name: str) -> None:
    for rule in ("epsilon", "zplus"):
        torch.testing.assert_close(*(maps_of(function, rule=rule) for function in SPELLINGS[name]))


def test_an_in_place_activation_overwrites_its_input() -> None:
    def overwritten(x: Tensor) -> Tensor:
        F.silu(x, inplace=True)
        return x

    assert torch.equal(maps_of(overwritten), maps_of(F.silu))


def test_relevance_of_a_gated_product_sums_to_the_score_with_and_without_a_constant_gate() -> None:
    gated = lambda x: F.silu(x) * x.flip(1)
    constant, halves = (maps_of(gated, attention=name) for name in ("cp_lrp", "attn_lrp"))
    torch.testing.assert_close(constant.sum(), halves.sum(), rtol=1e-3, atol=0)
    assert (constant - halves).abs().max() > 0.05 * halves.abs().max()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.softplus, "softplus"),
        (torch.exp, "exp"),
        (lambda x: x.softmax(1), "softmax"),
        (torch.sigmoid, "sigmoid"),
        (lambda x: x + x.sigmoid(), "sigmoid"),
        (lambda x: 1 / x, "rdiv"),
    ],
)
def test_an_operation_without_a_rule_is_refused_by_name(
    function: Callable[[Tensor], Tensor], name: str
) -> None:
    with pytest.raises(ModelError, match=f"no rule for '{name}'.*: use integrated_gradients"):
        maps_of(function)


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        ("epsilon_gamma_box", 24),
        *(pytest.param(rule, 200, marks=pytest.mark.nightly) for rule in ("epsilon", "epsilon_gamma_box")),
    ],
)
def test_relevance_of_the_bundled_transformer_is_largest_in_the_object(rule: str, count: int) -> None:
    scenes = draw_scenes(count, seed=5, split="test")
    model = load_model("builtin:shapes-vit")
    for attention in ("cp_lrp", "attn_lrp"):
        result = lrp(model, scenes.images, scenes.labels.tolist(), rule=rule, attention=attention)
        hits = localization(result.heat(), scenes.masks)
        assert hits.inside >= 0.85 and hits.chance_inside < 0.2


# --- rules of single layers -------------------------------------------------------------------------


def small(*, normalizes: bool = False) -> Model:
    torch.manual_seed(0)
    first = nn.InstanceNorm2d(3) if normalizes else nn.Identity()
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return load_model(nn.Sequential(first, *layers, nn.Linear(4, 2)).double().eval(), input_size=(3, 8, 8))


IMAGES = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_rules_by_name_type_and_container_equal_the_named_combinations() -> None:
    model = small()
    by_type = lrp(model, IMAGES, 0, rules={"Conv2d": "gamma", "Linear": "epsilon"}).maps
    assert torch.equal(by_type, lrp(model, IMAGES, 0, rule="composite").maps)
    by_name = lrp(model, IMAGES, 0, rule="composite", rules={"1": "box"}).maps
    assert torch.equal(by_name, lrp(model, IMAGES, 0, rule="epsilon_gamma_box").maps)
    numbers = lrp(model, IMAGES, 0, rules={"Conv2d": "gamma(0.5)", "3": "gamma(2)", "7": "epsilon(0.1)"}).maps
    assert not torch.equal(numbers, by_type)
    torch.manual_seed(0)
    nested = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(32, 2)
    )
    model = load_model(nested.double().eval(), input_size=(3, 8, 8))
    inside, exact = (lrp(model, IMAGES, 0, rules={name: "gamma"}).maps for name in ("0", "0.0"))
    assert torch.equal(inside, exact)


def test_many_images_have_the_rules_of_few() -> None:
    """Of many images a copy of the network with folded batch norms would run, which has no layer names."""
    model = load_model("builtin:shapes-resnet")
    images = torch.rand(12, 3, 64, 64)
    maps = lrp(model, images, 0, rule="epsilon_plus_flat").maps
    torch.testing.assert_close(
        maps[:1], lrp(model, images[:1], 0, rule="epsilon_plus_flat").maps, atol=1e-6, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({"convolution": "gamma"}, UnknownName, "no layer or type of layer 'convolution'"),
        (
            {"Conv2d": "flat"},
            InputError,
            "Flat of 'Conv2d' is a rule for the layer that reads the pixels, and '3'",
        ),
        ({"2": "gamma"}, ModelError, "no convolution or linear layer below the target is '2'"),
        ({"1": "gamma(2000)"}, InputError, "gamma takes a number from 0 to 1000, not 2000"),
        ({"1": "gama"}, InputError, "rules.*should be epsilon, gamma, zplus"),
        ({"1": "zplus(2)"}, InputError, "rules.*should be epsilon, gamma, zplus"),
        ({"1": "gamma(1.2.3)"}, InputError, "rules.*should be epsilon, gamma, zplus"),
    ],
)
def test_wrong_rules_are_refused(rules: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lrp(small(), IMAGES, 0, rules=rules)


def test_the_box_rule_is_refused_where_the_network_normalizes_pixels() -> None:
    with pytest.raises(ModelError, match="the box rule is for a first layer that reads pixels as the model"):
        lrp(small(normalizes=True), IMAGES, 0, rule="epsilon_gamma_box")
    assert lrp(small(normalizes=True), IMAGES, 0, rule="epsilon_plus_flat").maps.isfinite().all()


def test_rules_for_pixels_pass_padding_in_front_of_the_first_layer() -> None:
    torch.manual_seed(0)
    inside = nn.Conv2d(3, 4, 3, padding=1)
    tail = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    outside = nn.Conv2d(3, 4, 3)
    outside.load_state_dict(inside.state_dict())
    maps = []
    for first in ((inside,), (nn.ZeroPad2d(1), outside)):
        model = load_model(nn.Sequential(*first, *tail).double().eval(), input_size=(3, 8, 8))
        maps.append(lrp(model, IMAGES, 0, rule="gamma", rules={"Conv2d": "w_square"}).maps)
    # At the border the padding outside has relevance of its own.
    torch.testing.assert_close(*(part[:, 2:-2, 2:-2] for part in maps))
    assert not torch.equal(*maps)
