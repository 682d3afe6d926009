"""Which layers of a model compute attention, over which tokens, and the probabilities of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from ..errors import ModelError, UnknownName
from ..hooks.attention import RecordAttention
from ..hooks.guard import is_reentrant_checkpoint
from ..hooks.tap import Tap
from ..torch_state import call_and_restore, default_device_of_caller, fork_random_state, random_lock
from .introspection import Structure, recording_structure
from .optimized_copy import without_optimized
from .token_maps import Layout


class Attending(Protocol):
    """The part of ``Model`` that is used here; ``models.model`` imports this module, not the reverse."""

    name: str
    module: nn.Module
    input_size: tuple[int, int, int]
    _cache: Any

    @property
    def structure(self) -> Structure: ...
    @property
    def layers(self) -> Mapping[str, nn.Module]: ...
    @property
    def attention_layers(self) -> dict[str, AttentionLayer]: ...
    def at_size(self, input_size: tuple[int, int, int]) -> Self: ...
    def guard(self) -> AbstractContextManager[None]: ...
    def _run(self, images: Tensor) -> Any: ...


@dataclass(frozen=True)
class AttentionLayer:
    """The attention of a layer at one image size.

    heads: number of heads.
    windows: number of windows of an image, each of which attends within itself; 1: global attention.
    queries, keys: number of tokens of a window that attend, and that are attended to.
    calls: how often the layer runs in a pass; the probabilities are those of the last.
    layout: how the tokens of global self-attention lie in the image: their grid, class and register tokens.
        None for windows and for tokens without positions.
    tokens: a layer whose output are these tokens, such as a block or its norm; None without a layout.
    read: the queries that the model's output depends on, the class token in the last block of most vision
        transformers; empty where no gradient can be computed.
    """

    heads: int
    windows: int
    queries: int
    keys: int
    calls: int
    layout: Layout | None
    tokens: str | None
    read: tuple[int, ...]


@contextmanager
def record_attention(
    model: Attending, replace: Callable[[str, Tensor], Tensor] | None = None
) -> Iterator[RecordAttention]:
    """``Model.record_attention``."""
    with suppress(ModelError):  # an attention that cannot be read is not recorded
        model.attention_layers  # noqa: B018  which determines the axes of windows
    with _record(model, replace) as recording:
        yield recording


@contextmanager
def _record(
    model: Attending, replace: Callable[[str, Tensor], Tensor] | None = None
) -> Iterator[RecordAttention]:
    """``record_attention`` with the axes of windows that are determined so far."""
    axes = model._cache.window_axes
    with model.guard(), without_optimized(), RecordAttention(model.layers, replace, axes) as recording:
        yield recording


def read_attention_layers(model: Attending) -> dict[str, AttentionLayer]:
    """The layers with attention of a model at its input size, in the order in which they first run.

    From passes of noise: of two images, and of one, by which windows and images are distinguished.
    """
    noise = torch.rand(2, *model.input_size, generator=torch.Generator().manual_seed(0), device="cpu")
    with random_lock, fork_random_state():
        two, one, read = _record_noise(model, noise)
        if one.unreadable:
            from .coordinate_pass import window_axes

            model._cache.window_axes.update(window_axes(model.module, model.input_size))
            two, one, read = _record_noise(model, noise)
    layers, unclear = {}, set(one.unreadable)
    for name, maps in one.maps.items():
        windows, heads, queries, keys = maps.shape
        if not _images_first(two.maps.get(name), maps):
            unclear.add(name)
        tokens, layout = None, None
        if windows == 1 and queries == keys:
            tokens, layout = _token_layout(model, name, queries)
        layers[name] = AttentionLayer(
            heads, windows, queries, keys, one.calls[name], layout, tokens, read.get(name, ())
        )
    if unclear:
        raise ModelError(
            f"{', '.join(sorted(unclear))} in {model.name} computes attention whose images, windows and "
            "heads cannot be distinguished by the axes of its probabilities: they are not (N * windows, "
            "heads, queries, keys), images first"
        )
    return layers


def _record_noise(
    model: Attending, noise: Tensor
) -> tuple[RecordAttention, RecordAttention, dict[str, tuple[int, ...]]]:
    """The attention of two images, that of the first, and the queries that the output depends on."""
    token = recording_structure.set(True)
    try:
        with _record(model) as two, torch.no_grad():
            call_and_restore(model._run, noise)
        with torch.enable_grad(), _record(model) as one:
            return two, one, _read_queries(model, noise[:1], one)
    finally:
        recording_structure.reset(token)


def _images_first(two: Tensor | None, one: Tensor) -> bool:
    """Whether the rows of two images begin with those of the first image alone."""
    windows = len(one)
    if two is None or two.shape != (2 * windows, *one.shape[1:]):
        return False
    # Images are mixed up where the second one changes the rows of the first.
    return windows == 1 or torch.allclose(two[:windows], one, rtol=0, atol=0.05)


def _token_layout(model: Attending, layer: str, count: int) -> tuple[str | None, Layout | None]:
    """A layer whose output are so many tokens on a grid, and their layout; the nearest by its name."""
    layouts = {
        name: layout
        for name, layout in model.structure.layouts.items()
        if len(layout.axes) == 3 and layout.before + layout.grid[0] * layout.grid[1] + layout.after == count
    }
    if not layouts:
        return None, None
    nearest = max(layouts, key=lambda name: len(commonprefix([name.split("."), layer.split(".")])))
    return nearest, layouts[nearest]


def _read_queries(model: Attending, image: Tensor, recording: RecordAttention) -> dict[str, tuple[int, ...]]:
    """Of each layer the queries that the model's output depends on, from the gradient of one image."""
    classifier = model.structure.classifier
    tapped = {} if classifier is None else {classifier: model.layers[classifier]}
    with Tap(tapped, inputs=True) as tap, default_device_of_caller():
        output = model._run(image.clone().requires_grad_())
        # The classifier's input: a new head's weights may all be zero.
        value = _tensor(output) if classifier is None else tap[classifier]
    maps = {name: values for name, values in recording.maps.items() if values.requires_grad}
    if value is None or not value.requires_grad or not maps:
        return {}
    # A sum with unequal weights: in a plain sum behind a normalization gradients cancel.
    weights = torch.linspace(1, 2, value.numel(), device="cpu").to(value).view_as(value)
    try:
        gradients = torch.autograd.grad((value * weights).sum(), [*maps.values()], allow_unused=True)
    except RuntimeError as error:
        if not is_reentrant_checkpoint(error):
            raise
        return {}
    return {
        name: tuple((gradient != 0).any(3).any(1).any(0).nonzero()[:, 0].tolist())
        for name, gradient in zip(maps, gradients, strict=True)
        if gradient is not None
    }


def _tensor(output: Any) -> Tensor | None:
    """The first differentiable tensor in what a network returns."""
    if isinstance(output, Tensor):
        return output
    items = output.values() if isinstance(output, Mapping) else output
    if not isinstance(items, (tuple, list)) and not isinstance(output, Mapping):
        return None
    return next((t for item in items if (t := _tensor(item)) is not None and t.requires_grad), None)


def require_attention(model: Attending, layers: Sequence[str] | None) -> dict[str, AttentionLayer]:
    """The named layers with attention, or all. Raises ModelError for a model without any, and UnknownName."""
    computed = model.attention_layers
    if not computed:
        raise ModelError(
            f"{model.name} computes no attention: neither torch's scaled_dot_product_attention nor a softmax "
            "over the last axis of (N, heads, queries, keys)"
        )
    for name in layers or ():
        if name not in computed:
            raise UnknownName("attention layer", name, computed, model.name)
    return {name: computed[name] for name in (layers or computed)}


def attention(model: Attending, images: Tensor, layers: Sequence[str] | None) -> dict[str, Tensor]:
    """``Model.attention``."""
    sized = model.at_size((model.input_size[0], images.shape[2], images.shape[3]))
    chosen = require_attention(sized, layers)
    with _record(model) as recording:
        model._run(images)
    return {
        name: recording.maps[name].unflatten(0, (len(images), layer.windows))
        if layer.windows > 1
        else recording.maps[name]
        for name, layer in chosen.items()
    }
