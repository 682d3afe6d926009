"""Logit lens: the logits that the model's head computes from the tokens behind each block."""

import functools
from typing import Any

import torch
from torch import Tensor

from phosphene import Method, Reference, hookimpl, method
from phosphene.roles import Images, Model
from phosphene.spec import Agrees, Calls, Cost, InvariantTo, ScalesWith, UnitRange, size

from ._blocks import block_of_each_layer
from ._logit_lens_result import LogitLens
from ._oracle_networks import POOLS, linear_transformer
from ._tokens import at_size_of, global_tokens


def equals_the_head_of_the_tokens_behind_each_block() -> None:
    """Without a norm the logits behind block l are W x^l + b of the class token, or of the mean."""
    for pool in POOLS:
        network, model, images = linear_transformer(heads=(2, 4, 1), pool=pool)
        tokens, expected = network.tokens(model.normalize(images)), []
        for block in network.layers:
            tokens = block(tokens)
            read = tokens[:, 0] if pool == "class" else tokens.mean(1)
            expected.append(read @ network.head.weight.T + network.head.bias)
        result = logit_lens(model, images)
        logits = torch.stack(expected, 1)
        torch.testing.assert_close(result.logits, logits)
        torch.testing.assert_close(result.probabilities, logits.exp() / logits.exp().sum(2, keepdim=True))
        assert result.layers == ("blocks.0", "blocks.1", "blocks.2")
        assert result.classes == ("class 0", "class 1", "class 2")
        # Classes that do not exclude each other have a probability each.
        _, several, images = linear_transformer(heads=(2, 4, 1), pool=pool, task="multilabel")
        result = logit_lens(several, images)
        torch.testing.assert_close(result.logits, logits)
        torch.testing.assert_close(result.probabilities, 1 / (1 + (-logits).exp()))


def logits_of_the_model(calls: Calls) -> Tensor:
    """The model's own logits behind the last block; those behind the others are the result's."""
    logits: Tensor = calls.result.logits.clone()
    logits[:, -1] = calls.logits(calls.inputs["images"])
    return logits


@method(
    family="attention",
    references=[
        Reference(
            key="nostalgebraist2020",
            title="Interpreting GPT: the Logit Lens",
            authors="nostalgebraist",
            year=2020,
            url="https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens",
        )
    ],
    invariants=[UnitRange(field="probabilities")],
    cost=Cost(forward=size.images * (1 + size.attention_layers)),
    oracle=equals_the_head_of_the_tokens_behind_each_block,
    relations=[
        Agrees(logits_of_the_model, fields=("logits",), networks=("tokens", "hflip-tokens")),
        ScalesWith("logits", power=1, fields=("logits",)),
        InvariantTo("logit_shift", fields=("probabilities",)),
        InvariantTo("batch_order", fields=("logits",)),
        InvariantTo("normalization", fields=("logits",)),
    ],
    defaults={"model": "builtin:shapes-vit"},
)
def logit_lens(model: Model, images: Images) -> LogitLens:
    """Logit lens: the logits of the tokens behind each block, through the model's own norm and head.

    z_l = head(norm(x_l))

    x_l are the tokens behind block l, and what follows the last block (norm, pooling and head) is applied to
    them. It shows behind which block the prediction is made. The blocks were not trained for it: logits of
    the first blocks may mean little.

    Returns:
        ``logits`` (N, L, K) and ``probabilities`` (N, L, K) of L blocks; behind the last block they are the
        model's own.

    Raises:
        ModelError: a model without attention or classes, or with attention inside windows, or without blocks
            that output its tokens.

    Example::
        from phosphene import run

        result = run("logit_lens", model="builtin:shapes-vit", images="builtin:scenes/2")
        result.logits.shape  # (2, 4, 10)

    Source:
        nostalgebraist 2020.
    """
    model = at_size_of(model, images)
    tokens = global_tokens(model, images, "logit_lens")
    blocks = list(block_of_each_layer(model, tokens, "logit_lens").values())
    several = model.task == "multilabel"
    with torch.no_grad():
        with model.tap(*blocks) as tap:
            last = model.outputs(images) if several else model(images)
        logits = []
        for block in blocks[:-1]:
            with model.tap(blocks[-1], replace=functools.partial(_replaced_by, tap[block])):
                logits.append(model.outputs(images))
    stacked = torch.stack([*logits, last], 1)
    return LogitLens(
        images=images,
        logits=stacked,
        probabilities=stacked.sigmoid() if several else stacked.softmax(2),
        layers=tuple(blocks),
        classes=tuple(map(model.class_name, range(stacked.shape[2]))),
    )


def _replaced_by(tokens: Tensor, output: Tensor) -> Tensor:
    return tokens


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [logit_lens]
