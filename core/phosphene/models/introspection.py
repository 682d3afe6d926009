"""Introspection of a network: one recorded forward pass gives layers, shapes, last map and head."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks.guard import guard
from ..hooks.tap import replace_output_tensor
from .token_maps import _maps, as_maps, prefix_tokens

#: Layers that summarise what they are given: never the "last map" of a model.
_SUMMARIES = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


_ACTIVATIONS = ("ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "GELU", "SiLU", "Hardswish", "Tanh")


@dataclass(frozen=True)
class LayerInfo:
    """One layer as it ran: shape of its (last) output without the batch, and how often it ran."""

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
class Structure:
    """One recorded forward pass.

    ``layers`` in the order they finished; ``last_map`` the last one with places; ``stages`` one
    layer for each resolution, finest first; ``classifier`` the linear layer that gives the logits;
    ``head`` set where CAM's equation holds; ``classes`` 0 where what comes out is no vector; ``folds``
    each convolution whose output goes to one batch norm and nowhere else, and that norm; ``unfolded`` the
    layers that give or are given such an output, which a network with folded norms does not have.
    """

    layers: dict[str, LayerInfo]
    last_map: str | None
    stages: tuple[str, ...]
    classifier: str | None
    head: Head | None
    classes: int
    folds: tuple[tuple[str, str], ...]
    unfolded: frozenset[str]


def record_structure(
    module: nn.Module, normalized: Tensor, read_logits: Callable[[Any], Tensor]
) -> Structure:
    """Run one (1, C, H, W) picture through ``module`` and write down what happened."""
    layers: dict[str, LayerInfo] = {}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    gave: dict[str, Any] = {}  # how autograd knows what every layer gave
    modules = {name: m for name, m in module.named_modules() if name}
    thread = threading.get_ident()

    def watch(name: str, part: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != thread:
            return None  # another run on this model, at the same time
        value = output[0] if isinstance(output, (tuple, list)) and output else output
        # Taken out and put in again, so that the order is that of the last calls.
        outputs.pop(name, None)
        calls = layers.pop(name).calls + 1 if name in layers else 1
        shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else None
        layers[name] = LayerInfo(type(part).__name__, shape, calls, sum(p.numel() for p in part.parameters()))
        given = args[0] if args and isinstance(args[0], Tensor) else None
        if given is not None:
            inputs[name] = given
        if not (isinstance(value, Tensor) and value.requires_grad):
            return None
        gave[name] = value.grad_fn
        if given is None or not _handed_on(given, value):
            outputs[name] = value
        # DenseNet's features are overwritten by an in-place ReLU outside every layer.
        return replace_output_tensor(output, value.clone())

    with torch.inference_mode(False), torch.enable_grad(), guard(module), ExitStack() as stack:
        for name, part in modules.items():
            hook = part.register_forward_hook(lambda *given, name=name: watch(name, *given))
            stack.callback(hook.remove)
        picture = normalized.clone().requires_grad_()
        logits = read_logits(module(picture))
        size, prefix = (picture.shape[2], picture.shape[3]), prefix_tokens(module)
        maps = {name: m for name, o in outputs.items() if (m := _maps(o, size, prefix)) is not None}
        classifier = _classifier(modules, inputs, logits) if logits.ndim == 2 else None
        # Asked of what the classifier is given: a fresh head can be all zeros (MLP-Mixer).
        asked = torch.atleast_2d(logits if classifier is None else inputs[classifier]).flatten(1)
        # A fixed, uneven mixture: plain sums can cancel.
        mixed = (asked * torch.linspace(1, 2, asked.shape[1]).to(asked)).sum()
        # After a ViT's last attention only the class token counts: its last block's patch tokens
        # have no gradient, and a map there would be empty.
        head, last_map = None, None
        for name, value in _candidates(modules, {name: outputs[name] for name in maps}).items():
            (gradient,) = torch.autograd.grad(mixed, value, retain_graph=True, allow_unused=True)
            if gradient is None or not as_maps(gradient, size, prefix).any():
                continue
            if classifier is not None:
                head = _head(modules[classifier], name, maps[name].detach(), asked.detach(), logits.detach())
            # One channel per class and no such head: already the scores (SqueezeNet), so go below.
            if head is not None or logits.ndim != 2 or maps[name].shape[1] != logits.shape[1]:
                last_map = name
                break
            last_map = last_map or name
    classes = logits.shape[1] if logits.ndim == 2 else 0
    once = {name: part for name, part in modules.items() if name in layers and layers[name].calls == 1}
    folds = _folds(once, inputs, gave, logits)
    stages = _stages(modules, maps, size[0])
    return Structure(layers, last_map, stages, classifier, head, classes, *folds)


def _handed_on(given: Tensor, value: Tensor) -> bool:
    """Whether a layer only handed on what it was given, perhaps reshaped (dropout, DropPath, permute)."""
    shared = given.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    return shared and value._version == 0  # an in-place ReLU shares it too, but has written to it


def _candidates(modules: dict[str, nn.Module], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the outputs that are maps those that may be the last map, the last first."""
    found = {n: v for n, v in reversed(outputs.items()) if not isinstance(modules[n], _SUMMARIES)}
    # Tokens live in blocks and norms; queries, keys, values and MLPs are projections of them.
    tokens = {
        n: v.shape[2] for n, v in found.items() if v.ndim == 3 and not isinstance(modules[n], nn.Linear)
    }
    width = next(iter(tokens.values()), None)
    return {n: v for n, v in found.items() if v.ndim != 3 or tokens.get(n, 0) == width}


def _classifier(modules: dict[str, nn.Module], inputs: dict[str, Tensor], logits: Tensor) -> str | None:
    """The last linear (or pointwise convolution) layer with as many outputs as there are logits."""
    for name, given in reversed(inputs.items()):
        layer, shape = modules[name], (logits.shape[1], given.flatten(1).shape[1])
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.weight.flatten(1).shape == shape:
            return name
    return None


def _head(classifier: nn.Module, layer: str, maps: Tensor, embedding: Tensor, logits: Tensor) -> Head | None:
    """CAM's head, if these maps pooled are what the classifier is given, and its answer the logits."""
    assert isinstance(classifier, (nn.Linear, nn.Conv2d))
    weight = classifier.weight.detach().flatten(1)
    bias = weight.new_zeros(len(weight)) if classifier.bias is None else classifier.bias.detach()
    if weight.shape[1] == maps.shape[1] and _same(embedding @ weight.T + bias, logits):
        for relu in (False, True):
            if _same((maps.relu() if relu else maps).mean((2, 3)), embedding):
                return Head(layer, weight, bias, relu)
    return None


def _same(values: Tensor, expected: Tensor) -> bool:
    tolerance = max(1e-3, 4 * torch.finfo(values.dtype).eps)  # bfloat16 has two digits
    return bool((values - expected).abs().max() <= tolerance * expected.abs().max())


def _stages(modules: dict[str, nn.Module], maps: dict[str, Tensor], height: int) -> tuple[str, ...]:
    """One layer for each resolution: its first activation (relu1_1 ... relu5_1 of a VGG).

    Functional activations are no layers: where there are none, it is the first layer of all. A
    resolution is an octave, since unpadded convolutions lose a few places each. A network that
    keeps one (a ViT) gives up to five layers evenly spread over its depth.
    """
    acting = [name for name in maps if type(modules[name]).__name__ in _ACTIVATIONS]
    octaves: dict[int, list[str]] = {}
    for name in acting or maps:
        octaves.setdefault(round(math.log2(height / maps[name].shape[2])), []).append(name)
    if len(octaves) != 1:
        return tuple(layers[0] for layers in octaves.values())
    (layers,) = octaves.values()
    count = min(5, len(layers))
    return tuple(layers[i * len(layers) // count] for i in range(count))


def _folds(
    once: dict[str, nn.Module], inputs: dict[str, Tensor], gave: dict[str, Any], logits: Tensor
) -> tuple[tuple[tuple[str, str], ...], frozenset[str]]:
    """Pairs of a convolution and the batch norm that alone takes its output, of layers that run once.

    Beside them all layers that give or are given what is between the two of a pair.
    """
    users: Counter[Any] = Counter()
    nodes: list[Any] = [logits.grad_fn] if logits.requires_grad else []
    while nodes:
        below = [node for node, _ in nodes.pop().next_functions if node is not None]
        nodes += {node for node in below if node not in users}
        users.update(below)
    made = {gave[n]: n for n, m in once.items() if type(m) is nn.Conv2d and n in gave}
    pairs: list[tuple[str, str]] = []
    between: set[Any] = set()
    for name, part in once.items():
        if type(part) is nn.BatchNorm2d and part.running_mean is not None and name in inputs:
            way: list[Any] = [inputs[name].grad_fn]
            while users[way[-1]] == 1 and way[-1].name() == "CloneBackward0":  # what was passed on
                way.append(way[-1].next_functions[0][0])
            if users[way[-1]] == 1 and way[-1] in made:
                pairs.append((made[way[-1]], name))
                between.update(way)
    given = {name: value.grad_fn for name, value in inputs.items()}
    unfolded = {name for told in (gave, given) for name, node in told.items() if node in between}
    return tuple(pairs), frozenset(unfolded)
