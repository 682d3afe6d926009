"""Token norms: high-norm patch tokens of a vision transformer, by block and image."""

import dataclasses
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from phosphene import Method, Reference, hookimpl, method
from phosphene.roles import Images, Model
from phosphene.spec import Agrees, Calls, Cost, InvariantTo, Nonnegative, ScalesWith, size

from ._blocks import block_of_each_layer
from ._oracle_networks import GRID, WIDTH, linear_transformer
from ._relations import FLIPS
from ._token_norms_result import TokenNorms, high_norms
from ._tokens import at_size_of, global_tokens


def equals_the_norms_of_the_tokens() -> None:
    """Blocks that add nothing keep |W x + p|; one patch that is ten times as large as the others is high."""
    network, model, images = linear_transformer(heads=(2, 4))
    for block in network.layers:
        block.project.weight.zero_()
    nn.init.zeros_(network.positions)
    patches = network.patches(model.normalize(images)).flatten(2).transpose(1, 2)
    expected = patches.square().sum(2).sqrt().unflatten(1, GRID)
    result = token_norms(model, images)
    torch.testing.assert_close(result.maps, torch.stack([expected, expected], 1))
    length = network.class_token.square().sum().sqrt()
    torch.testing.assert_close(result.others, length.expand(2, 2, 1))
    network.positions[0, 5] = 1000 / WIDTH**0.5  # a vector of norm 1000
    result = token_norms(model, images, factor=10)
    assert result.high.tolist() == [[1, 1], [1, 1]] and bool(result.is_high()[:, :, 1, 0].all())
    assert result.images_with_high_norms() == {"blocks.0": [0, 1], "blocks.1": [0, 1]}
    assert token_norms(model, images, factor=1e6).images_with_high_norms() == {}
    # In the second block of the second of three images one norm exceeds twice the median of 10.
    maps = torch.tensor([[1.0, 1, 2], [1, 0, 1]]).expand(3, 2, 2, 3) * torch.tensor([1.0, 10]).view(2, 1, 1)
    maps[1, 1, 1, 2] = 40
    high = high_norms(maps, 2)
    assert high.nonzero().tolist() == [[1, 1, 1, 2]] and torch.equal(high_norms(maps[1], 2), high[1])
    three = dataclasses.replace(result, layers=("first", "second"), high=high.sum((2, 3)))
    assert three.images_with_high_norms() == {"second": [1]}


@torch.no_grad()
def norms_of_the_features(calls: Calls) -> torch.Tensor:
    """The norms of the blocks' outputs, class token dropped."""
    images, result = calls.inputs["images"], calls.result
    features = calls.model.features_of(images, result.layers)
    return torch.stack([f[:, 1:].norm(dim=2).view(result.maps[:, 0].shape) for f in features], 1)


@method(
    family="attention",
    references=[
        Reference(
            key="darcet2024",
            title="Vision Transformers Need Registers",
            authors="Darcet, Oquab, Mairal, Bojanowski",
            year=2024,
            url="https://arxiv.org/abs/2309.16588",
        )
    ],
    invariants=[Nonnegative(), Nonnegative(field="others"), Nonnegative(field="high")],
    cost=Cost(forward=size.images),
    oracle=equals_the_norms_of_the_tokens,
    relations=[
        Agrees(norms_of_the_features, networks=("tokens",)),
        *FLIPS,
        InvariantTo("batch_order"),
        InvariantTo("normalization"),
        ScalesWith("logits", power=0, fields=("maps", "others")),
    ],
    defaults={"model": "builtin:shapes-vit"},
)
def token_norms(
    model: Model,
    images: Images,
    *,
    factor: Annotated[
        float,
        Field(gt=1, description="a patch's norm is high above this many times the median of its image"),
    ] = 3.0,
) -> TokenNorms:
    """Token norms: which patch tokens have a far larger norm than the others, behind which block.

    |x_lj|_2,  high where it is > factor * median_j |x_lj|_2

    Large vision transformers store information about the image in a few patches of the background, whose
    norms are several times those of the others, and which attract the attention of all. Maps of attention
    and of features show them as speckles. Register tokens take their part, if the network has any; the model
    ``registers:URI`` is the network at URI with one that was not trained.

    Returns:
        ``maps`` (N, L, h, w) of L blocks, ``others`` (N, L, S), the norms of class and register tokens, and
        ``high`` (N, L), the number of high patches. ``lines()`` sums up each block over all images.

    Raises:
        ModelError: a model without attention, or with attention inside windows or to tokens without a grid,
            or without blocks that output its tokens.

    Example::
        from phosphene import run

        result = run("token_norms", model="builtin:shapes-vit", images="builtin:scenes/2")
        result.maps.shape  # (2, 4, 8, 8)

    Source:
        Darcet et al. 2024, section 2.1, with a threshold relative to the median instead of a fixed one.
    """
    model = at_size_of(model, images)
    tokens = global_tokens(model, images, "token_norms")
    blocks = dict.fromkeys(block_of_each_layer(model, tokens, "token_norms").values())
    with torch.no_grad():
        features = model.features_of(images, list(blocks))
    norms = torch.stack([values.norm(dim=2) for values in features], 1)
    maps = tokens.maps(norms)
    return TokenNorms(
        images=images,
        maps=maps,
        others=tokens.others(norms),
        high=high_norms(maps, factor).flatten(2).sum(2),
        factor=factor,
        layers=tuple(blocks),
        centers=tokens.centers,
    )


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [token_norms]
