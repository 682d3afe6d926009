"""Attention maps: what a token attends to in each head and layer of a vision transformer."""

from typing import Annotated, Any

import torch
from pydantic import Field

from phosphene import Method, hookimpl, method
from phosphene.errors import InputError
from phosphene.roles import Images, LayerName, Model
from phosphene.spec import Cost, SumsToOne, UnitRange, size

from ._attention_maps_result import AttentionMaps
from ._oracle_networks import CENTERS, GRID, linear_transformer
from ._relations import CARON_2021, VASWANI_2017, WITHOUT_A_SCORE
from ._tokens import Query, global_tokens, query_tokens


def equals_the_softmax_of_the_products() -> None:
    """The maps of a class token, a patch and the mean are rows of softmax(Q K^T / sqrt(d))."""
    network, model, images = linear_transformer(heads=(2, 4))
    first, last = network.probabilities(model.normalize(images))
    rows = torch.cat([first, last], 1)
    result = attention_maps(model, images)
    torch.testing.assert_close(result.maps, rows[:, :, 0, 1:].unflatten(2, GRID))
    torch.testing.assert_close(result.others, rows[:, :, 0, :1])
    assert (result.layers, result.heads) == (("blocks.0",) * 2 + ("blocks.1",) * 4, (0, 1, 0, 1, 2, 3))
    # The patch of the pixel x = 17, y = 6 is that of row 1, column 4: token 1 + 9.
    clicked = attention_maps(model, images, layers=["blocks.1"], heads=[3, 0], query=[17, 6])
    torch.testing.assert_close(clicked.maps, last[:, [3, 0], 10, 1:].unflatten(2, GRID))
    mean = attention_maps(model, images, layers=["blocks.1"], query="mean")
    torch.testing.assert_close(mean.maps, last[:, :, 1:, 1:].mean(2).unflatten(2, GRID))
    assert [r.query for r in (result, clicked, mean)] == ["class token", "patch at 17, 6", "mean of patches"]
    assert [r.point for r in (result, clicked, mean)] == [None, (17, 6), None]
    assert result.centers == CENTERS
    # A head on the mean of all tokens reads all of them.
    network, model, images = linear_transformer(pool="mean")
    read = attention_maps(model, images, layers=["blocks.1"])
    torch.testing.assert_close(
        read.others, network.probabilities(model.normalize(images))[1].mean(2)[:, :, :1]
    )


@method(
    family="attention",
    references=[VASWANI_2017, CARON_2021],
    invariants=[UnitRange(), SumsToOne(rest="others")],
    cost=Cost(forward=size.images),
    oracle=equals_the_softmax_of_the_products,
    relations=WITHOUT_A_SCORE,
    defaults={"model": "builtin:shapes-vit"},
)
def attention_maps(
    model: Model,
    images: Images,
    *,
    layers: Annotated[
        Annotated[list[LayerName], Field(min_length=1)] | None,
        Field(description="layers that compute attention; default: all"),
    ] = None,
    heads: Annotated[
        Annotated[list[int], Field(min_length=1)] | None, Field(description="head numbers; default: all")
    ] = None,
    query: Query = None,
) -> AttentionMaps:
    """Attention maps: the attention of one token to the patches, for each layer and head.

    A = softmax(Q K^T / sqrt(d)),  M_j = A_qj

    q is the query, j a patch. By default q is the token that the model's output reads, the class token of
    most vision transformers, or the mean over all tokens that it reads. Fused attention, which never stores
    A, is computed explicitly. Networks whose attention is inside windows are refused.

    Returns:
        ``maps`` (N, M, h, w), a map for each of M heads of all layers, and ``others`` (N, M, S), the
        attention to class and register tokens. A map and its others sum to 1.

    Raises:
        ModelError: a model without attention, or with attention inside windows or to tokens without a grid;
            ``query="class"`` without a class token.
        UnknownName: a layer without attention.
        InputError: a head that a layer does not have, or a pixel outside the image.

    Example::
        from phosphene import run

        result = run("attention_maps", model="builtin:shapes-vit", images="builtin:scenes/2", query=[30, 20])
        result.maps.shape  # (2, 16, 8, 8)

    Source:
        Vaswani et al. 2017, section 3.2.1; Caron et al. 2021, figure 3.
    """
    tokens = global_tokens(model, images, "attention_maps", layers)
    size = (images.shape[2], images.shape[3])
    queries, name = query_tokens(query, tokens, model, size)
    for layer, count in zip(tokens.layers, tokens.heads, strict=True):
        for head in heads or ():
            if not 0 <= head < count:
                raise InputError(f"layer {layer!r} has {count} heads, so there is no number {head}")
    # equivalent mutants: the attention of further layers is not used
    maps = model.attention(images, tokens.layers)
    rows, names, numbers = [], [], []
    for layer, count in zip(tokens.layers, tokens.heads, strict=True):
        selected = list(range(count)) if heads is None else heads
        # equivalent mutants: results are detached
        rows.append(maps[layer].detach()[:, selected][:, :, list(queries)].mean(2))
        names += [layer] * len(selected)
        numbers += selected
    attention = torch.cat(rows, 1)
    return AttentionMaps(
        images=images,
        maps=tokens.maps(attention),
        others=tokens.others(attention),
        layers=tuple(names),
        heads=tuple(numbers),
        query=name,
        point=(query[0], query[1]) if isinstance(query, list) else None,
        centers=tokens.centers,
    )


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [attention_maps]
