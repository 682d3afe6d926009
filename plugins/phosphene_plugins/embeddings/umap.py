"""UMAP: a map that keeps a model's nearest neighbours together, by the optional umap-learn."""

import dataclasses
import warnings
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from phosphene import InputError, MissingExtra, Reference, TensorDataset, hookimpl, load_model, method
from phosphene.results import Embedding
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import Cost, size

from ._features import FeatureLayer, at_least, embedded, trustworthiness


def _oracle() -> None:
    """Two heaps of features, far apart, are two heaps on the map."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(2, 2))
    model = load_model(network, mean=[0.0], std=[1.0], input_size=(1, 2, 2))
    near = 0.02 * torch.rand(16, 2, generator=torch.Generator().manual_seed(0))
    halves = near + torch.tensor([[0.1, 0.1], [0.9, 0.9]]).repeat_interleave(8, 0)
    found = umap(model, TensorDataset(halves[:, None, None].expand(-1, 1, 2, 2)), neighbors=4, seed=0)
    assert found.points is not None
    apart = torch.cdist(found.points, found.points).fill_diagonal_(torch.inf)
    assert (apart.argmin(1) // 8).tolist() == [0] * 8 + [1] * 8


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
        )
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    oracle=_oracle,
    quick={"neighbors": 3},
)
def umap(
    model: Model,
    dataset: Dataset,
    *,
    layer: FeatureLayer = None,
    neighbors: Annotated[
        int | None,
        Field(ge=2, le=1000, description="neighbours that are kept near; 15 unless told, or all of few"),
    ] = None,
    min_dist: Annotated[
        float, Field(ge=0, le=1, description="how near to each other points may lie on the map")
    ] = 0.1,
    seed: Seed = None,
) -> Embedding:
    """Lay a data set's pictures out so that each stays near its nearest neighbours in feature space.

    v_ij = exp(-(||phi_i - phi_j|| - rho_i) / sigma_i),  w_ij = 1 / (1 + a ||y_i - y_j||^2b)

    min_y  - sum_ij v_ij log w_ij + (1 - v_ij) log(1 - w_ij)

    with phi what the classifier is given, or a named ``layer`` averaged over its places, rho_i the distance
    to the nearest picture, sigma_i such that ``neighbors`` count, and a, b from ``min_dist``: umap-learn's
    stochastic descent, in one thread so that a seed means one map. ``numbers``: the map's trustworthiness,
    1 where every picture's five neighbours on it are neighbours in truth. MissingExtra without
    umap-learn; InputError for fewer than four pictures, or no more pictures than ``neighbors``.
    """
    at_least(dataset, 4, "UMAP")
    most = len(dataset) - 1
    if neighbors is not None and neighbors > most:
        raise InputError(f"{len(dataset)} pictures have at most {most} neighbours, not {neighbors}")
    try:
        from umap import UMAP  # an extra
    except ImportError as error:
        raise MissingExtra("umap", "umap") from error
    found = embedded(model, dataset, layer)
    # Its spectral beginning asks for more pictures than a handful.
    begin = "spectral" if len(dataset) > 10 else "random"
    chosen = int(torch.randint(2**31, ()))
    mapping = UMAP(
        n_neighbors=neighbors or min(15, most), min_dist=min_dist, init=begin, random_state=chosen, n_jobs=1
    )
    threads = torch.get_num_threads()  # which numba, at its first call, sets for everybody
    try:
        with warnings.catch_warnings():
            # It warns of the sizes and types that it converts itself.
            warnings.simplefilter("ignore", category=UserWarning)
            points = mapping.fit_transform(found.features.float().cpu().numpy())
    finally:
        torch.set_num_threads(threads)
    points = torch.from_numpy(points).to(found.features)
    return dataclasses.replace(
        found, points=points, numbers={"trustworthiness": trustworthiness(found.features, points)}
    )


@hookimpl
def phosphene_methods():
    return [umap]
