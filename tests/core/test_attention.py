"""Attention probabilities: fused, unfused, torch.nn.MultiheadAttention, windows, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import ModelError, UnknownName, attention_maps, load_model
from phosphene.hooks import RecordAttention
from phosphene.models import Model
from phosphene.testing.networks import make_network

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Encoder(nn.Module):
    """Patches, ``torch.nn.MultiheadAttention``, and a head; ``weights`` asks it for its own probabilities."""

    def __init__(self, batch_first: bool, weights: bool) -> None:
        super().__init__()
        self.batch_first, self.weights = batch_first, weights
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.head = nn.Linear(8, 4)
        self.own: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        mixed, own = self.attention(
            tokens, tokens, tokens, need_weights=self.weights, average_attn_weights=False
        )
        self.own = own
        return self.head(mixed.mean(1 if self.batch_first else 0))


def vit(fused: bool, **settings: Any) -> Model:
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        img_size=32,
        patch_size=8,
        depth=2,
        num_classes=5,
        **settings,
    )
    for block in network.blocks:
        block.attn.fused_attn = fused
    return load_model(network, input_size=(3, 32, 32))


def assert_distributions(maps: Tensor, heads: int, tokens: int) -> None:
    assert maps.shape == (len(IMAGES), heads, tokens, tokens)
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
    assert (maps >= 0).all()


def test_fused_and_unfused_attention_have_the_same_maps() -> None:
    fused, unfused = attention_maps(vit(True), IMAGES), attention_maps(vit(False), IMAGES)
    assert list(fused) == list(unfused) == ["blocks.0.attn", "blocks.1.attn"]
    for name, maps in fused.items():
        assert_distributions(maps, heads=3, tokens=17)
        torch.testing.assert_close(maps, unfused[name])
    assert not torch.equal(fused["blocks.0.attn"], fused["blocks.1.attn"])
    torch.testing.assert_close(attention_maps(vit(True), IMAGES, "blocks.1.attn"), fused["blocks.1.attn"])


def test_maps_are_the_softmax_of_the_scaled_products() -> None:
    model = vit(True)
    attention = model.layers["blocks.0.attn"]
    tokens = model.input_of(IMAGES, "blocks.0.attn")
    query, key, _ = attention.qkv(tokens).unflatten(2, (3, 3, 64)).permute(2, 0, 3, 1, 4)  # type: ignore[operator]
    expected = (query @ key.transpose(-2, -1) / 8).softmax(-1)
    torch.testing.assert_close(attention_maps(model, IMAGES, "blocks.0.attn"), expected)


def test_network_of_the_kit_has_one_head() -> None:
    model = make_network("tokens")
    images = torch.rand(2, *model.input_size)
    for maps in attention_maps(model, images).values():
        assert maps.shape[:2] == (2, 1)
        torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_of_torch(batch_first: bool) -> None:
    torch.manual_seed(0)
    encoder = Encoder(batch_first, weights=True)
    model = load_model(encoder, input_size=(3, 32, 32))
    with torch.no_grad():
        logits, own = model(IMAGES), encoder.own
        assert own is not None
        maps = attention_maps(model, IMAGES, "attention")
    assert_distributions(maps, heads=2, tokens=16)
    torch.testing.assert_close(maps, own)
    encoder.weights = False
    torch.testing.assert_close(attention_maps(model, IMAGES, "attention"), own)
    with RecordAttention(model.layers):
        torch.testing.assert_close(model(IMAGES), logits)


@pytest.mark.parametrize("layer", ["fused", "unfused", "torch"])
def test_maps_are_on_the_graph_of_images_and_logits(layer: str) -> None:
    torch.manual_seed(0)
    model = (
        vit(layer == "fused")
        if layer != "torch"
        else load_model(Encoder(True, False), input_size=(3, 32, 32))
    )
    images = IMAGES.clone().requires_grad_()
    (image_gradient,) = torch.autograd.grad(
        next(iter(attention_maps(model, images).values()))[:, :, 0].max(), images
    )
    assert image_gradient.abs().max() > 0
    with model.guard(), RecordAttention(model.layers) as recording:
        score = model(images)[:, 0].sum()
    (gradient,) = torch.autograd.grad(score, next(iter(recording.maps.values())))
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal", "groups", "scale", "flat"])
def test_output_equals_that_of_the_fused_call(mask: str) -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 5, 8, generator=draw) for _ in range(3))
    settings: dict[str, Any] = {
        "none": {},
        "bool": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril(1)},
        "float": {"attn_mask": torch.randn(2, 1, 5, 5, generator=draw)},
        "causal": {"is_causal": True},
        "groups": {"enable_gqa": True},
        "scale": {"scale": 0.3},
        "flat": {},
    }[mask]
    if mask == "groups":
        key, value = key[:, :2], value[:, :2]
    if mask == "flat":
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
    expected = F.scaled_dot_product_attention(query, key, value, **settings)
    with RecordAttention({}) as recording:
        output = F.scaled_dot_product_attention(query, key, value, **settings)
    torch.testing.assert_close(output, expected)
    assert recording.maps[""].ndim == 4


def test_networks_without_attention_and_unknown_layers_are_refused() -> None:
    with pytest.raises(ModelError, match="no attention"):
        attention_maps(load_model("builtin:shapes-vgg"), torch.rand(1, 3, 64, 64))
    with pytest.raises(UnknownName, match=r"did you mean 'blocks\.1\.attn'"):
        attention_maps(vit(True), IMAGES, "block.1.attn")


def test_attention_inside_windows_is_no_map_per_image() -> None:
    network = timm.create_model(
        "swin_tiny_patch4_window7_224", pretrained=False, num_classes=3, depths=(1, 1, 1, 1)
    )
    model, images = load_model(network, input_size=(3, 224, 224)), torch.rand(1, 3, 224, 224)
    maps = attention_maps(model, images)
    assert list(maps) == ["layers.3.blocks.0.attn"]  # one window is the image there
    with pytest.raises(ModelError, match="inside windows"):
        attention_maps(model, images, "layers.0.blocks.0.attn")


def test_no_hook_is_registered_and_the_mode_is_restored() -> None:
    model = vit(True)
    training = [module.train().training for module in model.module.modules()]
    attention_maps(model, IMAGES)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert [module.training for module in model.module.modules()] == training
