"""The networks, images and targets on which relations are tested, in double precision.

Kernels, biases and normalization statistics are random and differ between channels and classes, so that a map
of another channel, class or layer, or of unnormalized pixels, is another map. ``hflip-gap`` and its siblings
are exactly symmetric under their transformation and under no other: kernels and flattened heads are averaged
with their transformed copy, and sides are multiples of the stride.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PhospheneError, UnknownName
from ..images.blur import gaussian_blur
from ..models import Model, load_model
from ..spec.relations import Transform, transformed
from ..torch_state import fork_random_state, seed_generators

MEAN, STD = (0.42, 0.53, 0.37), (0.21, 0.28, 0.33)
CLASSES = 4
#: Side of the image per side of the last feature map.
STRIDE = 4


@dataclass(frozen=True)
class RelationNetwork:
    """A model, images (N, C, H, W) and the target under which relations are tested.

    ``target`` is a class index, or None for the predicted class. ``ignored`` (H, W) marks the pixels on which
    no score depends, ``regions`` (N, H, W) the half of each image that its predicted class depends on.
    """

    name: str
    model: Model
    images: Tensor
    target: int | None = 1
    ignored: Tensor | None = None
    regions: Tensor | None = None


def relation_network(name: str) -> RelationNetwork:
    """A new instance of a network for relations, always with the same weights.

    Raises:
        UnknownName: another name than those of ``RELATION_NETWORKS``.
    """
    if name not in RELATION_NETWORKS:
        raise UnknownName("network for relations", name, RELATION_NETWORKS)
    return copy.deepcopy(_relation_network(name))


@functools.cache
def _relation_network(name: str) -> RelationNetwork:
    """One instance of a network, which is copied."""
    with fork_random_state():
        seed_generators(11)
        return RELATION_NETWORKS[name](name)


def recorded_relation_network(name: str) -> RelationNetwork:
    """``relation_network``, with the structure of its model, which is recorded once for all instances."""
    network, original = relation_network(name), _relation_network(name)
    with suppress(PhospheneError):
        original.model.attention_layers  # noqa: B018  (and the structure before it)
    network.model._cache = original.model._cache.of_copy()
    return network


def _model(module: nn.Module, size: tuple[int, int], *, normalized: bool = True) -> Model:
    mean, std = (MEAN, STD) if normalized else ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return load_model(module.double().eval(), input_size=(3, *size), mean=list(mean), std=list(std))


def _spread_logits(model: Model, images: Tensor) -> Model:
    """Scale and shift the last layer so that predictions differ between the images, with small margins."""
    head = [part for part in model.module.modules() if isinstance(part, nn.Linear)][-1]
    with torch.no_grad():
        head.weight.div_(2 * model(images).std(0).mean())
        head.bias.sub_(model(images).mean(0) - 0.1 * torch.rand(CLASSES, dtype=torch.float64))
    return model


def _images(count: int, size: tuple[int, int]) -> Tensor:
    """Smooth random images in [0, 1] without flat regions, where a maximum would be ambiguous."""
    noise = torch.rand(count, 3, *size, dtype=torch.float64)
    images = 0.5 + 1.5 * (gaussian_blur(noise, 1.5) - 0.5) + 0.25 * (noise - 0.5)
    return images.clamp(0.01, 0.99)


def _body(
    pool: nn.Module, *, padding_mode: Literal["zeros", "circular"] = "zeros", bias: bool = True
) -> list[nn.Module]:
    """Two convolutions with a total stride of 4."""
    first = nn.Conv2d(3, 6, 3, padding=1, padding_mode=padding_mode, bias=bias)
    second = nn.Conv2d(6, 8, 3, padding=1, padding_mode=padding_mode, bias=bias)
    norm = nn.BatchNorm2d(6)
    norm.running_mean.uniform_(-0.3, 0.3)  # type: ignore[union-attr]
    norm.running_var.uniform_(0.3, 1.2)  # type: ignore[union-attr]
    nn.init.uniform_(norm.weight, 0.6, 1.6)
    nn.init.uniform_(norm.bias, -0.1, 0.4)
    # Pooled before the ReLU: in a window of zeros the maximum's position would be arbitrary.
    layers: list[nn.Module] = [first, norm, pool, nn.ReLU(), second, nn.ReLU(), nn.AvgPool2d(2)]
    if not bias:
        layers.remove(norm)
    return layers


def _pooled_head(channels: int = 8) -> list[nn.Module]:
    head = nn.Linear(channels, CLASSES)
    nn.init.uniform_(head.weight, -1.0, 1.5)
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), head]


def _flat_head(size: tuple[int, int], *, hidden: int = 12, bias: bool = True) -> list[nn.Module]:
    cells = 8 * (size[0] // STRIDE) * (size[1] // STRIDE)
    return [
        nn.Flatten(),
        nn.Linear(cells, hidden, bias=bias),
        nn.ReLU(),
        nn.Linear(hidden, CLASSES, bias=bias),
    ]


def _symmetric(name: str) -> RelationNetwork:
    """A network that is symmetric under one transformation: ``hflip-gap``, ``transpose-flat``, ..."""
    transform, head = name.split("-")
    size = (32, 48) if transform in ("hflip", "vflip") else (48, 48)
    pool = nn.MaxPool2d(2) if head == "gap" else nn.AvgPool2d(2)
    body = _body(pool, padding_mode="circular" if transform == "shift" else "zeros")
    module = nn.Sequential(*body, *(_pooled_head() if head == "gap" else _flat_head(size)))
    if transform != "shift":  # a circular convolution is equivariant as it is
        _symmetrize(module, transform, (size[0] // STRIDE, size[1] // STRIDE))  # type: ignore[arg-type]
    images = _images(3, size)
    return RelationNetwork(name, _spread_logits(_model(module, size), images), images)


def _symmetrize(module: nn.Sequential, transform: Transform, grid: tuple[int, int]) -> None:
    """Average each kernel, and the first layer of a flattened head, with its transformed copy."""
    flattened = False
    for part in module:
        if isinstance(part, nn.Conv2d):
            part.weight.data = (part.weight.data + transformed(part.weight.data, transform)) / 2
        elif isinstance(part, nn.Linear) and flattened and part.in_features == 8 * grid[0] * grid[1]:
            weight = part.weight.data.unflatten(1, (8, *grid))
            part.weight.data = ((weight + transformed(weight, transform)) / 2).flatten(1)
        flattened = flattened or isinstance(part, nn.Flatten)


def _asymmetric(name: str) -> RelationNetwork:
    """A ReLU network without any symmetry, with a pooled or a flattened head of two layers."""
    size = (16, 24)
    module = nn.Sequential(*_body(nn.MaxPool2d(2)), *(_pooled_head() if name == "gap" else _flat_head(size)))
    images = _images(3, size)
    return RelationNetwork(name, _spread_logits(_model(module, size), images), images)


class _Tokens(nn.Module):
    """A token (N, T, C) for each patch of 4x4 pixels, with position embeddings, behind a class token."""

    def __init__(self, size: tuple[int, int], width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, STRIDE, stride=STRIDE)
        self.positions = nn.Parameter(0.5 * torch.randn(1, width, size[0] // STRIDE, size[1] // STRIDE))
        self.class_token = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = (self.patches(x) + self.positions).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(len(x), -1, -1), tokens], 1)


class _Block(nn.Module):
    """Attention with several heads and a perceptron, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = self.mix(self.norm1(tokens)).unflatten(2, (3, self.heads, -1))
        query, key, value = 3 * mixed.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.project(attended)
        result: Tensor = tokens + self.mlp(self.norm2(tokens))
        return result


class _ClassToken(nn.Module):
    """The first token."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


def _transformer(name: str) -> RelationNetwork:
    """A vision transformer with a class token, without symmetry or symmetric under one transformation."""
    transform = name.partition("-")[0]
    size = {"hflip": (32, 48), "vflip": (32, 48), "transpose": (48, 48)}.get(transform, (16, 24))
    width = 8
    tokens, head = _Tokens(size, width), nn.Linear(width, CLASSES)
    if transform in ("hflip", "vflip", "transpose"):
        for values in (tokens.patches.weight, tokens.positions):
            values.data = (values.data + transformed(values.data, transform)) / 2  # type: ignore[arg-type]
    blocks = _Block(width, 2), _Block(width, 4)
    module = nn.Sequential(tokens, *blocks, nn.LayerNorm(width), _ClassToken(), head)
    images = _images(3, size)
    model = _spread_logits(_model(module, size), images)
    if name == "constant-tokens":
        nn.init.zeros_(head.weight)
        nn.init.uniform_(head.bias, -1, 1)
    return RelationNetwork(name, model, images)


def _homogeneous(name: str) -> RelationNetwork:
    """Without biases and normalization: S(c x) = c S(x) for c > 0, and S(x) = x dS/dx."""
    size = (16, 24)
    body, head = _body(nn.MaxPool2d(2), bias=False), _flat_head(size, bias=False)
    return RelationNetwork(
        name, _model(nn.Sequential(*body, *head), size, normalized=False), _images(3, size)
    )


class _Square(nn.Module):
    """x^2 / 4 + x: smooth, and its slope changes with x."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square() / 4 + x


def _curved(name: str) -> RelationNetwork:
    """A smooth network whose gradient changes along the line from a baseline to the image."""
    size = (16, 24)
    body = [
        nn.Conv2d(3, 6, 3, padding=1),
        _Square(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.Softplus(),
    ]
    for part in body:
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, 0.05, 0.06)
    if name == "curved-gap":
        head = _pooled_head()
        nn.init.uniform_(head[-1].weight, 0.2, 1.0)  # type: ignore[arg-type]
    else:
        head = [nn.Flatten(), nn.Linear(8 * (size[0] // STRIDE) * (size[1] // STRIDE), CLASSES)]
        nn.init.uniform_(head[-1].weight, -0.05, 0.15)  # type: ignore[arg-type]
    images = (0.15 + 0.85 * _images(3, size)).clamp(0, 1)
    return RelationNetwork(name, _model(nn.Sequential(*body, nn.AvgPool2d(2), *head), size), images)


def _constant(name: str) -> RelationNetwork:
    """The same logits for every image: the last layer's weights are 0."""
    network = _asymmetric("gap")
    head = [part for part in network.model.module.modules() if isinstance(part, nn.Linear)][-1]
    nn.init.zeros_(head.weight)
    nn.init.uniform_(head.bias, -1, 1)
    return RelationNetwork(name, network.model, network.images)


def _half_blind(name: str) -> RelationNetwork:
    """A flattened head with weights of 0 for the right part of the map, on which no score depends."""
    size = (16, 24)
    grid = (size[0] // STRIDE, size[1] // STRIDE)
    head = nn.Linear(8 * grid[0] * grid[1], CLASSES)
    nn.init.uniform_(head.weight, -0.1, 0.2)
    head.weight.data.unflatten(1, (8, *grid))[..., grid[1] // 2 :] = 0
    module = nn.Sequential(*_body(nn.MaxPool2d(2)), nn.Flatten(), head)
    ignored = torch.zeros(size, dtype=torch.bool)
    # The receptive field of the last position that counts ends 3 pixels to the right of its cell.
    ignored[:, size[1] // 2 + STRIDE :] = True
    images = _images(3, size)
    return RelationNetwork(name, _spread_logits(_model(module, size), images), images, ignored=ignored)


def _halves(name: str) -> RelationNetwork:
    """Classes left, right, top and bottom, each activated by a bright object in that half of the image."""
    size = (32, 48)
    height, width = size
    regions = torch.zeros(CLASSES, *size, dtype=torch.bool)
    regions[0, :, : width // 2] = True
    regions[1, :, width // 2 :] = True
    regions[2, : height // 2] = True
    regions[3, height // 2 :] = True
    first, second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
    for conv, low, high in ((first, 0.02, 0.08), (second, 0.01, 0.05)):
        nn.init.uniform_(conv.weight, low, high)
    # Below the mean color no unit of the first layer is active.
    nn.init.uniform_(first.bias, -0.15, -0.05)  # type: ignore[arg-type]
    nn.init.zeros_(second.bias)  # type: ignore[arg-type]
    body = [first, nn.MaxPool2d(2), nn.ReLU(), second, nn.ReLU(), nn.AvgPool2d(2)]
    grid = (height // STRIDE, width // STRIDE)
    if name == "halves-gap":
        head = nn.Linear(8, CLASSES)
        nn.init.uniform_(head.weight, 0.5, 1.5)
        module = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    else:
        head = nn.Linear(8 * grid[0] * grid[1], CLASSES)
        # Logits of 0 to 2, at which the softmax is not saturated.
        weight = torch.empty(CLASSES, 8, *grid).uniform_(0.5, 1.5) * regions[:, None, ::STRIDE, ::STRIDE]
        head.weight.data = weight.flatten(1) / (6 * grid[0] * grid[1])
        module = nn.Sequential(*body, nn.Flatten(), head)
    nn.init.zeros_(head.bias)
    noise = torch.rand(CLASSES, 3, *size, dtype=torch.float64)
    images = torch.where(regions[:, None], 0.75 + 0.25 * noise, 0.12 * noise)
    return RelationNetwork(name, _model(module, size), images, target=None, regions=regions)


#: Networks for relations by name.
RELATION_NETWORKS: dict[str, Callable[[str], RelationNetwork]] = {
    **{
        f"{transform}-{head}": _symmetric
        for transform in ("hflip", "vflip", "transpose")
        for head in ("gap", "flat")
    },
    "shift-gap": _symmetric,
    "gap": _asymmetric,
    "flat": _asymmetric,
    "homogeneous": _homogeneous,
    "curved": _curved,
    "curved-gap": _curved,
    "constant": _constant,
    "tokens": _transformer,
    "constant-tokens": _transformer,
    **{f"{transform}-tokens": _transformer for transform in ("hflip", "vflip", "transpose")},
    "half-blind": _half_blind,
    "halves": _halves,
    "halves-gap": _halves,
}

#: The transformers that replace a relation's networks for a method that refuses all of these.
TRANSFORMERS = {
    **{network: "tokens" for network in ("gap", "flat")},
    **{
        f"{transform}-{head}": f"{transform}-tokens"
        for transform in ("hflip", "vflip", "transpose")
        for head in ("gap", "flat")
    },
    "constant": "constant-tokens",
}


class _Normalize(nn.Module):
    """(x - mean) / std as a layer."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = (x - self.mean) / self.std
        return result


def normalized_inside(model: Model) -> Model:
    """A model with the same logits that has no normalization: its first layer normalizes instead."""
    module = model.module
    assert isinstance(module, nn.Sequential)
    first = _Normalize(model.mean.double(), model.std.double())
    return _model(nn.Sequential(first, *module), (model.input_size[1], model.input_size[2]), normalized=False)
