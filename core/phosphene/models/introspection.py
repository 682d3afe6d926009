"""The structure of a network, read from one forward pass: layers, shapes, last map, head, foldable norms."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks.guard import guard, is_reentrant_checkpoint
from ..hooks.tap import layer_hooks, replace_output_tensor
from ..torch_state import default_device_of_caller
from .token_maps import Layout, Responses, certain_layouts, changed_blocks, proven_layouts, uncertain_outputs

#: Global pooling: its output is never the "last map" of a model.
_GLOBAL_POOLING = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


_ACTIVATIONS = ("ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "GELU", "SiLU", "Hardswish", "Tanh")


@dataclass(frozen=True)
class LayerInfo:
    """A layer in the recorded pass: shape of its last output without the batch axis, number of calls."""

    type: str
    shape: tuple[int, ...] | None
    calls: int
    parameters: int


@dataclass(frozen=True)
class Head:
    """Global average pooling and one linear layer: S_c = sum_k weight[c, k] * mean_xy f_k(x, y) + bias[c].

    ``layer`` is the one whose maps are f; with ``relu`` a functional ReLU is applied to them first. In a
    ``Structure`` weight and bias are those of the recorded pass; ``Model.head`` has the current ones.
    """

    layer: str
    weight: Tensor
    bias: Tensor
    relu: bool


@dataclass(frozen=True)
class Structure:
    """One recorded forward pass.

    layers: the layers that ran, in the order in which they finished.
    last_map: the last layer with a spatial map that the logits depend on.
    layouts: the layers whose outputs are maps, and how they are read.
    not_maps: layers whose outputs depend on the image, but not by position (queries, latents, mixed tokens).
    stages: one layer for each resolution, finest first.
    classifier: the linear layer that computes the logits.
    head: set where CAM's equation holds.
    classes: the number of logits; 0 where the output is not a vector.
    folds: pairs of a convolution and the batch norm that is the only consumer of its output.
    unfolded: the layers whose input or output lies between such a pair; they do not exist in a network
        with folded norms.
    reentrant: whether layers run under reentrant checkpoints, so that no gradient can be computed.
    """

    layers: dict[str, LayerInfo]
    last_map: str | None
    layouts: dict[str, Layout]
    not_maps: frozenset[str]
    stages: tuple[str, ...]
    classifier: str | None
    head: Head | None
    classes: int
    folds: tuple[tuple[str, str], ...]
    unfolded: frozenset[str]
    reentrant: bool

    def with_two_logits(self) -> Structure:
        """The structure of a network with one logit z, presented as the two logits (-z/2, z/2)."""
        return replace(self, classes=2)


#: Whether the passes that run now record a network's structure, once for each image size.
recording_structure: ContextVar[bool] = ContextVar("recording_structure", default=False)


def record_structure(
    module: nn.Module, normalized: Tensor, read_logits: Callable[[Any], Tensor]
) -> Structure:
    """The structure of ``module`` from a forward pass of one (1, C, H, W) image."""
    layers: dict[str, LayerInfo] = {}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}  # outputs, views of inputs as well
    levels: dict[str, Tensor] = {}  # of a detector's pyramid
    output_nodes: dict[str, Any] = {}  # autograd's node of every layer's output
    modules = {name: m for name, m in module.named_modules() if name}
    thread = threading.get_ident()

    def record(name: str, part: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != thread:
            return None  # a run on this model in another thread
        if name == "backbone" and isinstance(output, Mapping):
            levels.update((key, level) for key, level in output.items() if isinstance(level, Tensor))
        value = output[0] if isinstance(output, (tuple, list)) and output else output
        # Removed and inserted again, so that layers are in the order of their last calls.
        outputs.pop(name, None)
        calls = layers.pop(name).calls + 1 if name in layers else 1
        shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else None
        layers[name] = LayerInfo(type(part).__name__, shape, calls, sum(map(Tensor.numel, part.parameters())))
        value_in = args[0] if args and isinstance(args[0], Tensor) else None
        if value_in is not None:
            inputs[name] = value_in
        if not (isinstance(value, Tensor) and value.requires_grad):
            return None
        output_nodes[name] = value.grad_fn
        values.pop(name, None)
        values[name] = value
        if value_in is None or not _is_view(value_in, value):
            outputs[name] = value
        # A clone, because DenseNet overwrites its features by an in-place functional ReLU.
        return replace_output_tensor(output, value.clone())

    hooks = {part: partial(record, name) for name, part in modules.items()}
    with torch.inference_mode(False), torch.enable_grad(), guard(module):
        image = normalized.clone().requires_grad_()
        with layer_hooks(hooks), default_device_of_caller():
            random_state = torch.get_rng_state()
            logits = read_logits(module(image))
        layouts, not_maps = _layouts(module, modules, image, values, inputs, random_state)
        maps = {name: layouts[name].maps(output) for name, output in outputs.items() if name in layouts}
        maps = {name: m for name, m in maps.items() if m.shape[2] * m.shape[3] > 1}
        is_detector = logits.ndim == 1
        if is_detector:
            maps = _without_coarse(maps)
        classifier = _classifier(modules, inputs, logits) if logits.ndim == 2 else None
        # Gradients of the classifier's input: a new head's weights can all be zero (MLP-Mixer).
        embedding = torch.atleast_2d(logits if classifier is None else inputs[classifier]).flatten(1)
        # A sum with fixed, unequal weights: in a plain sum gradients can cancel.
        mixed = (embedding * torch.linspace(1, 2, embedding.shape[1], device="cpu").to(embedding)).sum()
        # Every box of a detector must depend on its last map, whichever level of the pyramid it comes from.
        pyramid = [level.square().sum() for level in levels.values() if level.requires_grad]
        ends = pyramid if is_detector and pyramid else [mixed]
        # After a ViT's last attention the logits depend on the class token only: the patch tokens of its
        # last block have no gradient, and a map there would be empty.
        head, last_map, reentrant = None, None, False
        for name, value in _candidates(modules, {name: outputs[name] for name in maps}).items():
            empty = False
            try:
                for end in ends:
                    (gradient,) = torch.autograd.grad(end, value, retain_graph=True, allow_unused=True)
                    empty |= gradient is None or not layouts[name].maps(gradient).any()
            except RuntimeError as error:
                if not is_reentrant_checkpoint(error):
                    raise
                reentrant = True  # methods without gradients run
                break
            if empty:
                continue
            if classifier is not None:
                head = _head(
                    modules[classifier], name, maps[name].detach(), embedding.detach(), logits.detach()
                )
            # One channel per class and no such head: the maps are class scores (SqueezeNet); search below.
            if head is not None or is_detector or maps[name].shape[1] != logits.shape[1]:
                last_map = name
                break
            last_map = last_map or name
    classes = logits.shape[1] if logits.ndim == 2 else 0
    once = {name: part for name, part in modules.items() if name in layers and layers[name].calls == 1}
    folds = _folds(once, inputs, output_nodes, logits)
    stages = _stages(modules, maps, image.shape[2])
    return Structure(
        layers, last_map, layouts, not_maps, stages, classifier, head, classes, *folds, reentrant
    )


def _layouts(
    module: nn.Module,
    modules: dict[str, nn.Module],
    image: Tensor,
    values: dict[str, Tensor],
    inputs: dict[str, Tensor],
    random_state: Tensor,
) -> tuple[dict[str, Layout], frozenset[str]]:
    """The layouts of all layers whose outputs are maps, and the layers whose outputs certainly are none.

    Where shapes and types do not decide, the network runs again with one block of the image changed at a
    time, with the same random numbers.
    """
    certain = certain_layouts(modules, values, inputs)
    originals = uncertain_outputs(values, certain)
    if not originals:
        return certain, frozenset()
    # Inputs show the tokens before the first layer that mixes them; they come before the layer's output.
    tokens = {n: v for n, v in inputs.items() if v.ndim == 3 and len(v) == 1 and v.numel() > 1}
    responses = Responses({f"input of {n}": v for n, v in tokens.items()} | originals)
    thread = threading.get_ident()

    def record(name: str, part: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != thread:
            return
        if name in tokens and args and isinstance(args[0], Tensor):
            responses.add(f"input of {name}", args[0])
        value = output[0] if isinstance(output, (tuple, list)) and output else output
        if name in originals and isinstance(value, Tensor):
            responses.add(name, value)

    hooks = {modules[name]: partial(record, name) for name in dict.fromkeys((*tokens, *originals))}
    with torch.no_grad(), layer_hooks(hooks):
        for changed in changed_blocks(image):
            torch.set_rng_state(random_state)
            responses.start_pass()
            with default_device_of_caller():
                module(changed)
    size = (image.shape[2], image.shape[3])
    grids = [(m.shape[2], m.shape[3]) for m in (layout.maps(values[n]) for n, layout in certain.items())]
    proven, not_maps = proven_layouts(responses, grids, size)
    return certain | {
        n: layout for n, layout in proven.items() if n in originals
    }, not_maps & originals.keys()


def _is_view(value_in: Tensor, value: Tensor) -> bool:
    """Whether a layer's output is its input, perhaps reshaped (dropout, DropPath, permute)."""
    shared = value_in.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    return shared and value._version == 0  # an in-place ReLU shares the storage too, but wrote to it


def _candidates(modules: dict[str, nn.Module], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the outputs that are maps those that may be the last map, the last first."""
    maps = {n: v for n, v in reversed(outputs.items()) if not isinstance(modules[n], _GLOBAL_POOLING)}
    # Blocks and norms output tokens; queries, keys, values and MLPs (linear layers) are projections of them.
    tokens = {n: v.shape[2] for n, v in maps.items() if v.ndim == 3 and not isinstance(modules[n], nn.Linear)}
    width = next(iter(tokens.values()), None)
    return {n: v for n, v in maps.items() if v.ndim != 3 or tokens.get(n, 0) == width}


def _without_coarse(maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """A detector's maps without those of a few positions, which are for boxes as large as the image."""
    return {name: m for name, m in maps.items() if min(m.shape[2:]) >= 7} or maps


def _classifier(modules: dict[str, nn.Module], inputs: dict[str, Tensor], logits: Tensor) -> str | None:
    """The last linear layer (or pointwise convolution) with as many outputs as there are logits."""
    for name, value_in in reversed(inputs.items()):
        if value_in.ndim < 2:
            continue  # a module of a vector: a temperature, an embedding of positions
        layer, shape = modules[name], (logits.shape[1], value_in.flatten(1).shape[1])
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.weight.flatten(1).shape == shape:
            return name
    return None


def _head(classifier: nn.Module, layer: str, maps: Tensor, embedding: Tensor, logits: Tensor) -> Head | None:
    """CAM's head, if the averages of these maps are the classifier's input and its output the logits."""
    weight, bias = linear_weights(classifier)
    if weight.shape[1] == maps.shape[1] and _same(embedding @ weight.T + bias, logits):
        for relu in (False, True):
            if _same((maps.relu() if relu else maps).mean((2, 3)), embedding):
                return Head(layer, weight, bias, relu)
    return None


def linear_weights(classifier: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight (K, C) and bias (K,) of a linear layer or pointwise convolution, as they are now."""
    assert isinstance(classifier, (nn.Linear, nn.Conv2d))
    weight = classifier.weight.detach().flatten(1)
    bias = weight.new_zeros(len(weight)) if classifier.bias is None else classifier.bias.detach()
    return weight, bias


def _same(values: Tensor, expected: Tensor) -> bool:
    tolerance = max(1e-3, 4 * torch.finfo(values.dtype).eps)  # bfloat16 has two digits
    return bool((values - expected).abs().max() <= tolerance * expected.abs().max())


def _stages(modules: dict[str, nn.Module], maps: dict[str, Tensor], height: int) -> tuple[str, ...]:
    """One layer for each resolution: its first activation (relu1_1 ... relu5_1 of a VGG).

    Where no activation is a module (functional ReLUs), it is the first layer of each resolution.
    Resolutions are rounded to powers of two, since unpadded convolutions crop a few pixels each. Of a
    network with one resolution (a ViT) up to five layers are chosen at equal distances in depth.
    """
    activations = [name for name in maps if type(modules[name]).__name__ in _ACTIVATIONS]
    octaves: dict[int, list[str]] = {}
    for name in activations or maps:
        octaves.setdefault(round(math.log2(height / maps[name].shape[2])), []).append(name)
    if len(octaves) != 1:
        return tuple(layers[0] for layers in octaves.values())
    (layers,) = octaves.values()
    count = min(5, len(layers))
    return tuple(layers[i * len(layers) // count] for i in range(count))


def _folds(
    once: dict[str, nn.Module], inputs: dict[str, Tensor], output_nodes: dict[str, Any], logits: Tensor
) -> tuple[tuple[tuple[str, str], ...], frozenset[str]]:
    """Pairs of a convolution and the batch norm that alone uses its output, of layers that run once.

    And all layers whose input or output is a tensor between the two of a pair.
    """
    consumers: Counter[Any] = Counter()
    nodes: list[Any] = [logits.grad_fn] if logits.requires_grad else []
    while nodes:
        below = [node for node, _ in nodes.pop().next_functions if node is not None]
        nodes += set(below) - consumers.keys()
        consumers.update(below)
    convolutions = {
        output_nodes[name]: name
        for name, part in once.items()
        if type(part) is nn.Conv2d and name in output_nodes
    }
    pairs: list[tuple[str, str]] = []
    between: set[Any] = set()
    for name, part in once.items():
        if type(part) is nn.BatchNorm2d and part.running_mean is not None and name in inputs:
            path: list[Any] = [inputs[name].grad_fn]
            while consumers[path[-1]] == 1 and path[-1].name() == "CloneBackward0":  # ``record``'s clones
                path.append(path[-1].next_functions[0][0])
            if consumers[path[-1]] == 1 and path[-1] in convolutions:
                pairs.append((convolutions[path[-1]], name))
                between.update(path)
    input_nodes = {name: value.grad_fn for name, value in inputs.items()}
    unfolded = {n for ends in (output_nodes, input_nodes) for n, node in ends.items() if node in between}
    return tuple(pairs), frozenset(unfolded)
