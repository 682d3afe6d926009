"""Channel redundancy: which channels of a layer answer nearly the same to a whole data set."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor, nn

from phosphene import (
    Method,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    method,
    progress_bar,
    save_progress,
    saved_progress,
)
from phosphene.roles import Dataset, LayerName, Model
from phosphene.spec import Cost, size

from ._channel_responses import responses
from ._channel_results import ChannelRedundancy

#: How many groups are shown with a picture, and how many channels of each.
GROUPS, MEMBERS = 6, 4


def scaled_copies_are_one_group() -> None:
    """A channel, its double and itself with an offset are one group by correlation; others are alone."""
    convolution = nn.Conv2d(3, 5, 1)
    assert convolution.bias is not None
    with torch.no_grad():
        weight = torch.tensor([[1.0, 0, 0], [0, 1, 0], [2, 0, 0], [0, 0, 1], [1, 0, 0]])
        convolution.weight.copy_(weight[..., None, None])
        convolution.bias.copy_(torch.tensor([0.0, 0, 0, 0, 3]))
    layers = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)).double()
    images = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = channel_redundancy(load_model(layers), TensorDataset(images), layer="0")
    assert found.groups == ((0, 2, 4),) and found.pairs.tolist() == [[0, 2], [0, 4], [2, 4]]
    values = images.transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.similarity[[0, 1, 3]][:, [0, 1, 3]], torch.corrcoef(values))


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
    cost=Cost(forward=size.dataset + GROUPS),
    oracle=scaled_copies_are_one_group,
    demo={"layer": "features.11", "threshold": 0.8},
)
def channel_redundancy(
    model: Model,
    dataset: Dataset,
    *,
    layer: Annotated[LayerName | None, Field(description="whose answers; the last map unless told")] = None,
    measure: Annotated[
        Literal["correlation", "cosine"], Field(description="of two channels' answers")
    ] = "correlation",
    threshold: Annotated[float, Field(gt=0, le=1, description="how alike channels of a group are")] = 0.95,
) -> ChannelRedundancy:
    """Find the channels of a layer that answer nearly the same, place by place, over a whole data set.

    s_ab = cov(A_a, A_b) / (sigma_a sigma_b)  over all pictures and places, or A_a . A_b / (|A_a| |A_b|)

    ``similarity`` (C, C); ``pairs`` (P, 2), those of at least ``threshold``, the most alike first.
    ``groups``, the largest first: every two channels of a group are at least that alike (complete
    linkage), so all but one of them may be pruned. ``order`` is that of the same clustering. A channel
    that is constant (for the cosine: zero) is like no other; ``activation_statistics`` names the
    dead. Any layer will do: maps, tokens, vectors. Only sums of products are kept, in double
    precision, and a run that was cut off goes on; the largest groups are shown on the picture that their
    first channel answers most. ModelError for a layer whose output is neither maps nor vectors.

    Source: within-network correlation by Li et al. 2015, section 2.
    """
    layer = layer if layer is not None else model.last_map
    state = saved_progress()
    done, count = state.pop("done", 0), state.pop("count", 0)
    sums: dict[str, Tensor] = state
    size = batch_size(model)
    left = -(-(len(dataset) - done) // size)
    for batch in progress_bar(dataset.batches(size, done), "channel redundancy", left):
        images = batch.images.to(model.device, model.dtype)
        maps = responses(model, images, layer)
        if not sums:
            none = torch.zeros(maps.shape[1], dtype=torch.float64)
            sums = {"sum": none, "products": torch.outer(none, none), "best": none - torch.inf}
            sums["sources"] = none.long()
        for values in maps.flatten(2):  # one picture at a time, since it takes twice the memory
            values = values.double()
            sums["sum"] = sums["sum"] + values.sum(1).cpu()
            sums["products"] = sums["products"] + (values @ values.T).cpu()
        peaks, rows = (found.cpu() for found in maps.amax((2, 3)).double().max(0))
        better = peaks > sums["best"]
        sums["best"] = torch.where(better, peaks, sums["best"])
        sums["sources"] = torch.where(better, torch.tensor(batch.indices)[rows], sums["sources"])
        done, count = done + len(images), count + maps[:, 0].numel()
        save_progress(done=done, count=count, **sums)
    similarity = _similarity(sums["sum"], sums["products"], count, measure)
    groups, order = _clustered(similarity, threshold)
    alike = similarity.triu(1) >= threshold
    values, ranks = similarity[alike].sort(descending=True, stable=True)
    shown = groups[:GROUPS]
    pictures, shown_maps = None, None
    if shown:
        pictures = dataset.read([int(sums["sources"][group[0]]) for group in shown]).to(
            model.device, model.dtype
        )
        maps = responses(model, pictures, layer)
        shown_maps = maps.new_zeros(len(shown), MEMBERS, *maps.shape[2:])
        for part, own, group in zip(shown_maps, maps, shown, strict=True):
            part[: len(group)] = own[list(group[:MEMBERS])]
    return ChannelRedundancy(
        layer=layer,
        measure=measure,
        threshold=threshold,
        similarity=similarity.to(model.device, model.dtype),
        pairs=alike.nonzero()[ranks].to(model.device),
        groups=groups,
        order=order,
        pictures=pictures,
        maps=shown_maps,
    )


def _similarity(sums: Tensor, products: Tensor, count: int, measure: str) -> Tensor:
    squares = products.diagonal() / count
    moments = products / count
    if measure == "correlation":
        moments = moments - torch.outer(sums, sums) / count**2
    variances = moments.diagonal()
    # What rounding leaves of a constant is no variance.
    scale = torch.where(variances > 1e-12 * squares, variances, torch.inf).rsqrt()
    # Rounded, so that how the pictures were batched decides no tie.
    similarity = (moments * torch.outer(scale, scale)).clamp(-1, 1).round(decimals=10)
    return similarity.fill_diagonal_(1)


def _clustered(similarity: Tensor, threshold: float) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """The groups of at least two, the largest first, and all channels in the order of the tree's leaves."""
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
