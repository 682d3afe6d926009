"""Small networks on which every method is tested: each has one property that a method may mishandle."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnknownName
from ..models import Model, load_model
from ..models.tasks import Task
from ..torch_state import fork_random_state, seed_generators

CLASSES = 5
SIZE = 24


def _gap(channels: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


class _Functional(nn.Module):
    """Functional, in-place functional and reused ReLUs; pooling by ``mean`` instead of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.relu = nn.ReLU()
        self.classifier = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        x = F.relu_(self.conv2(x)) + x
        x = self.relu(F.relu(self.conv3(x)))
        return self.classifier(x.mean((2, 3)))


def _flat() -> nn.Module:
    side = SIZE // 4
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * side * side, 16),
        nn.ReLU(),
        nn.Linear(16, CLASSES),
    )


def _relu6() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU6(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU6(inplace=True),
        nn.Conv2d(8, 16, 1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


def _gelu() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4),
        nn.GroupNorm(2, 8),
        nn.GELU(),
        nn.Conv2d(8, 12, 3, padding=2, dilation=2),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.mix(self.norm(tokens)).chunk(3, dim=-1)
        return tokens + self.project(F.scaled_dot_product_attention(query, key, value))


class _Tokens(nn.Module):
    """A small vision transformer: patches, a class token, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 6, stride=6)
        self.class_token = nn.Parameter(0.1 * torch.randn(1, 1, 12))
        self.blocks = nn.Sequential(_Attention(12), _Attention(12))
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], 1)
        return self.head(self.norm(self.blocks(tokens))[:, 0])


class _ChannelsLast(nn.Module):
    """Features as (N, H, W, C), as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.grow = nn.Linear(8, 16)
        self.act = nn.GELU()
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patches(x).permute(0, 2, 3, 1))
        return self.head(self.act(self.grow(x)).mean((1, 2)))


class _Tuple(nn.Module):
    """Returns logits and something else, as networks with auxiliary heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _gap()

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.body(x), [x.mean((2, 3))]


class _MixedFlags(nn.Module):
    """In train mode, with mixed flags, dropout, a frozen weight, an old gradient and a user's hook."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2)
        self.dropout = nn.Dropout(0.5)
        self.conv3 = nn.Conv2d(12, 16, 3, padding=2, dilation=2)
        self.bn3 = nn.BatchNorm2d(16)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(16, CLASSES)
        self.conv2.weight.requires_grad = False
        self.bn1.eval()
        self.classifier.weight.grad = torch.ones_like(self.classifier.weight)
        self.conv3.register_forward_hook(lambda module, args, output: None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.dropout(F.relu(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(x)))
        return self.classifier(torch.flatten(self.pool(x), 1))


class _MultiheadBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        normalized = self.norm(tokens)
        return tokens + self.attention(normalized, normalized, normalized, need_weights=False)[0]


class _HeadsBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        count, length, width = tokens.shape
        mixed = self.mix(self.norm(tokens)).view(count, length, 3, self.heads, width // self.heads)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return tokens + self.project(attended.transpose(1, 2).reshape(count, length, width))


class _Heads(_Tokens):
    """A small vision transformer whose attention has several heads."""

    def __init__(self, block: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(block(12, 3), block(12, 2))


def _few_classes(classes: int) -> nn.Module:
    network = _gap()
    network[8] = nn.Linear(12, classes)
    return network


def _one_logit() -> nn.Module:
    return nn.Sequential(_few_classes(1), nn.Flatten(0))


def _headless() -> nn.Module:
    network = _gap()
    network[8] = nn.Identity()
    return network


class _Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = _gap()[:6]
        self.classifier = nn.Conv2d(12, CLASSES, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.classifier(self.body(x))
        return {"out": F.interpolate(logits, x.shape[2:], mode="bilinear")}


class _Detector(nn.Module):
    """A box for each class, where its map is largest; the score is the largest value's sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _gap()[:6]
        self.classifier = nn.Conv2d(12, CLASSES, 1)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        maps = self.classifier(self.backbone(x)).sigmoid()
        scores, peaks = maps.flatten(2).max(2)
        centers = 2 * torch.stack([peaks % maps.shape[3], peaks // maps.shape[3]], 2).to(x)
        boxes = torch.cat([centers - 6, centers + 6], 2)
        labels = torch.arange(CLASSES, device=x.device)
        return [{"boxes": b, "labels": labels, "scores": s} for b, s in zip(boxes, scores, strict=True)]


class _Latents(nn.Module):
    """A Perceiver: nine latents, as many as a grid of 3 x 3 has cells, attend to the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)
        self.latents = nn.Parameter(torch.randn(9, 12))
        self.block, self.norm, self.head = _Attention(12), nn.LayerNorm(12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        attended = F.scaled_dot_product_attention(self.latents.expand(len(x), -1, -1), tokens, tokens)
        return self.head(self.norm(self.block(attended)).mean(1))


class _Rows(nn.Module):
    """A network for images of 12x12 that reshapes larger ones to several rows."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classifier = _gap()[:6], nn.Linear(12 * 36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x).reshape(-1, 12 * 36))


class _NotFinite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = _gap()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * torch.nan


class _TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = _headless()
        self.classifier = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return features, self.classifier(features)


def _identities() -> nn.Module:
    """Each ``copy`` returns the output of the layer before it unchanged."""
    layers = {
        "conv1": nn.Conv2d(3, 8, 3, padding=1),
        "conv1_copy": nn.Identity(),
        "relu1": nn.ReLU(),
        "relu1_copy": nn.Identity(),
        "conv2": nn.Conv2d(8, 8, 3, padding=1),
        "conv2_copy": nn.Identity(),
        "relu2": nn.ReLU(),
        "relu2_copy": nn.Identity(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "classifier": nn.Linear(8, CLASSES),
    }
    return nn.Sequential(OrderedDict(layers))


def _colors() -> nn.Module:
    """Logit k grows with the area and the strength of red, green or blue, and depends on nothing else."""
    detect, spread, head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Linear(3, 3)
    weight = 1.25 * torch.eye(3) - 0.25
    spot = torch.tensor([[0.0, 0.1, 0.0], [0.1, 0.6, 0.1], [0.0, 0.1, 0.0]])
    with torch.no_grad():
        # For pixels p normalized to (p - 0.5) / 0.25: weight @ p - 0.3, so that gray and black are below 0.
        detect.weight.copy_(0.25 * weight[:, :, None, None])
        detect.bias.copy_(0.5 * weight.sum(1) - 0.3)  # type: ignore[union-attr]
        spread.weight.copy_(torch.eye(3)[:, :, None, None] * spot)
        head.weight.copy_(40 * torch.eye(3))
        head.bias.zero_()
    pool = [nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(detect, nn.ReLU(), spread, nn.ReLU(), *pool, head)


def _fragile() -> nn.Sequential:
    """Logits that small changes of many pixels turn over: a linear network behind a leaky ReLU."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.LeakyReLU(0.5), nn.Flatten(), nn.Linear(6 * SIZE * SIZE, CLASSES)
    )


def _robust() -> nn.Module:
    """The same for class 0, whose logit is larger than small changes of the pixels can outweigh."""
    network = _fragile()
    with torch.no_grad():
        network.get_submodule("3").bias[0] += 12  # type: ignore[index,operator]
    return network


def _probabilities() -> nn.Module:
    return nn.Sequential(_fragile(), nn.Sigmoid())


def _constant() -> nn.Module:
    network = _gap()
    nn.init.zeros_(network.get_submodule("8").weight)  # type: ignore[arg-type]
    return network


def _saturated() -> nn.Module:
    network = _gap()
    nn.init.uniform_(network.get_submodule("8").weight, -3e3, 3e3)  # type: ignore[arg-type]
    return network


def _randomize_norms(module: nn.Module) -> nn.Module:
    """Random batch norm statistics: forgetting eval mode or folding them wrongly changes the result."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None:
            part.running_mean.uniform_(-0.2, 0.2)
            part.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, 0.0, 0.3)
    return module


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gap": (_gap, "batch norm, in-place ReLU, GAP + linear head"),
    "functional": (_Functional, "functional, in-place and reused ReLUs"),
    "flat": (_flat, "a flattened map before two linear layers: one image size only"),
    "relu6": (_relu6, "ReLU6, depthwise and grouped convolutions"),
    "gelu": (_gelu, "no ReLU at all; a dilated convolution"),
    "tokens": (_Tokens, "patches and a class token: (N, T, C)"),
    "nhwc": (_ChannelsLast, "channels last: (N, H, W, C)"),
    "tuple": (_Tuple, "returns a tuple"),
    "double": (
        lambda: _MixedFlags().double(),
        "double precision, train mode, frozen weight, a user's hook",
    ),
    "gray": (lambda: _gap(1), "takes one channel"),
    "constant": (_constant, "the same logits for every image"),
    "saturated": (_saturated, "logits so large that softmax has no gradient"),
    "unsized": (_flat, "no input size of its own, and accepts images of 24x24 only, not the default 224x224"),
    "multihead": (lambda: _Heads(_MultiheadBlock), "nn.MultiheadAttention with several heads"),
    "heads": (lambda: _Heads(_HeadsBlock), "F.scaled_dot_product_attention with several heads"),
    "two": (lambda: _few_classes(2), "two classes"),
    "one": (lambda: _few_classes(1), "a single class, which is always predicted"),
    "binary": (_one_logit, "one logit (N,) of a binary classifier"),
    "undeclared": (lambda: _few_classes(1), "one number per image, a logit or a regression: not declared"),
    "multilabel": (_gap, "several classes can be present"),
    "regression": (_gap, "values, no classes"),
    "dense": (_Dense, "a segmentation: logits (N, K, H, W)"),
    "detector": (_Detector, "boxes, labels and scores for each image"),
    "headless": (_headless, "an embedding, no classes"),
    "latents": (_Latents, "tokens without positions: latents that attend to the patches"),
    "rows": (_Rows, "four rows of logits for each image, which mix positions and images"),
    "nan": (_NotFinite, "logits that are NaN"),
    "two outputs": (_TwoOutputs, "features and logits, either of which can be the logits"),
}

#: What the output of a network means, where that is declared.
TASKS: dict[str, Task] = {
    "one": "classification",
    "binary": "binary",
    "multilabel": "multilabel",
    "regression": "regression",
    "dense": "segmentation",
    "detector": "detection",
    "headless": "embedding",
}

#: Networks that single checks need, on which not every method is run.
PURPOSE_BUILT: dict[str, Callable[[], nn.Module]] = {
    "identities": _identities,
    "colors": _colors,
    "fragile": _fragile,
    "robust": _robust,
    "probabilities": _probabilities,
}


def make_network(name: str) -> Model:
    """A new instance of one of the small networks, or the bundled ``shapes-vgg``; always the same weights."""
    if name == "shapes-vgg":
        return copy.deepcopy(_bundled_network())
    if name not in NETWORKS and name not in PURPOSE_BUILT:
        raise UnknownName("network", name, network_names())
    with fork_random_state():
        seed_generators(2)
        module = PURPOSE_BUILT[name]() if name in PURPOSE_BUILT else _randomize_norms(NETWORKS[name][0]())
    channels = 1 if name == "gray" else 3
    module.train(name == "double")
    if name == "double":
        module.get_submodule("bn1").eval()
    normalization: dict[str, Any] = {"mean": [0.5] * channels, "std": [0.25] * channels}
    if name == "unsized":
        return load_model(module, classes=[f"class {n}" for n in range(CLASSES)], **normalization)
    return load_model(module, input_size=(channels, SIZE, SIZE), task=TASKS.get(name), **normalization)


@functools.cache
def _bundled_network() -> Model:
    """One instance of the bundled network, which is copied: reading it takes longer."""
    return load_model("builtin:shapes-vgg")


def network_names() -> Iterable[str]:
    """The names of the networks that every method is tested on."""
    return (*NETWORKS, "shapes-vgg")


def image_size(model: Model) -> tuple[int, int]:
    """Height and width of the images that a model is tested on: its own, or 24x24 where it has none."""
    return model.input_size[1:] if model.size_known else (SIZE, SIZE)


def redraw_weights(module: nn.Module, seed: int) -> None:
    """Replace all weights in place by random ones of the same mean and spread; a constant one by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.is_floating_point() and weight.numel():
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                spread = weight.std() if weight.numel() > 1 and float(weight.std()) > 0 else 0.1
                weight.copy_(noise * spread + weight.mean())


def standardize_logits(model: Model, images: Tensor, deviation: float = 1.0) -> None:
    """Change the last linear layer so that each logit has mean 0 and this standard deviation over images.

    Predictions then differ between the images, the more certain the larger the deviation is.
    """
    head = [part for part in model.module.modules() if isinstance(part, nn.Linear)][-1]
    with torch.no_grad():
        logits = model(images)
        scale = logits.std(0).clamp(min=1e-6) / deviation
        head.weight.div_(scale[:, None])
        if head.bias is not None:
            head.bias.copy_((head.bias - logits.mean(0)) / scale)
