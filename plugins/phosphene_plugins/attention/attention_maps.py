"""Attention maps: what a token attends to in each head and layer of a vision transformer."""

import dataclasses
from typing import Annotated, Any

import torch
from pydantic import Field

from phosphene import Method, hookimpl, method
from phosphene.errors import InputError, ModelError, UnknownName
from phosphene.models import Layout
from phosphene.roles import Images, LayerName, Model
from phosphene.spec import Cost, SumsToOne, UnitRange, size

from ._attention_maps_result import AttentionMaps
from ._oracle_networks import CENTERS, GRID, linear_transformer
from ._relations import CARON_2021, VASWANI_2017, WITHOUT_A_SCORE
from ._tokens import Query, Tokens, global_tokens, query_tokens


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
    tokens_by_hand(model)


def tokens_by_hand(model: Model) -> None:
    """A class token, 2 x 3 patches and two registers; names of what is read."""
    tokens = Tokens(
        layers=("a",), heads=(1,), layout=Layout("NTC", (2, 3), 1, 2), centers=None, read=(0,), pooling=None,
        pooled=(),
    )  # fmt: skip
    values = torch.arange(9.0)
    assert tokens.count == 9 and tokens.maps(values).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert tokens.others(values).tolist() == [0, 7, 8]
    # Of 12 x 24 pixels, patches of 6 x 8 are centered at 2.5 and 8.5, and at 3.5, 11.5 and 19.5.
    for (x, y), patch in (((0, 0), 1), ((7, 5), 1), ((8, 6), 5), ((23, 5), 3), ((15, 11), 5), ((16, 11), 6)):
        assert tokens.patch_at((x, y), (12, 24)) == patch, (x, y)
    uneven = dataclasses.replace(tokens, centers=((0, 10), (0, 1, 23)))
    assert uneven.patch_at((3, 4), (12, 24)) == 2 and uneven.patch_at((12, 6), (12, 24)) == 5
    registers = dataclasses.replace(tokens, layout=Layout("NTC", (2, 3), 0, 2))
    cases: tuple[tuple[Tokens, Query, Any], ...] = (
        (tokens, None, ((0,), "class token")),
        (dataclasses.replace(tokens, read=(7,)), None, ((7,), "read token")),
        (dataclasses.replace(registers, read=(0,)), None, ((0,), "read token")),
        (dataclasses.replace(tokens, read=(7, 8)), None, ((7, 8), "mean of tokens")),
        (tokens, "mean", ((1, 2, 3, 4, 5, 6), "mean of patches")),
        (registers, [16, 11], ((5,), "patch at 16, 11")),
    )
    for case, query, expected in cases:
        assert query_tokens(query, case, model, (12, 24)) == expected
    # Behind the blocks, queries of its own attend to their tokens.
    _, pooled, images = linear_transformer(pool="attention")
    behind = global_tokens(pooled, images, "attention_maps")
    assert (behind.layers, behind.pooling, behind.pooled) == (("blocks.0", "blocks.1"), "pooling", (1,))
    alone = global_tokens(pooled, images, "attention_maps", ["blocks.0"])
    assert (alone.layers, alone.pooling, alone.pooled) == (("blocks.0",), None, ())
    for call, message in (
        (lambda: global_tokens(model, images, "x", ["blocks.9"]), "blocks.9"),
        (lambda: query_tokens("class", registers, model, (12, 24)), "has no class token before its patches"),
        (lambda: query_tokens(None, dataclasses.replace(tokens, read=()), model, (12, 24)), "does not show"),
        (lambda: tokens.patch_at((24, 0), (12, 24)), "(24, 0) is outside the image of 24x12 pixels"),
        (lambda: tokens.patch_at((0, 12), (12, 24)), "(0, 12) is outside the image of 24x12 pixels"),
    ):
        refusal = ""
        try:
            call()
        except (InputError, ModelError, UnknownName) as error:
            refusal = str(error)
        assert message in refusal, refusal


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
