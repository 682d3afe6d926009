"""UMAP: two-dimensional map of a data set's features from their neighbor graph, by umap-learn."""

import dataclasses
import warnings
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from phosphene import (
    InputError,
    MissingExtra,
    Reference,
    TensorDataset,
    fork_random_state,
    hookimpl,
    load_model,
    method,
)
from phosphene.results import Embedding
from phosphene.roles import Dataset, Features, Model, Seed
from phosphene.spec import Agrees, Cost, size

from ._features import FeatureLayer, load_features, require_images
from ._relations import NeedsImages, Trustworthiness, UmapOfCounts, umap_by_umap_learn
from ._trustworthiness import trustworthiness

FAR = {"neighbors": None, "min_dist": 0.7}


def _oracle() -> None:
    """Two separate clusters of features: the nearest neighbor of every point on the map is in its cluster."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(2, 2))
    model = load_model(network, mean=[0.25], std=[0.5], input_size=(1, 2, 2))
    noise = 0.02 * torch.rand(16, 2, generator=torch.Generator().manual_seed(0))
    halves = noise + torch.tensor([[0.1, 0.1], [0.9, 0.9]]).repeat_interleave(8, 0)
    result = umap(model, TensorDataset(halves[:, None, None].expand(-1, 1, 2, 2)), neighbors=4, seed=0)
    assert result.points is not None
    torch.testing.assert_close(result.features, (halves - 0.25) / 0.5)
    distances = torch.cdist(result.points, result.points).fill_diagonal_(torch.inf)
    assert (distances.argmin(1) // 8).tolist() == [0] * 8 + [1] * 8
    refused = False
    try:
        umap(model, TensorDataset(halves[:8, None, None].expand(-1, 1, 2, 2)), neighbors=8)
    except InputError:
        refused = True
    assert refused, "each of 8 images has 7 neighbors"
    one = umap(model, TensorDataset(halves[:, None, None].expand(-1, 1, 2, 2)), layer="0", seed=0)
    torch.testing.assert_close(one.features, (halves.mean(1, keepdim=True) - 0.25) / 0.5)
    _maps_are_those_of_umap_learn()
    _trustworthiness_by_its_formula()


def _trustworthiness_by_its_formula() -> None:
    """1 minus the ranks of the false neighbors; of 2001 points that of every second one."""
    draw = torch.Generator().manual_seed(2)
    for count in (6, 9, 14, 2001):
        features, points = torch.rand(count, 3, generator=draw), torch.rand(count, 2, generator=draw)
        subset = features[:: 2 if count > 2000 else 1], points[:: 2 if count > 2000 else 1]
        distances = [torch.cdist(part.double(), part.double()) for part in subset]
        size = len(distances[0])
        near = min(5, (size - 1) // 2)
        ranks = distances[0].argsort(1).argsort(1)  # from 1 of the others
        neighbors = distances[1].argsort(1)[:, 1 : near + 1]
        penalty = (ranks.gather(1, neighbors) - near).clamp(min=0).sum()
        expected = 1 - 2 * penalty / (size * near * (2 * size - 3 * near - 1))
        torch.testing.assert_close(trustworthiness(features, points), expected.float())


def _maps_are_those_of_umap_learn() -> None:
    """With the seed drawn from torch's generator; from 11 images on the start is spectral."""
    from umap import UMAP

    values = torch.rand(18, 3, generator=torch.Generator().manual_seed(1))
    for count, neighbors, min_dist in (
        (4, 3, 0.1),
        (10, None, 0.1),
        (11, None, 0.6),
        (18, None, 0.1),
        (17, 5, 0.1),
    ):
        ids = tuple(map(str, range(count)))
        features = Embedding(ids=ids, features=values[:count], thumbnails=torch.zeros(count, 1, 2, 2))
        result = umap(features=features, neighbors=neighbors, min_dist=min_dist, seed=count)
        with fork_random_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(count)
            mapping = UMAP(
                n_neighbors=neighbors or min(15, count - 1),
                min_dist=min_dist,
                init="spectral" if count > 10 else "random",
                random_state=int(torch.randint(2**31, ())),
            )
            expected = torch.from_numpy(mapping.fit_transform(values[:count].numpy()))
        torch.testing.assert_close(result.points, expected)
        expected = trustworthiness(values[:count], expected)
        torch.testing.assert_close(result.metrics["trustworthiness"], expected)


@method(
    family="embeddings",
    title="UMAP",
    references=[
        Reference(
            key="mcinnes2018",
            title="UMAP: Uniform Manifold Approximation and Projection for Dimension Reduction",
            authors="McInnes, Healy, Melville",
            year=2018,
            url="https://arxiv.org/abs/1802.03426",
        ),
        Reference(
            key="venna2001",
            title="Neighborhood Preservation in Nonlinear Projection Methods: An Experimental Study",
            authors="Venna, Kaski",
            year=2001,
            url="https://doi.org/10.1007/3-540-44668-0_68",
        ),
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    oracle=_oracle,
    relations=[
        Agrees(umap_by_umap_learn, fields=("points",), networks=("gap",)),
        Agrees(umap_by_umap_learn, fields=("points",), where=FAR, networks=("gap",)),
        UmapOfCounts(where={"neighbors": None}, networks=("gap",)),
        Trustworthiness(networks=("gap",)),
        NeedsImages(4, where={"neighbors": 2}),
    ],
    exempt={"independent_of_the_dataset_order": "its steps are drawn at random, row by row"},
    quick={"neighbors": 3},
)
def umap(
    model: Model | None = None,
    dataset: Dataset | None = None,
    features: Features | None = None,
    *,
    layer: FeatureLayer = None,
    neighbors: Annotated[
        int | None,
        Field(
            ge=2,
            le=1000,
            description="neighbors per image in the graph; default: 15, at most all other images",
        ),
    ] = None,
    min_dist: Annotated[
        float, Field(ge=0, le=1, description="smallest distance between points on the map")
    ] = 0.1,
    seed: Seed = None,
) -> Embedding:
    """UMAP: two-dimensional map of a data set's features that preserves nearest neighbors.

    v_ij = exp(-(||phi_i - phi_j|| - rho_i) / sigma_i),  w_ij = 1 / (1 + a ||y_i - y_j||^2b)

    min_y  - sum_ij v_ij log w_ij + (1 - v_ij) log(1 - w_ij)

    phi_i is the input of the model's linear classifier for image i, or the output of ``layer`` averaged
    over its positions; rho_i is the distance to the nearest image, sigma_i normalizes the weights of the
    ``neighbors``, a and b follow from ``min_dist``. umap-learn's stochastic gradient descent, in one
    thread, so that a seed determines the map.

    Returns:
        ``points`` (N, 2): y. ``metrics``: ``trustworthiness`` in [0, 1], 1 if the five nearest neighbors of
        each point on the map are neighbors in feature space. ``features`` (N, D), ``ids``, ``labels``,
        ``thumbnails`` as ``embed`` returns them.

    Raises:
        InputError: fewer than four images, or no more images than ``neighbors``.
        MissingExtra: umap-learn is not installed.
        ModelError: no layer is named and the model has no linear classifier.

    Example::
        from phosphene import run

        result = run("umap", dataset="builtin:scenes/32", seed=0)
        result.points.shape  # (32, 2)

    Source:
        McInnes et al. 2018, section 3 and appendix C; trustworthiness: Venna and Kaski 2001.
    """
    limit = require_images(dataset, features, 4, "UMAP") - 1
    if neighbors is not None and neighbors > limit:
        raise InputError(f"{limit + 1} images have at most {limit} neighbors, not {neighbors}")
    try:
        from umap import UMAP  # an extra
    except ImportError as error:
        raise MissingExtra("umap", "umap") from error
    embedding = load_features(model, dataset, features, layer)
    mapping = UMAP(
        n_neighbors=neighbors or min(15, limit),
        min_dist=min_dist,
        # The spectral initialization fails for very few images.
        init="spectral" if limit >= 10 else "random",
        random_state=int(torch.randint(2**31, ())),
        n_jobs=1,  # equivalent mutants: with a random state umap-learn uses one thread
    )
    threads = torch.get_num_threads()  # numba, at its first call, changes the number for the process
    try:
        with warnings.catch_warnings():
            # umap-learn warns of sizes and types that it converts itself.
            # equivalent mutants: a warning changes no result
            warnings.simplefilter("ignore", category=UserWarning)
            # equivalent mutants: umap-learn converts tensors to arrays itself
            points = mapping.fit_transform(embedding.features.float().cpu().numpy())
    finally:
        torch.set_num_threads(threads)
    points = torch.from_numpy(points).to(embedding.features)
    metrics = {"trustworthiness": trustworthiness(embedding.features, points)}
    return dataclasses.replace(embedding, points=points, metrics=metrics)


@hookimpl
def phosphene_methods():
    return [umap]
