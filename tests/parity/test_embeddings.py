"""PCA, k-means, Mahalanobis distances and t-SNE against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE, trustworthiness
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import nn

from phosphene import load_model, methods, run


def model(size):
    return load_model(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * size**2, 2)).double(), input_size=(3, size, size)
    )


def random_images(count, size):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(("count", "size"), [(80, 4), (20, 6)])  # fewer features than images, and more
def test_pca_equals_sklearn(count, size):
    images = random_images(count, size)
    ours = methods["embeddings.pca"](model(size), images, components=5)
    theirs = PCA(5, svd_solver="full")
    points = torch.from_numpy(theirs.fit_transform(images.flatten(1).numpy()))
    assert torch.allclose(ours.points, points, rtol=1e-9, atol=1e-9)
    ratios = torch.stack([ours.metrics[f"component {n}"] for n in range(1, 6)])
    assert torch.allclose(ratios, torch.from_numpy(theirs.explained_variance_ratio_), rtol=1e-9)


@pytest.mark.parametrize(("count", "size"), [(80, 4), (20, 6)])
def test_mahalanobis_distances_equal_sklearn(count, size):
    images = random_images(count, size)
    ours = methods["embeddings.outliers"](model(size), images)
    theirs = LedoitWolf().fit(images.flatten(1).numpy())
    assert abs(float(ours.metrics["shrinkage"]) - theirs.shrinkage_) < 1e-12
    squares = torch.from_numpy(theirs.mahalanobis(images.flatten(1).numpy()))
    assert torch.allclose(ours.points[:, 1].square(), squares, rtol=1e-8)


def test_clusters_and_scores_equal_sklearn():
    ours = run("clusters", dataset="builtin:scenes/100", seed=0)
    theirs = KMeans(10, n_init=10, random_state=1).fit(ours.features.numpy())
    assert abs(float(ours.metrics["inertia"]) / theirs.inertia_ - 1) < 0.02
    rand = adjusted_rand_score(ours.labels, ours.clusters)
    assert abs(float(ours.metrics["adjusted Rand index"]) - rand) < 1e-6
    mutual_information = normalized_mutual_info_score(ours.labels, ours.clusters)
    assert abs(float(ours.metrics["normalized mutual information"]) - mutual_information) < 1e-6


def test_tsne_equals_sklearn_in_divergence_and_trustworthiness():
    ours = run("tsne", dataset="builtin:scenes/80", perplexity=10)
    theirs, exact = (TSNE(perplexity=10, method=m, random_state=0) for m in ("barnes_hut", "exact"))
    theirs.fit(ours.features.numpy())
    points = exact.fit_transform(ours.features.numpy())
    expected = trustworthiness(ours.features.numpy(), points, n_neighbors=5)
    assert abs(float(ours.metrics["trustworthiness"]) - expected) < 0.01
    assert abs(float(ours.metrics["KL divergence"]) / theirs.kl_divergence_ - 1) < 0.05
    assert abs(trustworthiness(ours.features, ours.points) - float(ours.metrics["trustworthiness"])) < 1e-6
