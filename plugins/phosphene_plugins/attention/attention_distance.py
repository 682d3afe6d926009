"""Attention distance: how far each head of each layer attends, in pixels."""

from typing import Any

import torch
from torch import Tensor

from phosphene import Method, Reference, attention_centers, hookimpl, method
from phosphene.errors import ModelError
from phosphene.roles import Images, Model
from phosphene.spec import Cost, Equivariant, InvariantTo, Nonnegative, ScalesWith, size

from ._attention_distances_result import AttentionDistances
from ._oracle_networks import GRID, PATCH, linear_transformer
from ._tokens import at_size_of


def equals_the_weighted_mean_of_the_distances() -> None:
    """Of uniform attention it is the mean distance on the grid, of sharp attention sum_j A_ij d_ij."""
    columns = torch.arange(15, dtype=torch.float64) % GRID[1]
    rows = torch.arange(15, dtype=torch.float64) // GRID[1]
    distance = PATCH * ((rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2).sqrt()
    _, model, images = linear_transformer(heads=(2, 1), sharpness=0)
    result = attention_distance(model, images)
    expected = distance.mean().expand(2, 3)
    torch.testing.assert_close(result.distances, expected)
    torch.testing.assert_close(result.uniform, expected[0])
    network, model, images = linear_transformer(heads=(2, 1))
    result = attention_distance(model, images)
    assert (result.layers, result.heads) == (("blocks.0", "blocks.0", "blocks.1"), (0, 1, 0))
    attention = torch.cat(network.probabilities(model.normalize(images)), 1)[:, :, 1:, 1:]
    weights = attention / attention.sum(3, keepdim=True)
    torch.testing.assert_close(result.distances, (weights * distance).sum(3).mean(2))
    # Two tokens at a distance of 5 after a class token: the query that attends to that alone does not count.
    between = torch.tensor([[0.0, 0, 0], [0, 0, 5], [0, 5, 0]])[None, None]
    rows = torch.tensor([[[1.0, 0, 0], [1, 0, 0], [0.5, 0.1, 0.4]], [[1, 0, 0]] * 3])[:, None, None]
    counted = _mean_distance(rows, between, torch.tensor([0.0, 1, 1])[None, None])
    torch.testing.assert_close(counted, torch.tensor([[1.0], [0]]))


@method(
    family="attention",
    references=[
        Reference(
            key="dosovitskiy2021",
            title="An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
            authors="Dosovitskiy, Beyer, Kolesnikov, Weissenborn, Zhai, Unterthiner, Dehghani, Minderer, "
            "Heigold, Gelly, Uszkoreit, Houlsby",
            year=2021,
            url="https://arxiv.org/abs/2010.11929",
        )
    ],
    invariants=[Nonnegative(field="distances"), Nonnegative(field="uniform")],
    cost=Cost(forward=size.images),
    oracle=equals_the_weighted_mean_of_the_distances,
    relations=[
        *(Equivariant(name, fields=("distances",)) for name in ("hflip", "vflip", "transpose")),
        InvariantTo("batch_order", fields=("distances",)),
        InvariantTo("normalization", fields=("distances",)),
        ScalesWith("logits", power=0, fields=("distances",)),
    ],
    defaults={"model": "builtin:shapes-vit"},
)
def attention_distance(model: Model, images: Images) -> AttentionDistances:
    """Attention distance: the mean distance from a patch to the patches that it attends to, by head.

    d = mean_i( sum_j A_ij |p_i - p_j| / sum_j A_ij )

    p are the pixels at which the patches i and j are centered. Attention to class and register tokens, which
    have no position, does not count. Inside windows (Swin) j are the patches of the window of i, and shifted
    windows that join two sides of the image have their true distances. Layers in which queries of their own
    attend to the patches are left out.

    Returns:
        ``distances`` (N, M) in pixels, for each of M heads of all layers, and ``uniform`` (M), those of
        uniform attention, with which to compare them. The figure shows the mean over images.

    Raises:
        ModelError: a model without attention between patches, or one whose functions do not reveal their
            positions.

    Example::
        from phosphene import run

        result = run("attention_distance", model="builtin:shapes-vit", images="builtin:scenes/2")
        result.distances.shape  # (2, 16)

    Source:
        Dosovitskiy et al. 2021, section 4.5 and appendix D.7.
    """
    model, shape = at_size_of(model, images), images.shape[2:]
    # equivalent mutants: results are detached
    maps = {name: values.detach() for name, values in model.attention(images).items()}
    distances, uniform, layers, heads = [], [], [], []
    for name, layer in model.attention_layers.items():
        centers = attention_centers(model, name, shape) if layer.queries == layer.keys else None
        if centers is None:
            continue
        attention = maps[name] if layer.windows > 1 else maps[name][:, None]
        positions = centers.isfinite().all(2).to(attention)  # (W, T), 0 for class tokens and padding
        between = torch.cdist(centers.nan_to_num(), centers.nan_to_num()).to(attention)
        distances.append(_mean_distance(attention, between[:, None], positions[:, None]))
        # equivalent mutants: the first image's is used, and all heads have the same
        equal = torch.ones_like(attention[:1, :, :1])
        uniform.append(_mean_distance(equal, between[:, None], positions[:, None])[0].expand(layer.heads))
        layers += [name] * layer.heads
        heads += list(range(layer.heads))
    if not distances:
        raise ModelError(
            f"{model.name} has no attention between tokens whose positions in the image can be determined"
        )
    return AttentionDistances(
        images=images,
        distances=torch.cat(distances, 1),
        uniform=torch.cat(uniform),
        layers=tuple(layers),
        heads=tuple(heads),
    )


def _mean_distance(attention: Tensor, between: Tensor, positions: Tensor) -> Tensor:
    """(N, heads) of attention (N, W, heads, T, T): the mean over the queries that have a position.

    ``between`` (W, 1, T, T) are the distances, ``positions`` (W, 1, T) is 1 for tokens with a position.
    """
    weights = attention * positions[:, :, None]
    total = weights.sum(4)
    # All attention may be to tokens without a position; such a query does not count.
    counted = positions * (total > 0)
    distance = (weights * between).sum(4) / torch.where(total > 0, total, 1) * counted
    return distance.sum((1, 3)) / counted.sum((1, 3)).clamp(min=1)


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [attention_distance]
