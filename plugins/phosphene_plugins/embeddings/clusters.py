"""Clusters: the groups that a data set's pictures fall into, and whether they are the classes."""

import dataclasses
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Reference, TensorDataset, hookimpl, load_model, method
from phosphene.results import Embedding
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import Cost, size

from ._features import FeatureLayer, at_least, embedded, k_means, principal_components


def _oracle() -> None:
    """Three heaps, of which one holds a stranger: they are found, and purity is five sixths."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(2, 2))
    model = load_model(network, mean=[0.0], std=[1.0], input_size=(1, 2, 2))
    halves = torch.tensor([[0.1, 0.1], [0.1, 0.12], [0.9, 0.1], [0.9, 0.12], [0.5, 0.9], [0.5, 0.92]])
    dataset = TensorDataset(halves[:, None, None].expand(-1, 1, 2, 2), ["a", "a", "b", "b", "c", "a"])
    found = clusters(model, dataset, k=3, seed=0)
    assert found.clusters is not None
    first, second = found.clusters[::2], found.clusters[1::2]
    assert torch.equal(first, second) and len(set(first.tolist())) == 3
    assert abs(float(found.numbers["purity"]) - 5 / 6) < 1e-6


@method(
    family="embeddings",
    references=[
        Reference(
            key="arthur2007",
            title="k-means++: The Advantages of Careful Seeding",
            authors="Arthur, Vassilvitskii",
            year=2007,
            url="https://dl.acm.org/doi/10.5555/1283383.1283494",
        ),
        Reference(
            key="hubert1985",
            title="Comparing partitions",
            authors="Hubert, Arabie",
            year=1985,
            url="https://doi.org/10.1007/BF01908075",
        ),
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    oracle=_oracle,
    quick={"k": 3},
)
def clusters(
    model: Model,
    dataset: Dataset,
    *,
    layer: FeatureLayer = None,
    k: Annotated[
        int | None,
        Field(ge=1, le=1000, description="how many clusters; unless told as many as classes, or eight"),
    ] = None,
    seed: Seed = None,
) -> Embedding:
    """Sort a data set's pictures into k heaps by their features, and compare the heaps with the classes.

    min over c, m of sum_i ||phi_i - m_c(i)||^2

    with phi what the classifier is given, or a named ``layer`` averaged over its places; scikit-learn's
    k-means, the best of ten beginnings. ``clusters`` (N,) are c, ``centrality`` (N,) the distances to the
    middles m, ``points`` the first two principal components, for the picture alone. ``numbers``: the sum
    above, and where the classes are known purity (the share of pictures whose class is their cluster's
    most frequent), the adjusted Rand index (0 by chance, 1 when the same) and the normalised mutual
    information. InputError for more clusters than pictures.
    """
    at_least(dataset, 2, "clustering")
    if k is not None and k > len(dataset):
        raise InputError(f"{len(dataset)} pictures make at most {len(dataset)} clusters, not {k}")
    found = embedded(model, dataset, layer)
    known = 8 if found.labels is None else len(set(found.labels))
    drawn = int(torch.randint(2**31, ()))
    groups, middles, within = k_means(found.features, k or min(known, len(dataset)), drawn)
    points, _ = principal_components(found.features, 2)
    agreement = {} if found.labels is None else _agreement(groups, found.labels)
    numbers = {"within": within, **agreement}
    return dataclasses.replace(
        found,
        points=points,
        axes=("component 1", "component 2")[: points.shape[1]],
        clusters=groups,
        centrality=(found.features - middles[groups]).norm(dim=1),
        numbers={name: found.features.new_tensor(value) for name, value in numbers.items()},
        layout="clusters",
    )


def _agreement(groups: Tensor, labels: tuple[str, ...]) -> dict[str, float]:
    """How well clusters and classes are the same partition."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    numbers = {name: n for n, name in enumerate(sorted(set(labels)))}
    classes, found = torch.tensor([numbers[label] for label in labels]), groups.cpu()
    together = torch.zeros(int(found.max()) + 1, len(numbers), dtype=torch.int64)
    together.index_put_((found, classes), torch.tensor(1), accumulate=True)
    return {
        "purity": int(together.amax(1).sum()) / len(labels),
        "adjusted Rand index": adjusted_rand_score(classes.numpy(), found.numpy()),
        "mutual information": normalized_mutual_info_score(classes.numpy(), found.numpy()),
    }


@hookimpl
def phosphene_methods():
    return [clusters]
