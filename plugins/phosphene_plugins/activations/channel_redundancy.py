"""Channel redundancy: correlated channels of a layer, grouped by hierarchical clustering."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor, nn

from phosphene import (
    Fold,
    Method,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    max_batch,
    method,
    to_float64,
    unit_centers,
)
from phosphene.data import Batch, State
from phosphene.roles import Dataset, LayerName, Model
from phosphene.spec import Agrees, Cost, size

from ._channel_redundancy_result import ChannelRedundancy
from ._relations import correlation, cosine, statistics_of_a_data_set

#: The number of groups in the figure, and of channels of each group.
MAX_GROUPS, MAX_CHANNELS = 6, 4


def _oracle() -> None:
    """A channel, its double and its sum with an offset have correlation 1 and form one group."""
    convolution = nn.Conv2d(3, 5, 1)
    assert convolution.bias is not None
    with torch.no_grad():
        weight = torch.tensor([[1.0, 0, 0], [0, 1, 0], [2, 0, 0], [0, 0, 1], [1, 0, 0]])
        convolution.weight.copy_(weight[..., None, None])
        convolution.bias.copy_(torch.tensor([0.0, 0, 0, 0, 3]))
    hidden, head = nn.Linear(5, 6), nn.Linear(6, 2)
    with torch.no_grad():  # the means of blue, red, red, red, blue and green; twice the same logit
        hidden.weight.copy_(torch.eye(5)[[3, 0, 0, 0, 3, 1]])
        head.weight.copy_(torch.tensor([1.0, 2.0])[:, None].expand(2, 6))
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers = nn.Sequential(convolution, *pool, hidden, head).double()
    images = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = channel_redundancy(load_model(layers), TensorDataset(images), layer="0")
    assert result.groups == ((0, 2, 4),) and result.pairs.tolist() == [[0, 2], [0, 4], [2, 4]]
    values = images.transpose(0, 1).flatten(1)
    torch.testing.assert_close(result.similarity[[0, 1, 3]][:, [0, 1, 3]], torch.corrcoef(values))
    assert result.images is not None and result.maps is not None
    peak = int(images[:, 0].amax((1, 2)).argmax())
    assert torch.equal(result.images, images[[peak]])
    red = images[peak, 0]
    torch.testing.assert_close(result.maps, torch.stack([red, 2 * red, red + 3, 0 * red])[None])
    of_vectors = channel_redundancy(load_model(layers), TensorDataset(images), layer="3", threshold=0.99)
    assert of_vectors.groups == ((1, 2, 3), (0, 4)) and sorted(of_vectors.order) == list(range(6))
    assert channel_redundancy(load_model(layers), TensorDataset(images), layer="4").groups == ((0, 1),)
    # The offset changes the cosine: only channels 0 and 2 form a group. Three images are read in two batches.
    with max_batch(2):
        result = channel_redundancy(
            load_model(layers), TensorDataset(images[:3]), layer="0", measure="cosine", threshold=0.999
        )
    assert result.groups == ((0, 2),) and result.pairs.tolist() == [[0, 2]]
    unit = nn.functional.normalize(images[:3].transpose(0, 1).flatten(1))
    torch.testing.assert_close(result.similarity[[0, 1, 3]][:, [0, 1, 3]], unit @ unit.T)
    # The strongest image comes first, in a batch of its own. All cells of the map are pixels.
    peak = int(images[:, 0].amax((1, 2)).argmax())
    ordered = torch.cat([images[peak:], images[:peak]])
    with max_batch(1):
        result = channel_redundancy(load_model(layers), TensorDataset(ordered), layer="0")
    assert result.images is not None and torch.equal(result.images, ordered[:1])
    # Of equally strong images the first.
    twice = TensorDataset(torch.cat([ordered, ordered]).float())
    assert _Moments(load_model(layers), "0").run(twice, 1)["peak_image"][0] == 0
    result = channel_redundancy(load_model(layers), twice, layer="0")
    assert result.images is not None and torch.equal(result.images, ordered[:1].float().double())
    assert result.centers == ((0, 1, 2, 3, 4), (0, 1, 2, 3, 4))
    # A constant channel is similar to itself alone; an offset costs no digits in single precision.
    single = nn.Sequential(nn.Conv2d(3, 3, 1), *pool, nn.Linear(3, 2))
    with torch.no_grad():
        single[0].weight.copy_(torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 0, 0]])[..., None, None])  # type: ignore[operator, union-attr]
        single[0].bias.copy_(torch.tensor([1.0, 0, 10_000]))  # type: ignore[operator, union-attr]
    result = channel_redundancy(load_model(single), TensorDataset(images))
    expected = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 1, 1]])
    torch.testing.assert_close(result.similarity, expected, rtol=0, atol=1e-5)
    assert result.images is not None and result.images.dtype == torch.float32


@method(
    family="activations",
    references=[
        Reference(
            key="li2015",
            title="Convergent Learning: Do different neural networks learn the same representations?",
            authors="Li, Yosinski, Clune, Lipson, Hopcroft",
            year=2015,
            url="https://arxiv.org/abs/1511.07543",
        )
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset + MAX_GROUPS),
    oracle=_oracle,
    relations=[
        Agrees(correlation, fields=("similarity",)),
        Agrees(cosine, fields=("similarity",), where={"measure": "cosine"}),
        *statistics_of_a_data_set("similarity"),
    ],
    demo={"layer": "features.11", "threshold": 0.8},
)
def channel_redundancy(
    model: Model,
    dataset: Dataset,
    *,
    layer: Annotated[LayerName | None, Field(description="layer to analyze; default: the last map")] = None,
    measure: Annotated[
        Literal["correlation", "cosine"], Field(description="similarity measure of two channels' activations")
    ] = "correlation",
    threshold: Annotated[
        float, Field(gt=0, le=1, description="least similarity of two channels in a group")
    ] = 0.95,
) -> ChannelRedundancy:
    """Channel redundancy: correlation between a layer's channels over a data set, and groups of duplicates.

    s_ab = cov(A_a, A_b) / (sigma_a sigma_b)  or  A_a . A_b / (|A_a| |A_b|)

    over all images and positions (correlation, cosine). Groups are found by complete-linkage clustering, so
    every two channels of a group have at least the similarity ``threshold``, and all but one of them may be
    pruned. A constant channel (cosine: a zero one) is similar to no other; ``activation_statistics`` lists
    the dead ones. ``layer`` may output maps, tokens or vectors. Only sums and products are stored, in
    double precision, and an interrupted run resumes.

    Returns:
        ``similarity`` (C, C); ``pairs`` (P, 2) of channels of at least ``threshold``, the most similar first.
        ``groups``: tuples of channel numbers, the largest group first; ``order``: all channels in the order
        of the clustering's leaves.
        ``images`` (G, 3, H, W) and ``maps`` (G, 4, h, w): for the first groups, the image that activates
        the group's first channel most and the maps of up to four of its channels; None without groups.

    Raises:
        ModelError: the layer's output is neither maps, tokens nor vectors.

    Example::
        from phosphene import run

        result = run("channel_redundancy", dataset="builtin:scenes/32", layer="features.11", threshold=0.8)
        result.similarity.shape  # (96, 96)
        result.groups

    Source:
        Li et al. 2015, section 2 (within-network correlation).
    """
    layer = layer if layer is not None else model.last_map
    state = _Moments(model, layer).run(dataset, batch_size(model))
    similarity = _similarity(state["sum"], state["products"], state["count"], measure)
    groups, order = _cluster(similarity, threshold)
    above = similarity.triu(1) >= threshold
    # equivalent mutants: on the CPU every sort of torch is stable
    ranks = similarity[above].sort(descending=True, stable=True).indices
    images, group_maps, centers = None, None, None
    if first_groups := groups[:MAX_GROUPS]:
        images = dataset.read([int(state["peak_image"][group[0]]) for group in first_groups])
        images = images.to(model.device, model.dtype)
        maps = _channel_maps(model, images, layer)
        if maps[0, 0].numel() > 1:
            centers = unit_centers(model, layer, images.shape[2:])
        group_maps = maps.new_zeros(len(first_groups), MAX_CHANNELS, *maps.shape[2:])
        for n, group in enumerate(first_groups):
            group_maps[n, : len(group)] = maps[n, list(group[:MAX_CHANNELS])]
    return ChannelRedundancy(
        layer=layer,
        measure=measure,
        threshold=threshold,
        similarity=similarity.to(model.device, model.dtype),
        pairs=above.nonzero()[ranks].to(model.device),
        groups=groups,
        order=order,
        images=images,
        maps=group_maps,
        centers=centers,
    )


@dataclass
class _Moments(Fold[State]):
    """Sums and products of the channels, and the image of the largest activation of each."""

    title = "channel redundancy"
    model: Model
    layer: str

    def update(self, state: State, batch: Batch) -> State:
        images = batch.images.to(self.model.device, self.model.dtype)
        maps = _channel_maps(self.model, images, self.layer)
        for row, values in zip(batch.indices, maps, strict=True):  # one at a time: double precision is large
            values = to_float64(values.flatten(1))
            peaks = values.amax(1)
            moments = {"sum": values.sum(1), "products": values @ values.T, "peak": peaks}
            image: State = {name: value.cpu() for name, value in moments.items()}
            image |= {"peak_image": torch.full(peaks.shape, row), "count": values.shape[1]}
            state = self.merge(state, image)
        return state

    def merge(self, first: State, second: State) -> State:
        if not first:
            return second
        # equivalent mutants: only products of two sums are used
        sums = {name: first[name] + second[name] for name in ("sum", "products", "count")}
        peak, image = (first["peak"], second["peak"]), (first["peak_image"], second["peak_image"])
        is_first = (peak[0] > peak[1]) | (peak[0] == peak[1]) & (image[0] < image[1])
        return sums | {"peak": torch.maximum(*peak), "peak_image": torch.where(is_first, *image)}


def _channel_maps(model: Model, images: Tensor, layer: str) -> Tensor:
    """Activations (n, C, h, w) of a layer, class tokens dropped; a vector is a map with one position."""
    features = model.features(images, layer)
    return features[:, :, None, None] if features.ndim == 2 else model.maps(features, images, layer)


def _similarity(sums: Tensor, products: Tensor, count: int, measure: str) -> Tensor:
    """Correlation or cosine (C, C) from sums (C,) and sums of products (C, C) of ``count`` positions."""
    squares = products.diagonal() / count
    moments = products / count
    if measure == "correlation":
        moments = moments - torch.outer(sums, sums) / count**2
    variances = moments.diagonal()
    # The variance of a constant channel is rounding error; its similarity is 0, not noise divided by noise.
    scale = torch.where(variances > 1e-12 * squares, variances, torch.inf).rsqrt()
    # Rounded, so that rounding errors that depend on the batch size cannot decide a tie.
    # equivalent mutants: a further digit is also above the rounding errors, and 1 is the largest value
    similarity = (moments * torch.outer(scale, scale)).clamp(-1, 1).round(decimals=10)
    return similarity.fill_diagonal_(1)


def _cluster(similarity: Tensor, threshold: float) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Groups of two or more channels, the largest first, and all channels in the order of the leaves."""
    if len(similarity) == 1:
        return (), (0,)
    tree = linkage(squareform((1 - similarity).numpy(), checks=False), "complete")
    members: dict[int, list[int]] = {}
    for channel, group in enumerate(fcluster(tree, 1 - threshold, "distance").tolist()):
        members.setdefault(group, []).append(channel)
    groups = sorted((tuple(g) for g in members.values() if len(g) > 1), key=lambda g: (-len(g), g))
    return tuple(groups), tuple(leaves_list(tree).tolist())


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [channel_redundancy]
