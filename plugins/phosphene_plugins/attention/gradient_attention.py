"""Gradient-weighted attention: relevance of patches for a target through all layers of a transformer."""

from typing import Any

import torch
from torch import Tensor

from phosphene import Method, Reference, hookimpl, method, scores
from phosphene.errors import ModelError
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, Nonnegative, size

from ._oracle_networks import CENTERS, GRID, POOLS, TOKENS, linear_transformer
from ._relations import OF_A_SCORE
from ._tokens import at_size_of, global_tokens


def equals_the_closed_form_of_uniform_attention() -> None:
    """Where all T tokens attend equally, the gradients of both layers are products of weights.

    With v_hj what head h adds for token j: dS/dA2_h0j = w . v_hj, and dS/dA1_hij = u_i . v_hj, where u_i is
    what the score gains per unit of token i behind the first layer.
    """
    for pool, count in zip(POOLS, (1, TOKENS), strict=True):
        network, model, images = linear_transformer(heads=(2, 4), sharpness=0, pool=pool)
        first, second = network.layers
        before = network.tokens(model.normalize(images))
        between, weight = first(before), network.head.weight[1]
        # (N, heads, T): w . v_hj; each of the tokens that are read has 1 / count of the score.
        gain = second.head_values(between) @ weight / count
        relevance = (gain / TOKENS).relu().mean(1)  # of each token that is read
        # Each token reaches all others through the uniform attention of the second layer.
        through = torch.stack(
            [
                torch.einsum("nhjw,w->nhj", second.head_values(unit), weight)[0, :, 0].sum()
                for unit in torch.eye(8, dtype=torch.float64)[:, None, None]
            ]
        )
        read = torch.zeros(TOKENS, 1, dtype=torch.float64)
        read[:count] = 1 / count
        units = read * weight + through / TOKENS
        gains = torch.einsum("nhjw,iw->nhij", first.head_values(before), units)
        lower = torch.eye(TOKENS) + (gains / TOKENS).relu().mean(1)
        expected = (read[:count] * (lower - torch.eye(TOKENS))[:, :count]).sum(1) + (
            relevance[:, None] @ lower
        )[:, 0]
        result = gradient_attention(model, images, 1)
        torch.testing.assert_close(result.maps, expected[:, 1:].unflatten(1, GRID))
        assert (result.targets, result.centers) == (("class 1",) * 2, CENTERS)
        # Of one layer only the tokens that are read have a relevance.
        network, model, images = linear_transformer(heads=(4,), sharpness=0, pool=pool)
        (layer,) = network.layers
        gain = layer.head_values(network.tokens(model.normalize(images))) @ network.head.weight[2] / count
        expected = (gain / TOKENS).relu().mean(1)[:, 1:].unflatten(1, GRID)
        torch.testing.assert_close(gradient_attention(model, images, 2).maps, expected)
        network.head.weight.zero_()
        assert not gradient_attention(model, images, 2).maps.any()


@method(
    family="attention",
    references=[
        Reference(
            key="chefer2021",
            title="Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder "
            "Transformers",
            authors="Chefer, Gur, Wolf",
            year=2021,
            url="https://arxiv.org/abs/2103.15679",
        )
    ],
    invariants=[Nonnegative()],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=equals_the_closed_form_of_uniform_attention,
    relations=OF_A_SCORE,
    defaults={"model": "builtin:shapes-vit"},
)
def gradient_attention(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient-weighted attention: relevance of each patch for a target, through all layers.

    R_0 = I,  R_l = R_(l-1) + mean_h( ReLU( dS/dA_lh * A_lh ) ) R_(l-1),  M_j = (R_L - I)_qj

    A_lh is the attention of head h in layer l and S the target's score. q are the tokens behind the last
    layer that S depends on: the class token, or all that a head averages, whose rows are averaged. All
    layers count, the first included.

    Behind the blocks, a query of its own that attends to all tokens (attention pooling) is the last factor,
    without a residual connection.

    Returns:
        ``maps`` (N, h, w), not negative, not scaled.

    Raises:
        ModelError: a model without attention, or with attention inside windows or to tokens without a grid,
            and a target that depends on no layer's attention.

    Example::
        from phosphene import run

        vit, images = "builtin:shapes-vit", "builtin:scenes/2"
        result = run("gradient_attention", model=vit, images=images, target="star")
        result.maps.shape  # (2, 8, 8)

    Source:
        Chefer et al. 2021, equations 5 and 6, and section 3.1.
    """
    model = at_size_of(model, images)
    tokens = global_tokens(model, images, "gradient_attention")
    # The first layer's attention is a leaf of the graph: nothing below it is differentiated.
    # equivalent mutants: what requires a gradient is left as it is
    with model.record_attention(lambda _, a: a if a.requires_grad else a.requires_grad_()) as recording:
        score = scores(model, images, target)
    maps = {layer: recording.maps[layer] for layer in recording.maps if layer in model.attention_layers}
    if not maps or not score.requires_grad:
        raise ModelError(f"{target} does not depend on the attention of any layer of {model.name}")
    gradients = torch.autograd.grad(score.sum(), [*maps.values()], allow_unused=True)
    pairs = {
        layer: (attention.detach(), gradient)
        for (layer, attention), gradient in zip(maps.items(), gradients, strict=True)
        if gradient is not None
    }
    identity = torch.eye(tokens.count).to(score)
    # equivalent mutants: the product with the first layer's attention repeats it for each image
    relevance = identity.expand(len(images), -1, -1)
    for layer in tokens.layers:
        if layer in pairs:
            relevance = relevance + _weighted(*pairs[layer]) @ relevance
    if tokens.pooling in pairs:
        relevance = _weighted(*pairs[tokens.pooling]) @ relevance
    else:
        relevance = relevance - identity
    row = (_read_weights([*pairs.values()][-1][1])[:, None] @ relevance)[:, 0]
    return Attribution(
        images=images,
        maps=tokens.maps(row),
        targets=target.names(model, len(images)),
        centers=tokens.centers,
    )


def _weighted(attention: Tensor, gradient: Tensor) -> Tensor:
    """mean_h ReLU(dS/dA_h * A_h): (N, heads, Q, T) -> (N, Q, T)."""
    return (gradient * attention).relu().mean(1)


def _read_weights(gradient: Tensor) -> Tensor:
    """(N, Q): 1 / n for the n queries on which the score depends, by the gradient (N, heads, Q, T)."""
    read = (gradient != 0).any(3).any(1).to(gradient)
    return read / read.sum(1, keepdim=True).clamp(min=1)


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [gradient_attention]
