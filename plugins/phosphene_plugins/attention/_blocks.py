"""The blocks of a vision transformer: the layers whose outputs are its tokens behind each attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from phosphene import Model
from phosphene.errors import ModelError

from ._tokens import Tokens


def block_of_each_layer(model: Model, tokens: Tokens, method: str) -> dict[str, str]:
    """For each layer of attention the block that it belongs to, whose output are the tokens behind it.

    A block is the largest module that contains this attention and no other. Raises ModelError where the
    output of no such module are the tokens (N, T, C), or one module has several attentions.
    """
    blocks = {}
    for layer in tokens.layers:
        others = [name for name in tokens.layers if name != layer]
        candidates = [
            name
            for name in _with_parents(layer)
            if _outputs_tokens(model, name, tokens.count) and not any(_contains(name, o) for o in others)
        ]
        if not others:  # of a single block the encoder around it may normalize its output
            candidates = [n for n in candidates if _is_item(model, n)][:1] or candidates
        if not candidates:
            raise ModelError(
                f"{method} needs the tokens behind each block, and no module of {model.name} around "
                f"{layer or 'its attention'} outputs them as (N, {tokens.count}, C)"
            )
        blocks[layer] = candidates[-1]
    return blocks


def _with_parents(layer: str) -> Iterator[str]:
    """The layer and the modules around it, the innermost first."""
    parts = layer.split(".")
    for count in range(len(parts), 0, -1):
        yield ".".join(parts[:count])


def _contains(module: str, layer: str) -> bool:
    return layer == module or layer.startswith(f"{module}.")


def _outputs_tokens(model: Model, layer: str, count: int) -> bool:
    info = model.structure.layers.get(layer)
    shape: Sequence[int] = () if info is None or info.shape is None else info.shape
    return len(shape) == 2 and shape[0] == count


def _is_item(model: Model, layer: str) -> bool:
    """Whether it is an item of a list of modules, as blocks are."""
    parent = model.layers.get(layer.rpartition(".")[0], model.module)
    return isinstance(parent, (nn.Sequential, nn.ModuleList))
