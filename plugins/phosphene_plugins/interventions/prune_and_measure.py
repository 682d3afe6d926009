"""Pruning: accuracy without the dead or redundant channels of a layer, beside random channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Fold,
    Reference,
    TensorDataset,
    batch_size,
    fork_random_state,
    hookimpl,
    load_model,
    method,
)
from phosphene import Model as _Model
from phosphene.data import Batch, State
from phosphene.roles import Dataset, LayerName, Model, Seed
from phosphene.spec import Cost, InvariantTo, UnitRange, param, size
from phosphene.training import class_indices

from ..activations.activation_statistics import activation_statistics
from ..activations.channel_redundancy import MAX_GROUPS, channel_redundancy
from ..attention._oracle_networks import linear_transformer
from ..influence._weight_gradients import require_class_labels
from ._pruning_result import PruningCurves


def accuracy_without_columns() -> None:
    """The accuracy without channels is that of the head without their columns of weights.

    Two channels are dead, one is a copy of another: they are cut first without any loss.
    """
    draw = torch.Generator().manual_seed(0)
    convolution, head = nn.Conv2d(3, 6, 1), nn.Linear(6, 3)
    network = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()
    bias = convolution.bias
    assert bias is not None
    with torch.no_grad():
        convolution.weight.normal_(generator=draw)
        bias.fill_(0.5)
        bias[[1, 4]] = -100
        convolution.weight[5], bias[5] = convolution.weight[2], bias[2] - 0.05
        head.weight.normal_(generator=draw)
    model = load_model(network, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], input_size=(3, 2, 3))
    images = torch.rand(40, 3, 2, 3, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        pooled = network[:4](model.normalize(images))
        logits = head(pooled)
        labels = logits.argmax(1)
        data = TensorDataset(images, [str(n) for n in labels.tolist()])
        result = prune_and_measure(model, data, layer="1", steps=6, repeats=2, seed=0)
        assert result.counts == (0, 1, 2, 3, 4, 5, 6) and result.dead == 2
        assert result.order[:2] == (1, 4) and result.accuracy[:3].tolist() == [1, 1, 1]
        mean = pooled.mean(0)
        active = (network[:2](model.normalize(images)) > 0).double().mean((0, 2, 3))
        assert list(result.order) == active.argsort(stable=True).tolist()
        torch.testing.assert_close(result.ranks, active[list(result.order)])
        options: dict[str, Any] = {"layer": "1", "steps": 3, "repeats": 1, "seed": 0}
        replacements: dict[Any, Tensor] = {"zero": torch.zeros(6).double(), "mean": mean}
        for replacement, value in replacements.items():
            result = prune_and_measure(model, data, replacement=replacement, **options)
            for count, accuracy in zip(result.counts, result.accuracy.tolist(), strict=True):
                changed = pooled.clone()
                changed[:, list(result.order[:count])] = value[list(result.order[:count])]
                assert abs(float((head(changed).argmax(1) == labels).double().mean()) - accuracy) < 1e-12
        assert result.counts == (0, 2, 4, 6) and result.removable()[:2] == (1, 4)
        torch.testing.assert_close(result.shares, torch.tensor([0, 1 / 3, 2 / 3, 1]).double())
        with fork_random_state():
            torch.manual_seed(0)
            order = torch.randperm(6)
        for count, accuracy in zip(result.counts, result.random_accuracy[0].tolist(), strict=True):
            changed = pooled.clone()
            changed[:, order[:count]] = mean[order[:count]]
            assert abs(float((head(changed).argmax(1) == labels).double().mean()) - accuracy) < 1e-12
        # Of another layer: the pooled channels.
        result = prune_and_measure(model, data, **options | {"layer": "2"})
        torch.testing.assert_close(result.ranks, (pooled > 0).double().mean(0).sort().values)
        result = prune_and_measure(model, data, criterion="redundant", **options | {"layer": "2"})
        similarity = channel_redundancy(model, data, layer="2").similarity.abs().fill_diagonal_(0)
        torch.testing.assert_close(result.ranks[2], similarity[[0, 2, 3, 5]][:, [0, 2, 3, 5]].max())
        # Of the most similar pair the less active channel is cut first, and dead ones before all.
        result = prune_and_measure(model, data, criterion="redundant", **options)
        assert active[5] < active[2] and result.order[:3] == (1, 4, 5)
        assert float(result.ranks[2]) > 0.99 and float(result.ranks[0]) == 1 and float(result.ranks[3]) < 0.9
    _channels_are_on_the_axis_of_neighbors()


class _ChannelsLast(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps.movedim(1, -1)


def _channels_are_on_the_axis_of_neighbors() -> None:
    """Of maps on the first axis, of maps with the channels last and of tokens on the last one."""
    layers = nn.Conv2d(3, 3, 1), _ChannelsLast(), nn.Flatten(), nn.Linear(36, 2)
    model = load_model(nn.Sequential(*layers).double(), input_size=(3, 3, 4))
    images = torch.rand(2, 3, 3, 4, dtype=torch.float64)
    for layer, axis in (("0", 1), ("1", 3)):
        assert _channel_axis(model, layer, images, model.features(images, layer)) == axis
    _, transformer, images = linear_transformer()
    tokens = transformer.features(images, "blocks.0")
    assert _channel_axis(transformer, "blocks.0", images, tokens) == 2


@method(
    family="interventions",
    references=[
        Reference(
            key="hu2016",
            title="Network Trimming: A Data-Driven Neuron Pruning Approach",
            authors="Hu, Peng, Tai, Tang",
            year=2016,
            url="https://arxiv.org/abs/1607.03250",
        ),
        Reference(
            key="mittal2018",
            title="Recovering from Random Pruning: On the Plasticity of Deep Convolutional Neural Networks",
            authors="Mittal, Bhardwaj, Khapra, Ravindran",
            year=2018,
            url="https://arxiv.org/abs/1801.10447",
        ),
    ],
    invariants=[UnitRange(field="accuracy"), UnitRange(field="random_accuracy")],
    relations=[
        InvariantTo("logit_shift", fields=("accuracy", "ranks")),
        InvariantTo("normalization", fields=("accuracy", "ranks")),
        InvariantTo("dataset_order", fields=("accuracy", "ranks")),
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset * (2 + (param.steps + 1) * (param.repeats + 1)) + MAX_GROUPS),
    oracle=accuracy_without_columns,
    quick={"steps": 3, "repeats": 2},
    demo={"dataset": "builtin:scenes/400"},
)
def prune_and_measure(
    model: Model,
    dataset: Dataset,
    *,
    layer: Annotated[LayerName | None, Field(description="layer to prune; default: the last map")] = None,
    criterion: Annotated[
        Literal["inactive", "redundant"],
        Field(description="channels that are cut first: the least active, or those most similar to another"),
    ] = "inactive",
    replacement: Annotated[
        Literal["zero", "mean"], Field(description="what a cut channel outputs: 0, or its mean activation")
    ] = "zero",
    steps: Annotated[
        int, Field(ge=1, le=1000, description="number of shares at which the accuracy is measured")
    ] = 10,
    repeats: Annotated[int, Field(ge=1, le=100, description="number of random orders")] = 3,
    seed: Seed = None,
) -> PruningCurves:
    """Pruning: accuracy against the share of a layer's channels that are cut, beside random channels.

    accuracy(m) = 1/N sum_i [ argmax z(x_i; A_c = 0 for the first m channels c) = y_i ]

    "inactive" cuts the channels in the order of the fraction of positions at which they are active, as
    ``activation_statistics`` returns it, the dead ones first. "redundant" cuts, after the dead ones, of the
    two most similar channels that remain the less active one, by the absolute ``similarity`` that
    ``channel_redundancy`` returns. A criterion is useful where its curve lies above that of random
    channels. Nothing is trained after the cut; a network that is fine-tuned recovers much of the accuracy.
    The model is not changed: its activations are replaced. With ``mean`` the layer above gets a constant,
    which its bias could absorb.

    Returns:
        ``accuracy`` (S) and ``random_accuracy`` (R, S) at ``shares`` (S); ``order`` and ``ranks`` (C).
        ``removable(loss)``: the channels that can be cut.

    Raises:
        InputError: a data set without classes.
        ModelError: the layer's output is neither maps, tokens nor vectors.

    Example::
        from phosphene import run

        result = run("prune_and_measure", dataset="builtin:scenes/32", steps=4, repeats=1, seed=0)
        result.accuracy  # without 0, 1/4, 1/2, 3/4 and all of the channels

    Source:
        Hu et al. 2016, section 3; beside random channels: Mittal et al. 2018; lecture 21.3.
    """
    require_class_labels(model, dataset)
    layer = layer if layer is not None else model.last_map
    statistics = activation_statistics(model, dataset, layer=layer)
    active = statistics.active_fraction.cpu().double()
    order, ranks = _order_by_activity(active)
    if criterion == "redundant":
        similarity = channel_redundancy(model, dataset, layer=layer).similarity.cpu().double()
        order, ranks = _order_by_similarity(similarity.abs(), active)
    count = len(order)
    counts = sorted({round(step * count / steps) for step in range(steps + 1)})
    orders = [order, *(torch.randperm(count).tolist() for _ in range(repeats))]
    cuts = torch.zeros(len(orders), len(counts), count, dtype=torch.bool)
    for row, channels in enumerate(orders):
        for step, cut in enumerate(counts):
            cuts[row, step, channels[:cut]] = True
    values = statistics.mean if replacement == "mean" else torch.zeros_like(statistics.mean)
    accuracies = _Accuracies(model, layer, cuts.flatten(0, 1), values).run(dataset, batch_size(model))
    curves = accuracies.view(len(orders), len(counts)).to(model.device, model.dtype)
    return PruningCurves(
        layer=layer,
        criterion=criterion,
        order=tuple(order),
        ranks=ranks.to(model.device, model.dtype),
        counts=tuple(counts),
        shares=(torch.tensor(counts).double() / count).to(model.device, model.dtype),
        accuracy=curves[0],
        random_accuracy=curves[1:],
        dead=len(statistics.dead),
        count=len(dataset),
    )


def _order_by_activity(active: Tensor) -> tuple[list[int], Tensor]:
    """The channels from the least to the most active, and their fractions active."""
    ranks, order = active.sort(stable=True)
    return order.tolist(), ranks


def _order_by_similarity(similarity: Tensor, active: Tensor) -> tuple[list[int], Tensor]:
    """The dead channels, then the less active one of the most similar pair that remains, until one is left.

    ``ranks``: the similarity of each channel to the most similar one that remains; 1 for dead channels.
    """
    order = (active == 0).nonzero()[:, 0].tolist()
    ranks = [1.0] * len(order)
    remaining = similarity.clone().fill_diagonal_(
        -1
    )  # equivalent mutants: any number below 0 leaves them out
    remaining[order] = remaining[:, order] = -1
    while len(order) < len(active):
        best = int(remaining.argmax())
        pair = divmod(best, len(active))
        value = float(remaining.flatten()[best])
        if value < 0:  # the last channel has no other one beside it
            pair = (next(n for n in range(len(active)) if n not in order),) * 2
            value = 0.0
        cut = min(pair, key=lambda n: (float(active[n]), n))
        order.append(cut)
        ranks.append(value)
        remaining[cut] = remaining[:, cut] = -1  # equivalent mutants: any number below 0 leaves them out
    return order, torch.tensor(ranks, dtype=torch.float64)


@dataclass
class _Accuracies(Fold[Tensor]):
    """The accuracy without the channels of each of V cuts (V, C), in which they output ``values`` (C)."""

    model: _Model
    layer: str
    cuts: Tensor
    values: Tensor
    title: str = "accuracy"

    def update(self, state: State, batch: Batch) -> State:
        images, labels = batch.images.to(self.model.device), class_indices(self.model, batch)
        hits = []
        for cut in self.cuts.to(self.model.device):
            replace = _replacement(self.model, self.layer, images, cut, self.values)
            with self.model.tap(self.layer, replace=replace):
                hits.append((self.model(images).argmax(1) == labels).sum())
        return self.merge(state, {"hits": torch.stack(hits).cpu(), "count": len(images)})

    def finish(self, state: State) -> Tensor:
        shares: Tensor = state["hits"].double() / state["count"]
        return shares


def _replacement(
    model: _Model, layer: str, images: Tensor, cut: Tensor, values: Tensor
) -> Callable[[Tensor], Tensor]:
    """A function that sets the cut channels of a layer's output to their values."""

    def replace(output: Tensor) -> Tensor:
        shape = [1] * output.ndim
        shape[_channel_axis(model, layer, images, output)] = len(cut)
        return torch.where(cut.view(shape), values.to(output).view(shape), output)

    return replace


def _channel_axis(model: _Model, layer: str, images: Tensor, output: Tensor) -> int:
    """The axis of a layer's output that holds its channels, from where neighboring ones lie in memory."""
    if output.ndim == 2:
        return 1
    # equivalent mutants: integers are exact
    numbers = torch.arange(output[0].numel(), dtype=torch.float64).view(1, *output.shape[1:])
    positions = model.maps(numbers.expand(output.shape), images, layer)[0, :, 0, 0].long()
    # equivalent mutants: the difference is a multiple
    step = int(positions[-1] - positions[0]) // max(1, len(positions) - 1)
    sizes: Sequence[int] = output.shape
    return next(
        axis
        for axis in range(1, output.ndim)
        if sizes[axis] == len(positions) and (numbers.stride(axis) == step or len(positions) == 1)
    )


@hookimpl
def phosphene_methods():
    return [prune_and_measure]
