"""Head ablation: the drop of a target's score without each attention head."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Method, Reference, hookimpl, method, scores
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, InvariantTo, ScalesWith, size

from ._head_ablation_result import HeadAblation
from ._oracle_networks import linear_transformer
from ._tokens import at_size_of


def equals_what_the_head_adds() -> None:
    """In the last layer, a head adds w . sum_j A_0j v_j to the logit; without the head the logit lacks it.

    Instead of its own attention, uniform attention adds the mean w . v_j.
    """
    network, model, images = linear_transformer(heads=(2, 4))
    first, last = network.layers
    tokens = first(network.tokens(model.normalize(images)))
    attention = last.probabilities(tokens)[:, :, 0]
    gains = last.head_values(tokens) @ network.head.weight[1]
    added, mean = (attention * gains).sum(2), gains.mean(2)
    result = head_ablation(model, images, 1)
    torch.testing.assert_close(result.scores, model(images)[:, 1])
    torch.testing.assert_close(result.drops[:, 2:], added)
    uniform = head_ablation(model, images, 1, replacement="uniform")
    torch.testing.assert_close(uniform.drops[:, 2:], added - mean)
    assert (result.layers, result.heads) == (("blocks.0",) * 2 + ("blocks.1",) * 4, (0, 1, 0, 1, 2, 3))
    assert result.targets == ("class 1",) * 2
    # In the first layer it is the difference to a network without the head's columns of the projection.
    weight = first.project.weight.clone()
    first.project.weight[:, 4:] = 0
    torch.testing.assert_close(result.drops[:, 1], result.scores - model(images)[:, 1])
    first.project.weight.copy_(weight)


@method(
    family="attention",
    references=[
        Reference(
            key="michel2019",
            title="Are Sixteen Heads Really Better than One?",
            authors="Michel, Levy, Neubig",
            year=2019,
            url="https://arxiv.org/abs/1905.10650",
        )
    ],
    cost=Cost(forward=size.images * (1 + size.attention_heads)),
    oracle=equals_what_the_head_adds,
    relations=[
        ScalesWith("logits", power=1, fields=("drops",)),
        InvariantTo("logit_shift", fields=("drops",)),
        InvariantTo("batch_order", fields=("drops",)),
        InvariantTo("normalization", fields=("drops",)),
    ],
    defaults={"model": "builtin:shapes-vit"},
)
def head_ablation(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    replacement: Annotated[
        Literal["zero", "uniform"],
        Field(description="what a head is replaced by: no output, or equal attention to all tokens"),
    ] = "zero",
) -> HeadAblation:
    """Head ablation: the drop of a target's score without each attention head of each layer.

    drop_lh = S(x) - S(x; A_lh = 0)

    One head is ablated at a time, by a pass for each head. "zero" removes what the head adds to the tokens,
    "uniform" only which tokens it selects: A_lh = 1 / T. Attention inside windows is ablated in all windows.

    Returns:
        ``drops`` (N, M), for each of M heads of all layers, and ``scores`` (N). The figure shows the mean
        over images, a row for each layer.

    Raises:
        ModelError: a model without attention.

    Example::
        from phosphene import run

        result = run("head_ablation", model="builtin:shapes-vit", images="builtin:scenes/2", target="star")
        result.drops.shape  # (2, 16)

    Source:
        Michel et al. 2019, section 3.2, with a score instead of the accuracy.
    """
    model = at_size_of(model, images)
    if not model.attention_layers:
        # equivalent mutants: of any number of images it raises the error of a model without attention
        model.attention(images[:1])
    with torch.no_grad():
        before = scores(model, images, target)  # fixes the predicted classes
        drops, layers, heads = [], [], []
        for layer, attention in model.attention_layers.items():
            for head in range(attention.heads):
                with model.record_attention(_ablate(layer, head, replacement)):
                    drops.append(before - scores(model, images, target))
                layers.append(layer)
                heads.append(head)
    return HeadAblation(
        images=images,
        scores=before,
        drops=torch.stack(drops, 1),
        targets=target.names(model, len(images)),
        layers=tuple(layers),
        heads=tuple(heads),
    )


def _ablate(
    layer: str, head: int, replacement: Literal["zero", "uniform"]
) -> Callable[[str, Tensor], Tensor]:
    """What replaces the attention (N, heads, Q, T) of one head of a layer."""

    def replace(name: str, attention: Tensor) -> Tensor:
        if name != layer:
            return attention
        # equivalent mutants: nothing else reads the attention of a pass without gradients
        attention = attention.clone()
        attention[:, head] = 0 if replacement == "zero" else 1 / attention.shape[3]
        return attention

    return replace


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [head_ablation]
