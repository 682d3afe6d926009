"""Attention rollout: how much of each patch reaches the class token through all layers."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Method, Reference, hookimpl, method
from phosphene.roles import Images, Model
from phosphene.spec import Agrees, Calls, Cost, SumsToOne, UnitRange, size

from ._oracle_networks import CENTERS, GRID, TOKENS, linear_transformer
from ._relations import WITHOUT_A_SCORE
from ._token_attribution_result import TokenAttribution
from ._tokens import Query, Tokens, global_tokens, query_tokens


def equals_the_power_of_uniform_attention() -> None:
    """Where all attend to all T tokens equally, L layers have R = (1 - 2^-L) / T + 2^-L I.

    And of sharp attention it is the product of (A + I) / 2, computed by hand.
    """
    _, model, images = linear_transformer(heads=(2, 4, 1), sharpness=0)
    result = attention_rollout(model, images)
    expected = torch.full((2, *GRID), (1 - 2**-3) / TOKENS, dtype=torch.float64)
    torch.testing.assert_close(result.maps, expected)
    torch.testing.assert_close(result.others, expected[:, 0, :1] + 2**-3)
    network, model, images = linear_transformer(heads=(2, 4))
    identity = torch.eye(TOKENS, dtype=torch.float64)
    attention = network.probabilities(model.normalize(images))
    for fusion in ("mean", "max", "min"):
        first, last = (
            {"mean": a.mean(1), "max": a.max(1).values, "min": a.min(1).values}[fusion] + identity
            for a in attention
        )
        rows = last / last.sum(2, keepdim=True) @ (first / first.sum(2, keepdim=True))
        fused = attention_rollout(model, images, fusion=fusion)
        torch.testing.assert_close(fused.maps, rows[:, 0, 1:].unflatten(1, GRID))
    patch = attention_rollout(model, images, fusion="min", query=[15, 0])
    torch.testing.assert_close(patch.maps, rows[:, 4, 1:].unflatten(1, GRID))
    mean = attention_rollout(model, images, fusion="min", query="mean")
    torch.testing.assert_close(mean.others, rows[:, 1:, :1].mean(1))
    # A discarded weight is 0, except that to the class token; half of 16 x 16 weights are 128.
    cut = [a.mean(1) for a in attention]
    for matrix in cut:
        largest_discarded = matrix.flatten(1).sort(1).values[:, 127, None, None]
        matrix[:, :, 1:] *= matrix[:, :, 1:] > largest_discarded
    first, last = (a + identity for a in cut)
    rows = last / last.sum(2, keepdim=True) @ (first / first.sum(2, keepdim=True))
    discarded = attention_rollout(model, images, discard=0.5)
    torch.testing.assert_close(discarded.maps, rows[:, 0, 1:].unflatten(1, GRID))
    assert discarded.centers == CENTERS
    # Queries of their own attend to the patches behind the last layer, and the model reads the second.
    network, model, images = linear_transformer(heads=(2,), pool="attention")
    layer, pooling = (a.max(1).values for a in network.probabilities(model.normalize(images)))
    rollout = (layer + identity) / (layer + identity).sum(2, keepdim=True)
    row = (pooling[:, 1:] / pooling[:, 1:].sum(2, keepdim=True) @ rollout)[:, 0]
    pooled = attention_rollout(model, images, fusion="max")
    torch.testing.assert_close(torch.cat([pooled.others, pooled.maps.flatten(1)], 1), row)
    by_class = attention_rollout(model, images, fusion="max", query="class")
    torch.testing.assert_close(by_class.maps, rollout[:, 0, 1:].unflatten(1, GRID))
    assert (pooled.targets, by_class.targets) == (("pooled tokens",) * 2, ("class token",) * 2)


def product_of_the_layers(calls: Calls) -> Tensor:
    """The class token's row of the product of (mean over heads + I) / 2, from the recorded attention."""
    images = calls.inputs["images"]
    product = None
    for attention in calls.model.attention(images).values():
        mixed = (attention.mean(1) + torch.eye(attention.shape[-1]).to(attention)) / 2
        product = mixed if product is None else mixed @ product
    assert product is not None
    return product[:, 0, 1:].view(calls.result.maps.shape)


@method(
    family="attention",
    references=[
        Reference(
            key="abnar2020",
            title="Quantifying Attention Flow in Transformers",
            authors="Abnar, Zuidema",
            year=2020,
            url="https://arxiv.org/abs/2005.00928",
        )
    ],
    invariants=[UnitRange(), SumsToOne(rest="others")],
    cost=Cost(forward=size.images),
    oracle=equals_the_power_of_uniform_attention,
    relations=[Agrees(product_of_the_layers, networks=("tokens",)), *WITHOUT_A_SCORE],
    defaults={"model": "builtin:shapes-vit"},
)
def attention_rollout(
    model: Model,
    images: Images,
    *,
    fusion: Annotated[
        Literal["mean", "max", "min"], Field(description="how the heads of a layer become one matrix")
    ] = "mean",
    discard: Annotated[
        float,
        Field(ge=0, lt=1, description="fraction of a layer's smallest weights that are set to 0"),
    ] = 0.0,
    query: Query = None,
) -> TokenAttribution:
    """Attention rollout: the product of all layers' attention, with the residual connections.

    R = R_L ... R_1,  R_l = (A_l + I) / rows,  M_j = R_qj

    A_l is the mean over the heads (or their maximum or minimum) of layer l, and each row of A_l + I is
    divided by its sum, which is 2 for the mean. q is the token that the model's output reads, by default. A
    rollout depends on no target: it is the same for all classes. ``discard`` sets the smallest weights of
    A_l to 0, those to the class token excepted.

    Behind the blocks, a query of its own that attends to all tokens (attention pooling) is the last factor,
    without a residual connection.

    Returns:
        ``maps`` (N, h, w) and ``others`` (N, S), for class and register tokens. Together they sum to 1.

    Raises:
        ModelError: a model without attention, or with attention inside windows or to tokens without a grid.
        InputError: a pixel outside the image.

    Example::
        from phosphene import run

        result = run("attention_rollout", model="builtin:shapes-vit", images="builtin:scenes/2")
        result.maps.shape  # (2, 8, 8)

    Source:
        Abnar and Zuidema 2020, section 3, equations 1 and 2. ``discard`` and the fusion of heads: Gildenblat
        2020, "Exploring Explainability for Vision Transformers".
    """
    tokens = global_tokens(model, images, "attention_rollout")
    pooling = tokens.pooling if query is None and tokens.pooled else None
    queries, name = tokens.pooled, "pooled tokens"
    if pooling is None:
        queries, name = query_tokens(query, tokens, model, images.shape[2:])
    # equivalent mutants: results are detached
    attention = {layer: maps.detach() for layer, maps in model.attention(images).items()}
    identity = torch.eye(tokens.count, device=images.device)
    # equivalent mutants: the product with the first layer's attention repeats it for each image
    rollout = identity.expand(len(images), -1, -1)
    for layer in tokens.layers:
        fused = _discard_smallest(_fuse(attention[layer], fusion), discard, tokens)
        mixed = fused + identity
        rollout = mixed / mixed.sum(2, keepdim=True) @ rollout.to(mixed)
    if pooling is not None:
        weights = _fuse(attention[pooling], fusion)
        rollout = weights / weights.sum(2, keepdim=True) @ rollout
    row = rollout[:, list(queries)].mean(1)
    return TokenAttribution(
        images=images,
        maps=tokens.maps(row),
        others=tokens.others(row),
        targets=(name,) * len(images),
        centers=tokens.centers,
    )


def _fuse(attention: Tensor, fusion: Literal["mean", "max", "min"]) -> Tensor:
    """One matrix (N, Q, T) of the heads' (N, heads, Q, T)."""
    if fusion == "mean":
        return attention.mean(1)
    return attention.amax(1) if fusion == "max" else attention.amin(1)


def _discard_smallest(attention: Tensor, fraction: float, tokens: Tokens) -> Tensor:
    """Attention (N, T, T) with the smallest weights 0, except those to a class token."""
    count = int(fraction * attention[0].numel())
    if count == 0:
        return attention
    # equivalent mutants: axis 1 is the last
    smallest = attention.flatten(1).topk(count, dim=1, largest=False).indices
    cut = attention.flatten(1).scatter(1, smallest, 0).view_as(attention)
    if tokens.layout.before:
        cut[:, :, 0] = attention[:, :, 0]
    return cut


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [attention_rollout]
