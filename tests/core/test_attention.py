"""Attention probabilities: fused, unfused, torch.nn.MultiheadAttention, windows, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from phosphene import ModelError, UnknownName, attention_centers, load_model
from phosphene.hooks import RecordAttention
from phosphene.models import Model
from phosphene.models.token_maps import Layout
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
    fused, unfused = vit(True).attention(IMAGES), vit(False).attention(IMAGES)
    assert list(fused) == list(unfused) == ["blocks.0.attn", "blocks.1.attn"]
    for name, maps in fused.items():
        assert_distributions(maps, heads=3, tokens=17)
        torch.testing.assert_close(maps, unfused[name])
    assert not torch.equal(fused["blocks.0.attn"], fused["blocks.1.attn"])
    (last,) = vit(True).attention(IMAGES, ["blocks.1.attn"]).values()
    torch.testing.assert_close(last, fused["blocks.1.attn"])


def test_maps_are_the_softmax_of_the_scaled_products() -> None:
    model = vit(True)
    attention = model.layers["blocks.0.attn"]
    tokens = model.input_of(IMAGES, "blocks.0.attn")
    query, key, _ = attention.qkv(tokens).unflatten(2, (3, 3, 64)).permute(2, 0, 3, 1, 4)  # type: ignore[operator]
    expected = (query @ key.transpose(-2, -1) / 8).softmax(-1)
    torch.testing.assert_close(model.attention(IMAGES, ["blocks.0.attn"])["blocks.0.attn"], expected)


def test_network_of_the_kit_has_one_head() -> None:
    model = make_network("tokens")
    images = torch.rand(2, *model.input_size)
    for maps in model.attention(images).values():
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
        maps = model.attention(IMAGES, ["attention"])["attention"]
    assert_distributions(maps, heads=2, tokens=16)
    torch.testing.assert_close(maps, own)
    encoder.weights = False
    torch.testing.assert_close(model.attention(IMAGES, ["attention"])["attention"], own)
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
        next(iter(model.attention(images).values()))[:, :, 0].max(), images
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
        load_model("builtin:shapes-vgg").attention(torch.rand(1, 3, 64, 64))
    with pytest.raises(UnknownName, match=r"did you mean 'blocks\.1\.attn'"):
        vit(True).attention(IMAGES, ["block.1.attn"])


def swin(fused: bool) -> Model:
    """Windows of 4x4 of a map of 8x8, the second block shifted by 2; a last stage of one window."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"img_size": 32, "window_size": 4, "num_classes": 3, "depths": (2, 1)}
    network = timm.models.swin_transformer.SwinTransformer(embed_dim=12, num_heads=(3, 6), **settings)
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return load_model(network, input_size=(3, 32, 32))


def test_attention_inside_windows_has_an_axis_of_windows() -> None:
    model = swin(True)
    maps, unfused = model.attention(IMAGES), swin(False).attention(IMAGES)
    assert [tuple(m.shape) for m in maps.values()] == [
        *[(2, 4, 3, 16, 16)] * 2,
        (2, 6, 16, 16),
    ]
    for name, values in maps.items():
        torch.testing.assert_close(values, unfused[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(values.sum(-1), torch.ones_like(values[..., 0]))
        # The windows are of the images that they are reported for.
        torch.testing.assert_close(values[1:], model.attention(IMAGES[1:])[name], rtol=0, atol=1e-6)
    layer = model.attention_layers["layers.0.blocks.1.attn"]
    assert (layer.windows, layer.heads, layer.layout) == (4, 3, None)
    # A shifted window attends inside each region of the image that it joins.
    shifted = maps["layers.0.blocks.1.attn"][:, 3, :, 0]
    assert (shifted.unflatten(-1, (4, 4))[..., 2:, :] < 1e-6).all()


def test_windows_have_the_positions_of_their_tokens() -> None:
    model = swin(True)
    pixels = torch.stack(torch.meshgrid(*(4.0 * torch.arange(8) + 1.5,) * 2, indexing="ij"), -1)
    for name, shift in (("layers.0.blocks.0.attn", 0), ("layers.0.blocks.1.attn", 2)):
        rolled = pixels.roll((-shift, -shift), (0, 1))
        expected = rolled.unflatten(0, (2, 4)).unflatten(2, (2, 4)).transpose(1, 2).reshape(4, 16, 2)
        centers = attention_centers(model, name, (32, 32))
        assert centers is not None
        torch.testing.assert_close(centers, expected.double())
    with pytest.raises(UnknownName, match="attention layer"):
        attention_centers(model, "layers.0", (32, 32))


def test_windows_of_torchvision_are_read() -> None:
    torch.manual_seed(0)
    network = torchvision.models.SwinTransformer([4, 4], 12, [2], [3], [4, 4], num_classes=3)
    model = load_model(network, input_size=(3, 32, 32))
    assert [(a.windows, a.queries) for a in model.attention_layers.values()] == [(4, 16)] * 2
    for values in model.attention(IMAGES).values():
        torch.testing.assert_close(values.sum(-1), torch.ones_like(values[..., 0]))
    centers = attention_centers(model, "features.1.1.attn", (32, 32))
    assert centers is not None and centers[0, 0].tolist() == [9.5, 9.5]


def test_layers_say_which_tokens_attend_and_are_read() -> None:
    layers = vit(True).attention_layers
    assert [(a.heads, a.windows, a.queries, a.keys, a.calls) for a in layers.values()] == [
        (3, 1, 17, 17, 1)
    ] * 2
    first, last = layers.values()
    assert first.layout == last.layout == Layout("NTC", (4, 4), before=1)
    assert (first.read, last.read) == (tuple(range(17)), (0,))  # the head reads the class token
    assert vit(True, global_pool="avg").attention_layers["blocks.1.attn"].read == tuple(range(1, 17))
    pooled = vit(True, global_pool="map", class_token=False).attention_layers
    assert (pooled["attn_pool"].queries, pooled["attn_pool"].keys, pooled["attn_pool"].layout) == (
        1,
        16,
        None,
    )
    assert load_model("builtin:shapes-vgg").attention_layers == {}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_of_transformers(implementation: str) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=32,
        patch_size=8, attn_implementation=implementation,
    )  # fmt: skip
    network = ViTForImageClassification(config).eval()
    maps = load_model(network, input_size=(3, 32, 32)).attention(IMAGES)
    network.set_attn_implementation("eager")
    with torch.no_grad():
        expected = network(IMAGES, output_attentions=True).attentions
    for values, reference in zip(maps.values(), expected, strict=True):
        torch.testing.assert_close(values, reference, rtol=0, atol=1e-6)


def test_attention_of_torchvision_and_open_clip_is_that_of_their_multihead_attention() -> None:
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    of_torchvision = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)
    of_open_clip = VisionTransformer(32, 8, 16, 2, 2, 2.0, output_dim=6)
    for network in (of_torchvision, of_open_clip):
        model = load_model(network, input_size=(3, 32, 32), task="embedding")
        maps = model.attention(IMAGES)
        assert len(maps) == 2
        for name, values in maps.items():
            module = model.layers[name]
            assert isinstance(module, nn.MultiheadAttention)
            tokens = model.input_of(IMAGES, name)
            _, expected = module(tokens, tokens, tokens, average_attn_weights=False)
            torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)


def test_attention_is_replaced() -> None:
    model = vit(False)

    def without_first_head(name: str, probabilities: Tensor) -> Tensor:
        heads = torch.tensor([0.0 if name == "blocks.1.attn" else 1, 1, 1])
        return probabilities * heads[:, None, None]

    with model.record_attention(without_first_head) as recording:
        logits = model(IMAGES)
    assert not recording.maps["blocks.1.attn"][:, 0].any() and recording.maps["blocks.0.attn"][:, 0].any()
    projection = model.layers["blocks.1.attn.proj"]
    with model.tap("blocks.1.attn.norm", replace=lambda x: torch.cat([0 * x[..., :64], x[..., 64:]], -1)):
        expected = model(IMAGES)
    assert isinstance(projection, nn.Linear)
    torch.testing.assert_close(logits, expected)


def test_attention_of_more_axes_is_refused() -> None:
    class Windows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tokens = x.mean(1).flatten(1).view(len(x), 2, 4, 32, 4)
            return F.scaled_dot_product_attention(tokens, tokens, tokens).flatten(1)[:, :3]

    with pytest.raises(ModelError, match="cannot be distinguished"):
        load_model(nn.Sequential(Windows()), input_size=(3, 32, 32)).attention(IMAGES)


def test_no_hook_is_registered_and_the_mode_is_restored() -> None:
    model = vit(True)
    training = [module.train().training for module in model.module.modules()]
    model.attention(IMAGES)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert [module.training for module in model.module.modules()] == training


def test_maps_equal_those_that_timm_extracts() -> None:
    from timm.utils import AttentionExtract

    model = vit(False)
    with torch.no_grad():
        expected = AttentionExtract(model.module, method="hook")(model.normalize(IMAGES))
    maps = model.attention(IMAGES)
    assert len(expected) == len(maps)
    for values, reference in zip(maps.values(), expected.values(), strict=True):
        torch.testing.assert_close(values, reference, rtol=0, atol=1e-6)


# --- windows on an axis of their own ----------------------------------------------------------------


def hiera(fused: bool) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("hiera_tiny_224", img_size=(64, 64), stages=(1, 1, 1, 1), num_classes=3)
        nn.init.normal_(network.get_classifier().weight)
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return load_model(network.eval(), input_size=(3, 64, 64))


def maxvit() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torchvision.models.MaxVit(
            input_size=(64, 64), stem_channels=8, partition_size=2, block_channels=[8, 16],
            block_layers=[1, 1], head_dim=4, stochastic_depth_prob=0.0, num_classes=3,
        )  # fmt: skip
    return load_model(network.eval(), input_size=(3, 64, 64))


def hiera_probabilities(module: Any, tokens: Tensor) -> Tensor:
    """Token t of mask unit w is row t * windows + w: probabilities (N, windows, heads, q, k)."""
    count = tokens.shape[1] // (module.q_stride * module.window_size)
    qkv = module.qkv(tokens).view(len(tokens), -1, count, 3, module.heads, module.head_dim)
    query, key = (qkv[:, :, :, n].permute(0, 2, 3, 1, 4) for n in (0, 1))
    if module.q_stride > 1:
        query = query.unflatten(3, (module.q_stride, -1)).amax(3)
    return (query @ key.mT * module.head_dim**-0.5).softmax(-1)


def maxvit_probabilities(module: Any, tokens: Tensor) -> Tensor:
    query, key, _ = (t.unflatten(-1, (module.n_heads, -1)).transpose(2, 3) for t in
                     module.to_qkv(tokens).chunk(3, -1))  # fmt: skip
    bias = module.get_relative_positional_bias()
    return (query @ key.mT * module.scale_factor + bias).softmax(-1)


@pytest.mark.parametrize("kind", ["hiera fused", "hiera", "maxvit"])
def test_windows_with_an_axis_of_their_own_are_read_and_located(kind: str) -> None:
    model = maxvit() if kind == "maxvit" else hiera("fused" in kind)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    plain = model(images)
    layers = {n: m for n, m in model.layers.items() if hasattr(m, "qkv") or hasattr(m, "to_qkv")}
    tokens = dict(zip(layers, model.features_of(images, [*layers], inputs=True), strict=True))
    compute = maxvit_probabilities if kind == "maxvit" else hiera_probabilities
    maps = model.attention(images)
    windowed = 0
    for name, layer in model.attention_layers.items():
        own = next(n for n in layers if name.startswith(n))
        module: Any = layers[own]
        if kind != "maxvit" and not module.use_mask_unit_attn:
            continue
        windowed += layer.windows > 1
        expected = compute(module, tokens[own])
        assert (layer.windows, layer.heads) == expected.shape[1:3]
        recorded = maps[name] if layer.windows > 1 else maps[name][:, None]
        torch.testing.assert_close(recorded, expected, rtol=0, atol=1e-6)
        centers = attention_centers(model, name, (64, 64))
        assert centers is not None and centers.shape == (layer.windows, layer.queries, 2)
        # The windows divide the tokens of the layer among them.
        positions = {tuple(yx) for yx in centers.flatten(0, 1).tolist()}
        assert len(positions) == layer.windows * layer.queries
        extent = (centers.amax(1) - centers.amin(1)).amax().item()
        assert extent >= 32 if "grid" in name else extent < 32
    assert windowed >= 2
    # The network continues with what is recorded, and may be changed.
    with model.record_attention() as recording:
        torch.testing.assert_close(model(images), plain, rtol=1e-5, atol=1e-6)
    name = next(n for n, layer in model.attention_layers.items() if layer.windows > 1)
    assert len(recording.maps[name]) == 2 * model.attention_layers[name].windows
    with model.record_attention(lambda _, a: torch.full_like(a, 1 / a.shape[-1])):
        assert not torch.allclose(model(images), plain, rtol=1e-4, atol=0)


def test_the_window_of_a_changed_pixel_is_the_one_at_its_position() -> None:
    model = hiera(True)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1)
    images[1, :, 44:52, 12:20] = 0  # inside the third of the four mask units of 32 x 32 pixels
    first, second = model.attention(images, ["blocks.0.attn"])["blocks.0.attn"]
    changed = (first - second).abs().flatten(1).amax(1) > 1e-6
    centers = attention_centers(model, "blocks.0.attn", (64, 64))
    assert centers is not None
    (window,) = changed.nonzero()[:, 0].tolist()
    assert (centers[window].mean(0) - torch.tensor([48.0, 16.0])).abs().max() < 4
