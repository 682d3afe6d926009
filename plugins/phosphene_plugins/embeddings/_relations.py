"""Relations that several embeddings declare, and the references that they agree with."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from phosphene import InputError, TensorDataset
from phosphene.spec import Calls, InvariantTo, Relation, ScalesWith, assert_equal

from ._principal_components import principal_components


def features_of(*fields: str) -> tuple[Relation, ...]:
    """Relations of fields that depend on the features of each image alone, whose rows follow the data set."""
    return (
        InvariantTo("dataset_order", fields=fields),
        InvariantTo("normalization", fields=fields),
        ScalesWith("logits", power=0, fields=fields),
    )


def components_by_svd(calls: Calls) -> Tensor:
    """Coordinates on the principal components from the singular value decomposition of the features."""
    features = calls.result.features.double()
    left, singular, right = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    count = calls.result.points.shape[1]
    largest = right.gather(1, right.abs().argmax(1, keepdim=True))
    return (left * singular * largest.sign().T)[:, :count]


def classifier_inputs(calls: Calls) -> Tensor:
    """The inputs of the model's last linear layer, recorded as it runs."""
    recorded: list[Tensor] = []
    head = [module for module in calls.model.module.modules() if isinstance(module, torch.nn.Linear)][-1]
    handle = head.register_forward_pre_hook(lambda module, inputs: recorded.append(inputs[0].detach()))
    try:
        calls.logits(calls.inputs["dataset"].images)
    finally:
        handle.remove()
    return torch.cat(recorded)


@torch.no_grad()
def feature_distances(calls: Calls) -> Tensor:
    """The k smallest distances between the features of images and those of a data set, from all pairs."""
    embed, count = calls.model.embed, calls.params["k"]
    queries, vectors = embed(calls.inputs["images"]), embed(calls.inputs["dataset"].images)
    if calls.params["metric"] == "cosine":
        return (1 - torch.cosine_similarity(queries[:, None], vectors, dim=2)).sort(dim=1).values[:, :count]
    return (queries[:, None] - vectors).norm(dim=2).sort(dim=1).values[:, :count]


def pixel_distances(calls: Calls) -> Tensor:
    """The k smallest distances between images and those of a data set, from all pairs."""
    queries, vectors = calls.inputs["images"].flatten(1), calls.inputs["dataset"].images.flatten(1)
    return (queries[:, None] - vectors).norm(dim=2).sort(dim=1).values[:, : calls.params["k"]]


def neighbor_and_mahalanobis_distances(calls: Calls) -> Tensor:
    """d_k from all pairs, and m with the inverse of the covariance shrunk as Ledoit and Wolf compute it."""
    features = calls.result.features.double()
    centered = features - features.mean(0)
    count, size = features.shape
    covariance = centered.T @ centered / count
    target = covariance.trace() / size * torch.eye(size).to(covariance)
    spread = (covariance - target).square().sum()
    errors = [(torch.outer(row, row) - covariance).square().sum() for row in centered]
    shrinkage = min(torch.stack(errors).sum() / count**2, spread) / spread
    inverse = torch.linalg.inv((1 - shrinkage) * covariance + shrinkage * target)
    mahalanobis = torch.einsum("nd,de,ne->n", centered, inverse, centered).sqrt()
    neighbors = (features[:, None] - features).norm(dim=2).sort(dim=1).values[:, calls.params["k"]]
    return torch.stack([neighbors, mahalanobis], 1)


class SetFormulas(Relation):
    """The distances of two different data sets equal their formulas, in either order of the sets."""

    kind: Literal["set_formulas"] = "set_formulas"

    def check(self, calls: Calls) -> None:
        first = calls.inputs["dataset"].images
        second = (first[1:] ** 2 + first[:-1]) / 2
        features = calls.model.embed(first).detach(), calls.model.embed(second).detach()
        for sets in ((first, second), (second, first)):
            result = calls(inputs=dict(zip(("dataset", "other"), map(TensorDataset, sets), strict=True)))
            assert_equal(result.frechet, frechet_distance(*features), 1e-6, "frechet against its formula")
            assert_equal(result.kernel, kernel_distance(*features), 1e-7, "kernel against its formula")


def frechet_distance(first: Tensor, second: Tensor) -> Tensor:
    """||m - m'||^2 + tr(S + S' - 2 (S S')^1/2) from the eigenvalues of S S'."""
    one, other = first.T.cov(), second.T.cov()
    root = torch.linalg.eigvals(one @ other).real.clamp(min=0).sqrt().sum()
    return (first.mean(0) - second.mean(0)).square().sum() + one.trace() + other.trace() - 2 * root


def kernel_distance(first: Tensor, second: Tensor) -> Tensor:
    """The means of the kernel over all pairs of two rows, of one set and of both."""

    def mean_kernel(x: Tensor, y: Tensor, *, same: bool) -> Tensor:
        values = ((x[:, None] * y).mean(2) + 1) ** 3
        return values[~torch.eye(len(x), dtype=torch.bool)].mean() if same else values.mean()

    within = mean_kernel(first, first, same=True) + mean_kernel(second, second, same=True)
    return within - 2 * mean_kernel(first, second, same=False)


def distances_to_the_mean_of_the_cluster(calls: Calls) -> Tensor:
    """Distances to the means of the images of the same cluster, at which k-means has converged."""
    features, clusters = calls.result.features.double(), calls.result.clusters
    same = (clusters[:, None] == clusters).double()
    return (features - same @ features / same.sum(1, keepdim=True)).norm(dim=1)


class NeedsImages(Relation):
    """A data set of ``count`` images is accepted, one of fewer images is refused with an InputError."""

    one_network = True
    kind: Literal["needs_images"] = "needs_images"
    count: int
    input: str = "dataset"

    def __init__(self, count: int, **settings: Any) -> None:
        super().__init__(count=count, **settings)

    def check(self, calls: Calls) -> None:
        images = calls.inputs[self.input].images
        images = torch.cat([images * 0.9**n for n in range(1 + self.count // len(images))])
        calls(inputs={self.input: TensorDataset(images[: self.count])})
        try:
            calls(inputs={self.input: TensorDataset(images[: self.count - 1])})
        except InputError:
            return
        raise AssertionError(f"a data set of {self.count - 1} images is not refused")


def tsne_by_scikit_learn(calls: Calls) -> Tensor:
    """scikit-learn's map from the principal components, scaled to a standard deviation of 0.0001."""
    from sklearn.manifold import TSNE

    features = calls.result.features
    start, _ = principal_components(features, 2)
    start = 1e-4 * start / start[:, 0].std(correction=0)
    perplexity = calls.params["perplexity"] or min(30, (len(features) - 1) / 3)
    return torch.from_numpy(
        TSNE(perplexity=perplexity, init=start.float().numpy()).fit_transform(features.float())
    )


def umap_by_umap_learn(calls: Calls) -> Tensor:
    """umap-learn's map, with the seed that the method draws from torch's generator."""
    return _umap(calls, calls.result.features)


def _umap(calls: Calls, features: Tensor) -> Tensor:
    from umap import UMAP

    count = len(features)
    with torch.random.fork_rng([]):
        torch.manual_seed(calls.params["seed"])
        seed = int(torch.randint(2**31, ()))
    mapping = UMAP(
        n_neighbors=calls.params["neighbors"] or min(15, count - 1),
        min_dist=calls.params["min_dist"],
        init="random" if count <= 10 else "spectral",
        random_state=seed,
        n_jobs=1,
    )
    return torch.from_numpy(mapping.fit_transform(features.float().numpy()))


class UmapOfCounts(Relation):
    """Agreement with umap-learn for numbers of images with other initializations and numbers of neighbors."""

    one_network = True
    kind: Literal["umap_of_counts"] = "umap_of_counts"

    def check(self, calls: Calls) -> None:
        images = calls.inputs["dataset"].images
        images = torch.cat([images * 0.9**n for n in range(1 + 18 // len(images))])
        for count in (10, 11, 18):
            result = calls(inputs={"dataset": TensorDataset(images[:count])})
            expected = _umap(calls, result.features)
            assert_equal(result.points, expected, self.tolerance, f"the map of {count} images")


class Trustworthiness(Relation):
    """The map's trustworthiness is 1 minus the ranks of its false neighbors, by the paper's formula."""

    kind: Literal["trustworthiness"] = "trustworthiness"

    def check(self, calls: Calls) -> None:
        features, points = calls.result.features.double(), calls.result.points.double()
        count, near = len(points), min(5, (len(points) - 1) // 2)
        # Ranks from 1 of the others in feature space; each image itself is the first, of rank 0.
        ranks = torch.cdist(features, features).argsort(1).argsort(1)
        neighbors = torch.cdist(points, points).argsort(1)[:, 1 : near + 1]
        penalty = (ranks.gather(1, neighbors) - near).clamp(min=0).sum()
        expected = 1 - 2 * penalty / (count * near * (2 * count - 3 * near - 1))
        assert_equal(
            calls.result.metrics["trustworthiness"], expected, 1e-6, "trustworthiness by its formula"
        )
