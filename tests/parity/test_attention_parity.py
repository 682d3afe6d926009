"""Attention methods agree with torchcam and with the published equations for torchvision's ViT."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from phosphene import load_model, run
from phosphene.models import Model

CLASS = 3


@pytest.fixture(scope="module")
def network() -> VisionTransformer:
    torch.manual_seed(0)
    network = VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
    nn.init.normal_(network.heads[0].weight)  # torchvision initializes it with zeros
    for block in network.encoder.layers:
        block.self_attention.in_proj_weight.data *= 3
    return network.double().eval()


@pytest.fixture(scope="module")
def model(network: VisionTransformer) -> Model:
    return load_model(network, input_size=(3, 32, 32), mean=[0.5] * 3, std=[0.25] * 3)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def attention_of(network: VisionTransformer, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The logits and each block's attention (N, heads, T, T) on the graph, computed from the weights."""
    tokens = network._process_input(pixels)
    tokens = torch.cat([network.class_token.expand(len(pixels), -1, -1), tokens], 1)
    tokens, computed = tokens + network.encoder.pos_embedding, []
    for block in network.encoder.layers:
        attention = block.self_attention
        mixed = nn.functional.linear(block.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = mixed.unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        computed.append((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1))
        tokens = tokens + attention.out_proj((computed[-1] @ value).transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.ln_2(tokens))
    return network.heads(network.encoder.ln(tokens)[:, 0]), computed


def test_legrad_equals_that_of_torchcam(network: VisionTransformer, model: Model, images: Tensor) -> None:
    from torchcam.methods import LeGrad

    result = run("legrad", model=model, images=images, target=CLASS)
    for image, ours in zip(images, result.maps, strict=True):
        with LeGrad(network, [*network.encoder.layers]) as extract:
            logits = network(model.normalize(image[None]).requires_grad_())
            # torchcam returns a map for each layer, and its mean over layers is of normalized maps.
            maps = extract(CLASS, logits, normalized=False)
        torch.testing.assert_close(torch.stack(maps).mean(0)[0], ours)


def test_rollout_equals_the_published_recursion(
    network: VisionTransformer, model: Model, images: Tensor
) -> None:
    _, attention = attention_of(network, model.normalize(images))
    rollout = torch.eye(17, dtype=torch.float64)
    for layer in attention:
        mixed = layer.mean(1) + torch.eye(17, dtype=torch.float64)
        rollout = mixed / mixed.sum(-1, keepdim=True) @ rollout
    result = run("attention_rollout", model=model, images=images)
    torch.testing.assert_close(result.maps, rollout[:, 0, 1:].unflatten(1, (4, 4)))


def test_gradient_attention_equals_the_published_recursion(
    network: VisionTransformer, model: Model, images: Tensor
) -> None:
    logits, attention = attention_of(network, model.normalize(images))
    gradients = torch.autograd.grad(logits[:, CLASS].sum(), attention)
    relevance = torch.eye(17, dtype=torch.float64).repeat(2, 1, 1)
    for layer, gradient in zip(attention, gradients, strict=True):
        relevance = relevance + (gradient * layer).clamp(min=0).mean(1) @ relevance
    result = run("gradient_attention", model=model, images=images, target=CLASS)
    torch.testing.assert_close(result.maps, relevance[:, 0, 1:].unflatten(1, (4, 4)))


@pytest.mark.parametrize("attention", ["cp_lrp", "attn_lrp"])
def test_lrp_equals_gradient_x_input_of_the_published_formulation(
    attention: str, network: VisionTransformer, model: Model, images: Tensor
) -> None:
    """The forward formulation of Achtibat et al. 2024, with constant factors; lxt computes the same."""

    def scaled(x: Tensor, share: float) -> Tensor:
        return share * x + (1 - share) * x.detach()

    def normed(layer: nn.LayerNorm, x: Tensor) -> Tensor:
        deviation = (x.var(-1, correction=0, keepdim=True) + layer.eps).sqrt().detach()
        return (x - x.mean(-1, keepdim=True)) / deviation * layer.weight + layer.bias

    pixels = model.normalize(images).requires_grad_()
    tokens = network._process_input(pixels)
    tokens = torch.cat([network.class_token.expand(2, -1, -1), tokens], 1) + network.encoder.pos_embedding
    for block in network.encoder.layers:
        layer = block.self_attention
        mixed = nn.functional.linear(normed(block.ln_1, tokens), layer.in_proj_weight, layer.in_proj_bias)
        query, key, value = mixed.unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        if attention == "attn_lrp":
            query, key, value = scaled(query, 0.25), scaled(key, 0.25), scaled(value, 0.5)
        probabilities = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        if attention == "cp_lrp":
            probabilities = probabilities.detach()
        tokens = tokens + layer.out_proj((probabilities @ value).transpose(1, 2).flatten(2))
        hidden = block.mlp[0](normed(block.ln_2, tokens))
        hidden = hidden * (nn.functional.gelu(hidden) / hidden).detach()
        tokens = tokens + block.mlp[3](hidden)
    logits = network.heads(normed(network.encoder.ln, tokens)[:, 0])
    (gradient,) = torch.autograd.grad(logits[:, CLASS].sum(), pixels)
    result = run("lrp", model=model, images=images, target=CLASS, attention=attention, epsilon=0)
    torch.testing.assert_close(result.maps, (pixels * gradient).sum(1).detach())
