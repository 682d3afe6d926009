"""Outliers: images far from their nearest neighbors or from the mean, in feature space."""

import dataclasses
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Reference, TensorDataset, hookimpl, load_model, method, to_float64
from phosphene.results import Embedding
from phosphene.roles import Dataset, Features, Model
from phosphene.spec import Agrees, Cost, Nonnegative, size

from ._feature_folds import Moments, RowFunction, is_large, map_rows, moments
from ._features import FeatureLayer, load_features, require_images
from ._nearest_neighbor_search import NearestNeighborSearch
from ._principal_components import center
from ._relations import NeedsImages, features_of, neighbor_and_mahalanobis_distances

#: Queries per search: each stores its nearest vectors.
# equivalent mutants: the distances do not depend on the size of the blocks
QUERIES = 1024


def _oracle() -> None:
    """Gray levels 0, 0.1, 0.2 and 0.9: the last is 0.7 from its nearest, and farthest from the mean."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    model = load_model(network, mean=[0.0], std=[1.0], input_size=(1, 2, 2))
    levels = torch.tensor([0.0, 0.1, 0.9, 0.2])
    result = outliers(model, TensorDataset(levels[:, None, None, None].expand(-1, 1, 2, 2)), k=1)
    assert result.points is not None
    assert torch.allclose(result.points[:, 0], torch.tensor([0.1, 0.1, 0.7, 0.1]), atol=1e-6)
    # With one feature, the shrinkage target equals the covariance.
    z = (levels - levels.mean()).abs() / levels.std(correction=0)
    assert torch.allclose(result.points[:, 1], z, atol=1e-5)
    assert result.farthest(0, 1) == result.farthest(1, 1) == [2]
    assert float(result.metrics["shrinkage"]) == 0 and result.layout == "outliers"
    constant = outliers(model, TensorDataset(torch.ones(3, 1, 2, 2)), k=1)
    assert constant.points is not None and constant.points.abs().max() == 0
    second = outliers(model, TensorDataset(levels[:, None, None, None].expand(-1, 1, 2, 2)), k=2)
    assert second.points is not None and second.axes == ("distance to neighbor 2", "Mahalanobis distance")
    assert torch.allclose(second.points[:, 0], torch.tensor([0.2, 0.1, 0.8, 0.2]), atol=1e-6)
    _blocks_have_the_same_distances()


def _blocks_have_the_same_distances() -> None:
    """From the covariance as from the singular values, of more and of fewer images than features."""
    waves = torch.arange(60, dtype=torch.float64).square().mul(0.7).sin()
    mixed = waves.view(12, 5) * torch.tensor([3.0, 1.0, 0.5, 2.0, 0.1])
    constant = torch.full((4, 3), 0.3, dtype=torch.float64)
    two_points = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    for features in (mixed, waves[:28].view(4, 7), waves[:21].view(7, 3), two_points, constant):
        (expected, shrinkage), (distances, own) = (
            f(features) for f in (_mahalanobis_distances, _mahalanobis_of_blocks)
        )
        assert torch.allclose(distances, expected, rtol=1e-7, atol=1e-9)
        assert torch.allclose(own, shrinkage, rtol=1e-9, atol=1e-12) and own.dtype == distances.dtype


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
    relations=[
        Agrees(neighbor_and_mahalanobis_distances, fields=("points",)),
        *features_of("points"),
        NeedsImages(2, where={"k": 1}),
    ],
    quick={"k": 2},
)
def outliers(
    model: Model | None = None,
    dataset: Dataset | None = None,
    features: Features | None = None,
    *,
    layer: FeatureLayer = None,
    k: Annotated[
        int, Field(ge=1, le=1000, description="number of the neighbor to which the distance is measured")
    ] = 5,
) -> Embedding:
    """Outlier detection in a data set by k-th-neighbor distance and Mahalanobis distance of features.

    d_k(i) = the k-th smallest ||phi_i - phi_j||, j not i

    m(i) = sqrt((phi_i - mean)^T C^-1 (phi_i - mean)),  C = (1 - s) S + s tr(S)/D I

    phi_i is the input of the model's linear classifier for image i, or the output of ``layer`` averaged over
    its positions; S is the features' covariance and s the shrinkage of Ledoit and Wolf, without which C has
    no inverse if there are fewer images than features. A large d_k means a rare image; a large m alone an
    extreme one of a common kind.

    Returns:
        ``points`` (N, 2): d_k and m of each image. ``farthest(0)`` and ``farthest(1)`` are the rows of
        largest distance. ``metrics``: ``shrinkage``, s. ``features`` (N, D), ``ids``, ``labels``,
        ``thumbnails`` as ``embed`` returns them.

    Raises:
        InputError: fewer than two images, or no more images than ``k``.
        ModelError: no layer is named and the model has no linear classifier.

    Example::
        from phosphene import run

        result = run("outliers", dataset="builtin:scenes/32")
        result.points.shape  # (32, 2)
        [result.ids[row] for row in result.farthest(0, 3)]

    Source:
        Ramaswamy et al. 2000 (distance to the k-th neighbor); Ledoit and Wolf 2004, section 3.3 (shrinkage).
    """
    count = require_images(dataset, features, 2, "finding outliers")
    if k >= count:
        raise InputError(f"{count} images have at most {count - 1} neighbors, not {k}")
    embedding = load_features(model, dataset, features, layer)
    mahalanobis, shrinkage = _mahalanobis_distances(embedding.features)
    return dataclasses.replace(
        embedding,
        points=torch.stack([_neighbor_distances(embedding.features, k), mahalanobis], 1),
        axes=(f"distance to neighbor {k}", "Mahalanobis distance"),
        metrics={"shrinkage": shrinkage},
        layout="outliers",
    )


def _neighbor_distances(features: Tensor, k: int) -> Tensor:
    """(N,) distances of the rows to their k-th nearest other row."""
    blocks, distances = torch.arange(len(features), device=features.device).split(QUERIES), []
    for queries in blocks:
        search = NearestNeighborSearch(features[queries], k)
        for others in blocks:
            search.add(features[others], tuple(others.tolist()), exclude=queries[:, None] == others)
        distances.append(search.result()[1][:, k - 1])
    return torch.cat(distances)


def _mahalanobis_distances(features: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) distances from the mean with the shrunk covariance, and the shrinkage.

    Without inverting a D x D matrix: with the centered features X = U diag(r) V^T, the squared distance is
    sum_j U_ij^2 r_j^2 / ((1 - s) r_j^2 / N + s tr(S) / D).
    """
    if is_large(features):
        return _mahalanobis_of_blocks(features)
    from sklearn.covariance import ledoit_wolf_shrinkage  # slow to import

    centered = to_float64(center(features))
    count, size = centered.shape
    # equivalent mutants: scikit-learn converts tensors to arrays itself
    shrinkage = float(ledoit_wolf_shrinkage(centered.cpu().numpy(), assume_centered=True))
    left, singular, _ = torch.linalg.svd(centered, full_matrices=False)
    variance = singular.square() / count
    shrunk = (1 - shrinkage) * variance + shrinkage * variance.sum() / size
    # Directions without variance contribute no distance, rather than 0 / 0.
    # equivalent mutants: variances are either rounding errors or far above every such threshold
    nonzero = singular > singular[0] * count * torch.finfo(centered.dtype).eps
    squares = (left * singular).square()[:, nonzero] / shrunk[nonzero]
    return squares.sum(1).sqrt().to(features), features.new_tensor(shrinkage)


def _mahalanobis_of_blocks(features: Tensor) -> tuple[Tensor, Tensor]:
    """The same without a copy of the features, from the eigenvectors of their covariance.

    The shrinkage is min(b / d, 1) with d = ||S - tr(S)/D I||^2 and b = (sum_i ||x_i||^4 / N - ||S||^2) / N.
    """
    about, (count, size) = moments(features), features.shape
    covariance = about.scatter / count
    variance, directions = torch.linalg.eigh(covariance)
    variance, mean = variance.clamp(min=0), covariance.trace() / size
    spread = covariance.square().sum() - size * mean**2
    error = (about.fourth / count - covariance.square().sum()) / count
    shrinkage = torch.where(spread > 0, (error / spread).clamp(0, 1), 0)
    shrunk = (1 - shrinkage) * variance + shrinkage * mean
    # Directions without variance contribute no distance. An eigenvalue has the rounding error of the largest.
    nonzero = variance > variance[-1] * size * torch.finfo(variance.dtype).eps
    scaled = directions[:, nonzero] / shrunk[nonzero].sqrt()
    distances = map_rows(features, _ScaledNorm(about, scaled), "Mahalanobis distances")
    return distances.to(features), features.new_tensor(float(shrinkage))


@dataclasses.dataclass
class _ScaledNorm(RowFunction):
    """The norms (n,) of centered rows on scaled directions."""

    about: Moments
    scaled: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return (self.about.center(rows.cpu()) @ self.scaled).norm(dim=1)


@hookimpl
def phosphene_methods():
    return [outliers]
