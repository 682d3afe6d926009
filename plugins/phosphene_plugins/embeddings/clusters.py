"""Clusters: k-means clustering of a data set's features, and its agreement with the classes."""

import dataclasses
from typing import Annotated, Any
from unittest import mock

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    InputError,
    Reference,
    TensorDataset,
    hookimpl,
    load_model,
    method,
    progress_bar,
    report_progress,
)
from phosphene.results import Embedding
from phosphene.roles import Dataset, Features, Model, Seed
from phosphene.spec import Agrees, Cost, InvariantTo, ScalesWith, size

from ._feature_folds import (
    BLOCK_ROWS,
    LARGE,
    FeatureRows,
    LloydStep,
    RowFunction,
    is_large,
    map_rows,
    nearest_center,
)
from ._features import FeatureLayer, load_features, require_images
from ._principal_components import principal_components
from ._relations import NeedsImages, distances_to_the_mean_of_the_cluster

#: Rows of a large matrix from which the first centers are computed, at least 100 per cluster.
SAMPLE_ROWS = 20_000
#: Most steps with all rows, and the squared shift of the centers at which they end, in mean variances.
STEPS, TOLERANCE = 300, 1e-4


def _oracle() -> None:
    """Three separate pairs, one with a label of another class: they are the clusters, and purity is 5/6."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(2, 2))
    model = load_model(network, mean=[0.0], std=[1.0], input_size=(1, 2, 2))
    halves = torch.tensor([[0.1, 0.1], [0.1, 0.12], [0.9, 0.1], [0.9, 0.12], [0.5, 0.9], [0.5, 0.92]])
    dataset = TensorDataset(halves[:, None, None].expand(-1, 1, 2, 2), ["a", "a", "b", "b", "c", "a"])
    result = clusters(model, dataset, k=3, seed=0)
    assert result.clusters is not None
    first, second = result.clusters[::2], result.clusters[1::2]
    assert torch.equal(first, second) and len(set(first.tolist())) == 3
    assert result.center_distances is not None and result.points is not None
    assert torch.allclose(result.center_distances, torch.full((6,), 0.01), atol=1e-6)
    # Of 15 pairs of images, 3 are in one cluster, 4 in one class and 2 in both; 3 * 4 / 15 by chance.
    expected = {"inertia": 6e-4, "purity": 5 / 6, "adjusted Rand index": (2 - 0.8) / (3.5 - 0.8)}
    assert all(abs(float(result.metrics[name]) - value) < 1e-6 for name, value in expected.items())
    assert torch.allclose((result.points[:, None] - result.points).norm(dim=2), torch.cdist(halves, halves))
    # As many clusters as classes, or eight, at most as many as images.
    default = clusters(model, dataset, seed=0).clusters
    assert default is not None and len(default.unique()) == 3
    ramp = torch.linspace(0, 1, 10)[:, None, None, None].expand(-1, 1, 2, 2)
    for count in (10, 5):
        of_ramp = clusters(model, TensorDataset(ramp[:count]), seed=0)
        assert of_ramp.clusters is not None and len(of_ramp.clusters.unique()) == min(count, 8)
        assert list(of_ramp.metrics) == ["inertia"]
    assert result.axes == ("component 1", "component 2") and result.layout == "clusters"
    # Without clear clusters they depend on the seed, which is drawn from torch's generator.
    from sklearn.cluster import KMeans  # slow to import

    pool = nn.Sequential(nn.AdaptiveAvgPool2d((1, 3)), nn.Flatten(), nn.Linear(3, 2))
    thirds = torch.rand(60, 1, 1, 3, generator=torch.Generator().manual_seed(0))
    model = load_model(pool, mean=[0.0], std=[1.0], input_size=(1, 1, 3))
    for seed in (1, 2):
        result = clusters(model, TensorDataset(thirds), k=8, seed=seed)
        drawn = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(seed)))
        expected_clusters = KMeans(8, n_init=10, random_state=drawn).fit_predict(thirds.flatten(1).numpy())
        assert result.clusters is not None and result.clusters.dtype == torch.int64
        assert result.clusters.tolist() == expected_clusters.tolist()
        assert result.points is not None and result.points.shape == (60, 2)
    # The same of features alone.
    again = clusters(features=result, k=8, seed=2).clusters
    assert again is not None and again.tolist() == expected_clusters.tolist()
    _lloyd_by_hand()


def _lloyd_by_hand() -> None:
    """Clusters of a large matrix: Lloyd's algorithm from the centers of every third row or of fewer.

    A far center has no rows and stays. The others end at a shift below the tolerance, before they stay.
    """
    numbers = torch.rand(900, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nowhere: Any = None
    with mock.patch.dict(
        globals(),
        is_large=lambda features: True,
        _k_means_in_memory=lambda rows, k, seed: (nowhere, torch.cat([rows[:k], rows[:1] - 9]), nowhere),
    ):
        # Rows per sample: at most SAMPLE_ROWS, but 100 per cluster, and at most LARGE numbers.
        for k, sample, large, step in ((2, 200, 899, 4), (3, 100, 899, 3), (3, 100, 200, 5)):
            with mock.patch.dict(globals(), SAMPLE_ROWS=sample, LARGE=large):
                assignments, centers, inertia = k_means(numbers, k, 0)
            expected, tolerance = torch.cat([numbers[: step * k : step], numbers[:1] - 9]), None
            while True:
                distances = (numbers - expected.T).abs()
                nearest = distances.argmin(1)
                if tolerance is None:
                    tolerance = 1e-4 * float(distances.amin(1).square().mean())
                means = torch.stack([numbers[nearest == n].mean(0) for n in range(k)] + [expected[k]])
                shift, expected = (means - expected).square().sum(), means
                if shift <= tolerance:
                    break
            distances = (numbers - expected.T).abs()
            torch.testing.assert_close(centers, expected)
            assert torch.equal(assignments, distances.argmin(1))
            assert abs(inertia - float(distances.amin(1).square().sum())) < 1e-9


@method(
    family="embeddings",
    references=[
        Reference(
            key="lloyd1982",
            title="Least squares quantization in PCM",
            authors="Lloyd",
            year=1982,
            url="https://doi.org/10.1109/TIT.1982.1056489",
        ),
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
    relations=[
        Agrees(distances_to_the_mean_of_the_cluster, fields=("center_distances",)),
        InvariantTo("normalization", fields=("center_distances",)),
        ScalesWith("logits", power=0, fields=("center_distances",)),
        NeedsImages(2, where={"k": 1}),
    ],
    quick={"k": 3},
)
def clusters(
    model: Model | None = None,
    dataset: Dataset | None = None,
    features: Features | None = None,
    *,
    layer: FeatureLayer = None,
    k: Annotated[
        int | None,
        Field(ge=1, le=1000, description="number of clusters; default: the number of classes, or eight"),
    ] = None,
    seed: Seed = None,
) -> Embedding:
    """k-means clustering of a data set's features, compared with the classes.

    min over c, m of sum_i ||phi_i - m_c(i)||^2

    with cluster assignments c and centers m; phi_i is the input of the model's linear classifier for image i,
    or the output of ``layer`` averaged over its positions. scikit-learn's k-means with k-means++
    initialization, the best of ten runs.

    Returns:
        ``clusters`` (N,): c. ``center_distances`` (N,): distance of each image to its cluster's center.
        ``points`` (N, 2): the first two principal components, for the figure. ``metrics``: ``inertia``, the
        sum above; if the data set has classes, ``purity`` (the fraction of images whose class is the most
        frequent one of their cluster), ``adjusted Rand index`` (0 on average for a random clustering, 1 for
        the classes) and ``normalized mutual information``.

    Raises:
        InputError: fewer than two images, or more clusters than images.
        ModelError: no layer is named and the model has no linear classifier.

    Example::
        from phosphene import run

        result = run("clusters", dataset="builtin:scenes/32", k=5, seed=0)
        result.clusters.shape  # (32,)
        result.metrics["purity"]

    Source:
        Lloyd 1982; initialization: Arthur and Vassilvitskii 2007, section 2.2; adjusted Rand index: Hubert
        and Arabie 1985.
    """
    count = require_images(dataset, features, 2, "clustering")
    if k is not None and k > count:
        raise InputError(f"{count} images make at most {count} clusters, not {k}")
    embedding = load_features(model, dataset, features, layer)
    default = 8 if embedding.labels is None else len(set(embedding.labels))
    sklearn_seed = int(torch.randint(2**31, ()))
    assignments, centers, inertia = k_means(embedding.features, k or min(default, count), sklearn_seed)
    blocks = zip(embedding.features.split(BLOCK_ROWS), assignments.split(BLOCK_ROWS), strict=True)
    distances = [(rows - centers[numbers]).norm(dim=1) for rows, numbers in blocks]
    points, _ = principal_components(embedding.features, 2)
    agreement = {} if embedding.labels is None else _agreement(assignments, embedding.labels)
    metrics = {"inertia": inertia, **agreement}
    return dataclasses.replace(
        embedding,
        points=points,
        axes=("component 1", "component 2")[: points.shape[1]],
        clusters=assignments,
        center_distances=torch.cat(distances),
        metrics={name: embedding.features.new_tensor(value) for name, value in metrics.items()},
        layout="clusters",
    )


def k_means(features: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """Cluster of each row (N,), cluster centers (k, D) and the sum of squared distances to them.

    By scikit-learn, the best of ten runs; ``seed`` < 2^32. For a large matrix these runs cluster a sample of
    its rows, and Lloyd's algorithm with all rows starts from the centers.
    """
    if not is_large(features):
        return _k_means_in_memory(features, k, seed)
    step = max(len(features) // max(SAMPLE_ROWS, 100 * k), -(-features.numel() // LARGE))
    return _lloyd(features, _k_means_in_memory(features[::step], k, seed)[1].double().cpu())


def _k_means_in_memory(features: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor, float]:
    from sklearn.cluster import KMeans  # slow to import

    # equivalent mutants: the same clusters where any run finds the minimum; arrays are converted from tensors
    estimator = KMeans(k, n_init=10, random_state=seed)
    # equivalent mutants: scikit-learn converts tensors to arrays itself
    assignments = estimator.fit_predict(features.cpu().to(_numpy_dtype(features)).numpy())
    return (
        torch.from_numpy(assignments).to(features.device, torch.int64),
        torch.from_numpy(estimator.cluster_centers_).to(features),
        float(estimator.inertia_),
    )


def _lloyd(features: Tensor, centers: Tensor) -> tuple[Tensor, Tensor, float]:
    """Clusters, centers and sum of squares of Lloyd's algorithm, until the centers stay."""
    rows, tolerance = FeatureRows(features), None
    for _ in progress_bar(range(STEPS), "k-means steps", STEPS):
        # equivalent mutants: whether progress is reported changes no number
        with report_progress(False):
            state = LloydStep(centers).run(rows, BLOCK_ROWS)
        counts = state["counts"][:, None]
        moved = torch.where(counts > 0, state["sums"] / counts.clamp(min=1), centers)  # an empty one stays
        if tolerance is None:
            tolerance = TOLERANCE * float(state["inertia"]) / features.numel()
        shift, centers = float((moved - centers).square().sum()), moved
        if shift <= tolerance:
            break
    # equivalent mutants: whether progress is reported changes no number
    with report_progress(False):
        inertia = float(LloydStep(centers).run(rows, BLOCK_ROWS)["inertia"])
    assignments = map_rows(features, _Nearest(centers), "clusters")
    return assignments, centers.to(features), inertia


@dataclasses.dataclass
class _Nearest(RowFunction):
    """The number of the nearest center to each row."""

    centers: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return nearest_center(rows, self.centers.to(rows))[0]


def _numpy_dtype(features: Tensor) -> torch.dtype:
    """Double precision as it is, else single: NumPy has no bfloat16."""
    return torch.promote_types(features.dtype, torch.float32)


def _agreement(assignments: Tensor, labels: tuple[str, ...]) -> dict[str, float]:
    """Purity, adjusted Rand index and normalized mutual information of clusters and classes."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    class_numbers = {name: n for n, name in enumerate(sorted(set(labels)))}
    classes, clustered = torch.tensor([class_numbers[label] for label in labels]), assignments.cpu()
    # equivalent mutants: a further row of zeros adds nothing
    contingency = torch.zeros(int(clustered.max()) + 1, len(class_numbers), dtype=torch.int64)
    contingency.index_put_((clustered, classes), torch.tensor(1), accumulate=True)
    # equivalent mutants: scikit-learn converts tensors to arrays itself
    return {
        "purity": int(contingency.amax(1).sum()) / len(labels),
        "adjusted Rand index": adjusted_rand_score(classes.numpy(), clustered.numpy()),
        "normalized mutual information": normalized_mutual_info_score(classes.numpy(), clustered.numpy()),
    }


@hookimpl
def phosphene_methods():
    return [clusters]
