"""What a model is made of: its layers as they run, its last map, its head, its token grid."""

from __future__ import annotations

import math
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..taps import guard, passed_on


@dataclass(frozen=True)
class LayerInfo:
    """One layer as it ran: shape of its (last) output without the batch, and how often it ran."""

    name: str
    type: str
    shape: tuple[int, ...] | None
    calls: int
    parameters: int


@dataclass(frozen=True)
class Head:
    """Global average pooling and one linear layer: S_c = sum_k weight[c, k] * mean_xy f_k(x, y) + bias[c].

    ``layer`` is the one whose maps are f; where ``relu`` is set, a functional ReLU stands between.
    """

    layer: str
    weight: Tensor
    bias: Tensor
    relu: bool


@dataclass(frozen=True)
class Anatomy:
    """One recorded forward pass.

    ``layers`` in the order they finished; ``last_map`` the last one with places; ``stages`` one
    layer for each resolution, finest first; ``classifier`` the linear layer that gives the logits;
    ``head`` set where CAM's equation holds; ``classes`` 0 where what comes out is no vector.
    """

    layers: dict[str, LayerInfo]
    last_map: str | None
    stages: tuple[str, ...]
    classifier: str | None
    head: Head | None
    classes: int


# Layers that summarise what they are given: never the "last map" of a model.
_SUMMARIES = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def record(module: nn.Module, normalized: Tensor, read_logits: Any) -> Anatomy:
    """Run one (1, C, H, W) picture through ``module`` and write down what happened."""
    layers: dict[str, LayerInfo] = {}
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    modules = {name: m for name, m in module.named_modules() if name}
    thread = threading.get_ident()

    def watch(name: str) -> Any:
        def hook(part: nn.Module, args: Any, output: Any) -> Any:
            if threading.get_ident() != thread:
                return None  # another run on this model, at the same time
            value = output[0] if isinstance(output, (tuple, list)) and output else output
            # Taken out and put in again, so that the order is that of the last calls.
            outputs.pop(name, None)
            calls = layers.pop(name).calls + 1 if name in layers else 1
            shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else None
            parameters = sum(p.numel() for p in part.parameters())
            layers[name] = LayerInfo(name, type(part).__name__, shape, calls, parameters)
            given = args[0] if args and isinstance(args[0], Tensor) else None
            if given is not None:
                inputs[name] = given
            if not (isinstance(value, Tensor) and value.requires_grad):
                return None
            if given is None or not _handed_on(given, value):
                outputs[name] = value
            # DenseNet's features are overwritten by an in-place ReLU outside every layer.
            return passed_on(output, value.clone())

        return hook

    with torch.inference_mode(False), torch.enable_grad(), guard(module), ExitStack() as stack:
        for name, m in modules.items():
            stack.callback(m.register_forward_hook(watch(name)).remove)
        picture = normalized.clone().requires_grad_()
        logits = read_logits(module(picture))
        size = (picture.shape[2], picture.shape[3])
        prefix = prefix_tokens(module)
        maps = {name: m for name, o in outputs.items() if (m := _maps(o, size, prefix)) is not None}
        stages = _stages(modules, maps, size[0])
        classifier = _classifier(modules, inputs, logits) if logits.ndim == 2 else None
        # Asked of what the classifier is given: a fresh head can be all zeros (MLP-Mixer).
        asked = torch.atleast_2d(logits if classifier is None else inputs[classifier]).flatten(1)
        head = None
        gradients = _gradients(asked, _candidates(modules, {name: outputs[name] for name in maps}))
        dependent = [name for name, g in gradients.items() if bool(as_maps(g, size, prefix).any())]
        last_map = dependent[0] if dependent else None
        for name in dependent:
            if classifier is not None:
                head = _head(modules[classifier], name, maps[name].detach(), asked.detach(), logits.detach())
            # One channel per class and no such head: already the scores (SqueezeNet), so go below.
            if head is not None or logits.ndim != 2 or maps[name].shape[1] != logits.shape[1]:
                last_map = name
                break
    classes = logits.shape[1] if logits.ndim == 2 else 0
    return Anatomy(layers, last_map, stages, classifier, head, classes)


def _handed_on(given: Tensor, value: Tensor) -> bool:
    """Whether a layer only handed on what it was given, perhaps reshaped (dropout, DropPath, permute)."""
    shared = given.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    return shared and value._version == 0  # an in-place ReLU shares it too, but has written to it


def _candidates(modules: dict[str, nn.Module], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the outputs that are maps those that may be the last map, the last first."""
    found: dict[str, Tensor] = {}
    width = None
    for name, value in reversed(outputs.items()):
        if isinstance(modules[name], _SUMMARIES):
            continue
        if value.ndim == 3:
            # Tokens live in blocks and norms; queries, keys, values and MLPs are projections of them.
            if isinstance(modules[name], nn.Linear):
                continue
            width = width or value.shape[2]
            if value.shape[2] != width:
                continue
        found[name] = value
    return found


def _gradients(asked: Tensor, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of ``asked`` (1, D) to the outputs that it depends on.

    After a ViT's last attention only the class token counts: its last block's patch tokens have
    no gradient, and a map there would be empty.
    """
    if not outputs:
        return {}
    # A fixed, uneven mixture: plain sums can cancel.
    mixture = torch.linspace(1, 2, asked.shape[1], device=asked.device, dtype=asked.dtype)
    found = torch.autograd.grad((asked * mixture).sum(), list(outputs.values()), allow_unused=True)
    return {name: g for name, g in zip(outputs, found, strict=True) if g is not None}


_ACTIVATIONS = ("ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "GELU", "SiLU", "Hardswish", "Tanh")


def _stages(modules: dict[str, nn.Module], maps: dict[str, Tensor], height: int) -> tuple[str, ...]:
    """One layer for each resolution: its first activation (relu1_1 ... relu5_1 of a VGG).

    Functional activations are no layers: where there are none, it is the first layer of all. A
    resolution is an octave, since unpadded convolutions lose a few places each. A network that
    keeps one (a ViT) gives up to five layers evenly spread over its depth.
    """
    every: dict[int, list[str]] = {}
    acting: dict[int, list[str]] = {}
    for name, value in maps.items():
        octave = round(math.log2(height / value.shape[2]))
        every.setdefault(octave, []).append(name)
        if type(modules[name]).__name__ in _ACTIVATIONS:
            acting.setdefault(octave, []).append(name)
    octaves = acting or every
    if len(octaves) != 1:
        return tuple(layers[0] for layers in octaves.values())
    (layers,) = octaves.values()
    count = min(5, len(layers))
    return tuple(layers[i * len(layers) // count] for i in range(count))


def _classifier(modules: dict[str, nn.Module], inputs: dict[str, Tensor], logits: Tensor) -> str | None:
    """The last linear (or pointwise convolution) layer with as many outputs as there are logits."""
    for name, given in reversed(inputs.items()):
        layer = modules[name]
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or len(layer.weight) != logits.shape[1]:
            continue
        if given.flatten(1).shape[1] == layer.weight[0].numel():
            return name
    return None


def _head(classifier: nn.Module, layer: str, maps: Tensor, embedding: Tensor, logits: Tensor) -> Head | None:
    """CAM's head, if these maps pooled are what the classifier is given, and its answer the logits."""
    assert isinstance(classifier, (nn.Linear, nn.Conv2d))
    weight = classifier.weight.detach().flatten(1)
    if weight.shape[1] != maps.shape[1]:
        return None
    bias = weight.new_zeros(len(weight)) if classifier.bias is None else classifier.bias.detach()
    if not _same(embedding @ weight.T + bias, logits):
        return None
    for relu in (False, True):
        if _same((maps.relu() if relu else maps).mean((2, 3)), embedding):
            return Head(layer, weight, bias, relu)
    return None


def _same(values: Tensor, expected: Tensor) -> bool:
    tolerance = max(1e-3, 4 * torch.finfo(values.dtype).eps)  # bfloat16 has two digits
    return bool((values - expected).abs().max() <= tolerance * expected.abs().max())


def _maps(features: Tensor, size: tuple[int, int], prefix: int | None) -> Tensor | None:
    """An output as maps of more than one place, or None if it is no such thing."""
    try:
        maps = as_maps(features, size, prefix)
    except ModelError:
        return None
    return maps if maps.shape[2] * maps.shape[3] > 1 else None


def prefix_tokens(module: nn.Module) -> int | None:
    """How many class and register tokens stand before the patch tokens, where the model says so."""
    count = getattr(module, "num_prefix_tokens", None)
    return count if isinstance(count, int) else None


def as_maps(features: Tensor, size: tuple[int, int], prefix: int | None = None) -> Tensor:
    """(N, C, h, w) from a layer's output: convolutional, channels-last (Swin) or tokens (ViT).

    ``size`` is the picture's (H, W); ``prefix`` the number of class and register tokens, worked
    out from the token count when None. An output that is no map is refused with ModelError.
    """
    shape = tuple(features.shape)
    if features.ndim == 4:
        first, last = (_grid_error(h, w, size) for h, w in (shape[2:], shape[1:3]))
        if first is not None and (last is None or first <= last):
            return features
        if last is not None:
            return features.permute(0, 3, 1, 2)
    if features.ndim == 3:
        tokens = shape[1]
        for skipped in range(17) if prefix is None else (prefix, 0):
            grid = _grid(tokens - skipped, size)
            if grid is not None:
                return features[:, skipped:].transpose(1, 2).unflatten(2, grid)
    raise ModelError(
        f"an output of shape {shape} is not a map over a {size[0]}x{size[1]} picture: neither "
        "(N, C, h, w), nor (N, h, w, C), nor (N, tokens, C) with a token grid of the picture's shape"
    )


def _grid_error(h: int, w: int, size: tuple[int, int]) -> float | None:
    """How many places h x w is off a picture of this size seen at one stride; None if it cannot be one.

    Unpadded borders cost a few places, the same number each way.
    """
    if h > 2 * size[0] or w > 2 * size[1]:
        return None
    error = abs(size[1] * h / size[0] - w)
    allowed = 0.0 if size[0] == size[1] else max(2.0, 0.1 * w)
    return error if error <= allowed else None


def _grid(tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """The h x w grid of this many square patches that tiles the picture, if there is one."""
    if tokens < 1:
        return None
    h = round((tokens * size[0] / size[1]) ** 0.5)
    if h < 1 or tokens % h:
        return None
    w = tokens // h
    return (h, w) if abs(size[0] / h - size[1] / w) < 0.5 else None
