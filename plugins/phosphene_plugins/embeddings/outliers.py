"""Outliers: the pictures of a data set that are like none of the others, to a model."""

import dataclasses
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Reference, TensorDataset, hookimpl, load_model, method
from phosphene.results import Embedding
from phosphene.roles import Dataset, Model
from phosphene.spec import Cost, Nonnegative, size

from ._features import FeatureLayer, at_least, centred, embedded
from ._nearest_vectors import Nearest

#: Queries at a time, each of which keeps its nearest vectors.
_QUERIES = 1024


def _oracle() -> None:
    """Grey levels 0, 0.1, 0.2 and 0.9: the last is 0.7 from its nearest, and farthest from the mean."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    model = load_model(network, mean=[0.0], std=[1.0], input_size=(1, 2, 2))
    levels = torch.tensor([0.0, 0.1, 0.9, 0.2])
    found = outliers(model, TensorDataset(levels[:, None, None, None].expand(-1, 1, 2, 2)), k=1)
    assert found.points is not None
    assert torch.allclose(found.points[:, 0], torch.tensor([0.1, 0.1, 0.7, 0.1]), atol=1e-6)
    # One feature has one variance, and shrinking towards it changes nothing.
    z = (levels - levels.mean()).abs() / levels.std(correction=0)
    assert torch.allclose(found.points[:, 1], z, atol=1e-5)
    assert found.farthest(0, 1) == found.farthest(1, 1) == [2]


@method(
    family="embeddings",
    references=[
        Reference(
            key="ramaswamy2000",
            title="Efficient Algorithms for Mining Outliers from Large Data Sets",
            authors="Ramaswamy, Rastogi, Shim",
            year=2000,
            url="https://doi.org/10.1145/335191.335437",
        ),
        Reference(
            key="ledoit2004",
            title="A well-conditioned estimator for large-dimensional covariance matrices",
            authors="Ledoit, Wolf",
            year=2004,
            url="https://doi.org/10.1016/S0047-259X(03)00096-4",
        ),
    ],
    invariants=[Nonnegative(field="points")],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    oracle=_oracle,
    quick={"k": 2},
)
def outliers(
    model: Model,
    dataset: Dataset,
    *,
    layer: FeatureLayer = None,
    k: Annotated[int, Field(ge=1, le=1000, description="to which nearest neighbour the distance is")] = 5,
) -> Embedding:
    """Find the pictures of a data set that stand out: far from their neighbours, or from all.

    d_k(i) = the k-th smallest ||phi_i - phi_j||, j not i

    m(i) = sqrt((phi_i - mean)^T C^-1 (phi_i - mean)),  C = (1 - s) S + s tr(S)/D I

    with phi what the classifier is given, or a named ``layer`` averaged over its places, S the features'
    covariance and s the shrinkage of Ledoit and Wolf, without which C has no inverse where there are
    fewer pictures than features. ``points`` (N, 2) are both distances; ``farthest`` gives the rows farthest
    out on either. A picture that is far by d_k is rare, one that is far by m alone an extreme of its
    kind. InputError where there are not more pictures than ``k``.
    """
    at_least(dataset, 2, "finding outliers")
    if k >= len(dataset):
        raise InputError(f"{len(dataset)} pictures have at most {len(dataset) - 1} neighbours, not {k}")
    found = embedded(model, dataset, layer)
    far, shrinkage = _mahalanobis(found.features)
    points = torch.stack([_to_neighbor(found.features, k), far], 1)
    axes = (f"distance to neighbour {k}", "Mahalanobis distance")
    return dataclasses.replace(
        found, points=points, axes=axes, numbers={"shrinkage": shrinkage}, layout="outliers"
    )


def _to_neighbor(features: Tensor, k: int) -> Tensor:
    """(N,) distances to the k-th nearest other row."""
    places, distances = torch.arange(len(features), device=features.device), []
    for queries, own in zip(features.split(_QUERIES), places.split(_QUERIES), strict=True):
        search = Nearest(queries, k)
        for vectors, others in zip(features.split(_QUERIES), places.split(_QUERIES), strict=True):
            search.meet(vectors, tuple(others.tolist()), own[:, None] == others)
        distances.append(search.found()[1][:, k - 1])
    return torch.cat(distances)


def _mahalanobis(features: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) distances from the mean by the shrunk covariance, and the shrinkage.

    In the basis of the pictures themselves, so that no D x D matrix is inverted: with X = U diag(r) V^T,
    the squared distance is sum_j U_ij^2 r_j^2 / ((1 - s) r_j^2 / N + s tr(S) / D).
    """
    from sklearn.covariance import ledoit_wolf_shrinkage  # imported late, for it takes a second

    rest = centred(features).double()
    count, size = rest.shape
    shrinkage = float(ledoit_wolf_shrinkage(rest.cpu().numpy(), assume_centered=True))
    left, spread, _ = torch.linalg.svd(rest, full_matrices=False)
    variance = spread.square() / count
    shrunk = (1 - shrinkage) * variance + shrinkage * variance.sum() / size
    # Where nothing varies, nothing is far.
    held = spread > spread[0] * count * torch.finfo(rest.dtype).eps
    squares = (left * spread).square()[:, held] / shrunk[held]
    return squares.sum(1).sqrt().to(features), features.new_tensor(shrinkage)


@hookimpl
def phosphene_methods():
    return [outliers]
