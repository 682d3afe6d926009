"""The tokens of a vision transformer's self-attention: their grid, class tokens, and those that are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Model, unit_centers
from phosphene.errors import InputError, ModelError
from phosphene.images import Centers
from phosphene.models import AttentionLayer, Layout


@dataclass(frozen=True)
class Tokens:
    """The tokens that several layers of a model attend over.

    layers: the layers of self-attention, in the order in which they run.
    heads: the number of heads of each.
    layout: the grid of the patch tokens, and the class and register tokens before and after them.
    centers: the pixels at which the patches are centered.
    read: the tokens behind the last layer that the model's output depends on.
    pooling: a layer behind the last in which queries of its own attend to all tokens, if there is one.
    pooled: of these queries those that the model's output depends on.
    """

    layers: tuple[str, ...]
    heads: tuple[int, ...]
    layout: Layout
    centers: Centers | None
    read: tuple[int, ...]
    pooling: str | None
    pooled: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of tokens."""
        height, width = self.layout.grid
        return self.layout.before + height * width + self.layout.after

    @property
    def patches(self) -> slice:
        """The positions of the patch tokens."""
        return slice(self.layout.before, self.count - self.layout.after)

    def maps(self, values: Tensor) -> Tensor:
        """(..., h, w): the values (..., T) of the patch tokens."""
        return values[..., self.patches].unflatten(-1, self.layout.grid)

    def others(self, values: Tensor) -> Tensor:
        """(..., S): the values (..., T) of the class and register tokens."""
        return torch.cat([values[..., : self.layout.before], values[..., self.patches.stop :]], -1)

    def patch_at(self, point: Sequence[int], size: Sequence[int]) -> int:
        """The token of the patch whose center is nearest to the pixel (x, y) of an image of ``size`` (H, W).

        Raises InputError for a pixel outside the image.
        """
        x, y = point
        if not (0 <= y < size[0] and 0 <= x < size[1]):
            raise InputError(f"the pixel ({x}, {y}) is outside the image of {size[1]}x{size[0]} pixels")
        rows, columns = self.centers or (
            [(i + 0.5) * side / count - 0.5 for i in range(count)]
            for side, count in zip(size, self.layout.grid, strict=True)
        )
        row = min(range(len(rows)), key=lambda i: abs(rows[i] - y))
        column = min(range(len(columns)), key=lambda i: abs(columns[i] - x))
        return self.layout.before + row * self.layout.grid[1] + column


#: The token whose attention is shown: a name, or a pixel (x, y) of its patch.
Query = Annotated[
    Literal["class", "mean"] | Annotated[list[int], Field(min_length=2, max_length=2)] | None,
    Field(
        description="the class token, the mean of all patches, or the patch at a pixel x, y; default: the "
        "tokens that the model's output reads"
    ),
]


def query_tokens(
    query: Query, tokens: Tokens, model: Model, size: Sequence[int]
) -> tuple[tuple[int, ...], str]:
    """The tokens that a query stands for, and a name of them.

    Raises InputError for a pixel outside the image, ModelError for a class token that the model does not
    have, and where it is unknown which tokens its output reads.
    """
    if isinstance(query, list):
        return (tokens.patch_at(query, size),), f"patch at {query[0]}, {query[1]}"
    if query == "mean":
        return tuple(range(tokens.patches.start, tokens.patches.stop)), "mean of patches"
    if query == "class":
        if not tokens.layout.before:
            raise ModelError(f"{model.name} has no class token before its patches: pass query='mean'")
        return (0,), "class token"
    if not tokens.read:
        raise ModelError(
            f"the gradient of {model.name} does not show which tokens its output reads: pass query='class' "
            "or query='mean'"
        )
    if len(tokens.read) > 1:
        return tokens.read, "mean of tokens"
    return tokens.read, "class token" if tokens.read == (0,) and tokens.layout.before else "read token"


def at_size_of(model: Model, images: Tensor) -> Model:
    """The model at the size of the images, of which the number of tokens depends."""
    return model.at_size((model.input_size[0], images.shape[2], images.shape[3]))


def global_tokens(model: Model, images: Tensor, method: str, layers: Sequence[str] | None = None) -> Tokens:
    """The tokens of a model's layers of attention, all by default.

    Raises ModelError for a model without attention, and where a layer attends inside windows, to tokens that
    are no grid of patches, or to other tokens than the other layers.
    """
    model = at_size_of(model, images)
    computed = model.attention_layers
    if not computed or layers:
        model.attention(images[:1], layers)  # raises for a model without attention and for unknown names
    chosen = {name: computed[name] for name in (layers or computed)}
    last = [*chosen][-1]
    pooling = None
    if len(chosen) > 1 and not layers and _pools(chosen[last], [*chosen.values()][-2]):
        pooling = last
        del chosen[last]
    layout = _shared_layout(model, chosen, method)
    *_, (name, behind) = chosen.items()
    size = (images.shape[2], images.shape[3])
    return Tokens(
        layers=tuple(chosen),
        heads=tuple(layer.heads for layer in chosen.values()),
        layout=layout,
        centers=None if behind.tokens is None else unit_centers(model, behind.tokens, size),
        read=behind.read,
        pooling=pooling,
        pooled=() if pooling is None else computed[pooling].read,
    )


def _pools(layer: AttentionLayer, before: AttentionLayer) -> bool:
    """Whether queries of its own attend to all tokens of the layer before."""
    return layer.windows == 1 and layer.queries != layer.keys == before.queries


def _shared_layout(model: Model, layers: dict[str, AttentionLayer], method: str) -> Layout:
    counts = {layer.queries for layer in layers.values()}
    layout = None
    for name, layer in layers.items():
        what = f"{name or 'a function'} in {model.name}"
        if layer.windows > 1:
            raise ModelError(
                f"{what} attends inside {layer.windows} windows, and {method} needs attention between all "
                "tokens; attention_distance, head_ablation and model.attention read windows"
            )
        if layer.calls > 1:
            raise ModelError(
                f"{what} runs {layer.calls} times in a pass, and {method} needs the attention of each time"
            )
        if layer.layout is None:
            raise ModelError(
                f"{method} needs attention between patch tokens on a grid, and {what} attends from "
                f"{layer.queries} queries to {layer.keys} tokens whose positions are not a grid"
            )
        if len(counts) > 1:
            numbers = " and ".join(map(str, sorted(counts)))
            raise ModelError(
                f"layers of {model.name} attend over {numbers} tokens, and {method} needs the same tokens in "
                "all layers"
            )
        layout = layer.layout
    if layout is None:
        raise ModelError(f"{method} needs attention between patch tokens, and {model.name} has none")
    return layout


def layer_rows(layers: tuple[str, ...]) -> dict[str, list[int]]:
    """The positions of each layer's heads, by layer."""
    return {name: [n for n, other in enumerate(layers) if other == name] for name in dict.fromkeys(layers)}
