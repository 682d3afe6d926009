"""LeGrad: gradients of a target with respect to the attention of each layer's own score."""

import functools
from typing import Any

import torch
from torch import Tensor

from phosphene import Method, Reference, hookimpl, method, scores
from phosphene.errors import ModelError
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, Nonnegative, ScalesWith, size

from ._blocks import block_of_each_layer
from ._oracle_networks import CENTERS, GRID, POOLS, TOKENS, linear_transformer
from ._relations import OF_A_SCORE
from ._tokens import at_size_of, global_tokens


def equals_the_closed_form_of_linear_blocks() -> None:
    """Without a norm s^l = w . mean_t x_t^l + b, so that ds/dA_hij = w . v_hj / T for every query i.

    v_hj is what head h adds for token j: E_j is the mean over heads of ReLU(w . v_hj) / T. Of the square of
    the logit it is 2 s^l times as large.
    """
    for pool in POOLS:
        network, model, images = linear_transformer(heads=(2, 4, 1), pool=pool)
        predicted = network(model.normalize(images)).argmax(1)
        second = torch.tensor([2, 2])
        for target, classes in ((2, second), (None, predicted), (_square_of_class_2, second)):
            weight, bias = network.head.weight[classes], network.head.bias[classes]
            tokens, layers = network.tokens(model.normalize(images)), []
            for block in network.layers:
                gain = torch.einsum("nhjc,nc->nhj", block.head_values(tokens), weight)
                tokens = block(tokens)
                if callable(target):
                    gain = gain * 2 * ((tokens.mean(1) * weight).sum(1) + bias)[:, None, None]
                layers.append((gain / TOKENS).relu().mean(1))
            result = legrad(model, images, target)
            expected = torch.stack(layers).mean(0)[:, 1:].unflatten(1, GRID)
            torch.testing.assert_close(result.maps, expected)
            assert result.centers == CENTERS
            if not callable(target):
                assert result.targets == tuple(f"class {index}" for index in classes.tolist())


def _square_of_class_2(logits: Tensor) -> Tensor:
    return logits[:, 2].square()


@method(
    family="attention",
    title="LeGrad",
    references=[
        Reference(
            key="bousselham2024",
            title="LeGrad: An Explainability Method for Vision Transformers via Feature Formation "
            "Sensitivity",
            authors="Bousselham, Boggust, Chaybouti, Strobelt, Kuehne",
            year=2024,
            url="https://arxiv.org/abs/2404.03214",
        )
    ],
    invariants=[Nonnegative()],
    needs=["gradients"],
    cost=Cost(
        forward=size.images * (1 + size.attention_layers), backward=size.images * size.attention_layers
    ),
    oracle=equals_the_closed_form_of_linear_blocks,
    relations=[*OF_A_SCORE, ScalesWith("logits", power=1)],
    defaults={"model": "builtin:shapes-vit"},
)
def legrad(model: Model, images: Images, target: Target = None) -> Attribution:
    """LeGrad: the sensitivity of each layer's own score to its attention, averaged over layers.

    E^l_j = mean_hi ReLU( ds^l / dA^l_hij ),  M = mean_l E^l

    s^l is the target's score of the tokens behind block l alone: their mean over all tokens, class token
    included, goes through what follows the last block (norm, pooling and head). The target must depend on
    the last block, as classes, contrasts and similarities do.

    Returns:
        ``maps`` (N, h, w), not negative, not scaled.

    Raises:
        ModelError: a model without attention, or with attention inside windows or to tokens without a grid,
            or without blocks that output its tokens, and a target that does not depend on the last block.

    Example::
        from phosphene import run

        result = run("legrad", model="builtin:shapes-vit", images="builtin:scenes/2", target="star")
        result.maps.shape  # (2, 8, 8)

    Source:
        Bousselham et al. 2024, equations 6 to 10; the mean over layers is unscaled.
    """
    model = at_size_of(model, images)
    tokens = global_tokens(model, images, "legrad")
    blocks = block_of_each_layer(model, tokens, "legrad")
    last = blocks[tokens.layers[-1]]
    # The first layer's attention is a leaf of the graph: nothing below it is differentiated.
    with (
        model.record_attention(lambda _, a: a if a.requires_grad else a.requires_grad_()) as recording,
        model.tap(*blocks.values()) as tap,
    ):
        scores(model, images, target)  # fixes the predicted classes
    sensitivity = torch.zeros(len(images), tokens.count).to(images)
    for layer, block in blocks.items():
        mean = tap[block].mean(1, keepdim=True).expand_as(tap[block])
        with model.tap(last, replace=functools.partial(_replaced_by, mean)):
            score = scores(model, images, target)
        gradient = _gradient(score, recording.maps[layer])
        if gradient is None:
            raise ModelError(f"{target} does not depend on {last}, the last block of {model.name}")
        sensitivity = sensitivity + gradient.relu().mean((1, 2)).to(sensitivity) / len(blocks)
    return Attribution(
        images=images,
        maps=tokens.maps(sensitivity),
        targets=target.names(model, len(images)),
        centers=tokens.centers,
    )


def _replaced_by(tokens: Tensor, output: Tensor) -> Tensor:
    return tokens


def _gradient(score: Tensor, attention: Tensor) -> Tensor | None:
    """dS/dA of one layer; None where the score does not depend on it."""
    if not score.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(score.sum(), attention, allow_unused=True)
    return gradient


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [legrad]
