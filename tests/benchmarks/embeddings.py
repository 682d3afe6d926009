"""Time of embeddings against scikit-learn: the arithmetic alone, on precomputed features."""

from collections.abc import Iterator

import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from tests.benchmarks.attribution import Work

from phosphene_plugins.embeddings._nearest_neighbor_search import NearestNeighborSearch
from phosphene_plugins.embeddings._principal_components import principal_components


def nearest_neighbors() -> Iterator[tuple[str, Work, dict[str, Work]]]:
    """The limit is the matrix product of all queries with all vectors."""
    data, queries = torch.rand(20_000, 512), torch.rand(1000, 512)
    peer = NearestNeighbors(n_neighbors=5, algorithm="brute")

    def ours() -> None:
        search = NearestNeighborSearch(queries, 5)
        for start in range(0, len(data), 32):
            search.add(data[start : start + 32], tuple(range(start, start + 32)))
        search.result()

    def at_once() -> None:
        torch.addmm(data.square().sum(1), queries, data.T, alpha=-2).topk(5, largest=False)

    theirs: dict[str, Work] = {
        "the limit": lambda: queries @ data.T,
        "addmm + topk": at_once,
        "scikit-learn": lambda: peer.fit(data.numpy()).kneighbors(queries.numpy()),
    }
    yield "nearest of 20000 x 512 to 1000, in batches of 32", ours, theirs


def pca() -> Iterator[tuple[str, Work, dict[str, Work]]]:
    """The limit is the covariance and its eigenvectors."""
    features = torch.rand(5000, 512)
    by_covariance = PCA(50, svd_solver="covariance_eigh")
    yield (
        "principal components, 5000 x 512 -> 50",
        lambda: principal_components(features, 50),
        {
            "the limit": lambda: torch.linalg.eigh(features.T @ features),
            "scikit-learn": lambda: PCA(50).fit_transform(features.numpy()),
            "scikit-learn, by covariance": lambda: by_covariance.fit_transform(features.numpy()),
        },
    )
