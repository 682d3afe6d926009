"""t-SNE: a map on which pictures that a model takes for alike are neighbours."""

import dataclasses
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Reference, TensorDataset, hookimpl, load_model, method
from phosphene.results import Embedding
from phosphene.roles import Dataset, Model
from phosphene.spec import Cost, size

from ._features import FeatureLayer, at_least, embedded, principal_components, trustworthiness


def _oracle() -> None:
    """Two heaps of features, far apart, are two heaps on the map."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(2, 2))
    model = load_model(network, mean=[0.0], std=[1.0], input_size=(1, 2, 2))
    near = 0.02 * torch.rand(12, 2, generator=torch.Generator().manual_seed(0))
    halves = near + torch.tensor([[0.1, 0.1], [0.9, 0.9]]).repeat_interleave(6, 0)
    found = tsne(model, TensorDataset(halves[:, None, None].expand(-1, 1, 2, 2)), perplexity=3)
    assert found.points is not None
    apart = torch.cdist(found.points, found.points).fill_diagonal_(torch.inf)
    assert (apart.argmin(1) // 6).tolist() == [0] * 6 + [1] * 6


@method(
    family="embeddings",
    title="t-SNE",
    references=[
        Reference(
            key="vandermaaten2008",
            title="Visualizing Data using t-SNE",
            authors="van der Maaten, Hinton",
            year=2008,
            url="https://jmlr.org/papers/v9/vandermaaten08a.html",
        ),
        Reference(
            key="kobak2021",
            title="Initialization is critical for preserving global data structure in both t-SNE and UMAP",
            authors="Kobak, Linderman",
            year=2021,
            url="https://doi.org/10.1038/s41587-020-00809-z",
        ),
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    oracle=_oracle,
    quick={"perplexity": 2},
)
def tsne(
    model: Model,
    dataset: Dataset,
    *,
    layer: FeatureLayer = None,
    perplexity: Annotated[
        float | None,
        Field(
            ge=1, le=10000, description="neighbours that count; 30 unless told, or a third of few pictures"
        ),
    ] = None,
) -> Embedding:
    """Lay a data set's pictures out so that those with near features lie near each other.

    p_j|i ~ exp(-||phi_i - phi_j||^2 / 2 sigma_i^2),  q_ij ~ 1 / (1 + ||y_i - y_j||^2)

    min_y KL(P || Q) = sum_ij p_ij log(p_ij / q_ij)

    with phi what the classifier is given, or a named ``layer`` averaged over its places, and sigma_i such
    that the neighbours of i have the ``perplexity`` asked for; scikit-learn's Barnes-Hut approximation, 1000
    iterations. It begins with the principal components, so nothing is drawn at random and the same
    features give the same map. ``numbers``: the divergence reached, and the map's trustworthiness, 1 where
    every picture's five neighbours on it are neighbours in truth. Distances between heaps, and their
    sizes, mean nothing. InputError for fewer than four pictures and for a perplexity that needs more
    pictures than there are.
    """
    at_least(dataset, 4, "t-SNE")
    most = len(dataset) - 1
    if perplexity is not None and perplexity > most:
        raise InputError(f"{len(dataset)} pictures allow a perplexity of at most {most}, not {perplexity:g}")
    found = embedded(model, dataset, layer)
    usual = min(30.0, most / 3)
    points, divergence = _laid_out(found.features, usual if perplexity is None else perplexity)
    numbers = {"divergence": divergence, "trustworthiness": trustworthiness(found.features, points)}
    return dataclasses.replace(found, points=points, numbers=numbers)


def _laid_out(features: Tensor, perplexity: float) -> tuple[Tensor, Tensor]:
    from sklearn.manifold import TSNE  # imported late, for it takes a second

    begin, _ = principal_components(features, 2)
    begin = nn.functional.pad(begin, (0, 2 - begin.shape[1]))
    width = begin[:, 0].std(correction=0)
    begin = 1e-4 * begin / torch.where(width > 0, width, 1)
    model = TSNE(perplexity=perplexity, init=begin.float().cpu().numpy())
    # In single precision, as it works: rounding is not to become another map.
    points = torch.from_numpy(model.fit_transform(features.float().cpu().numpy()))
    return points.to(features), features.new_tensor(model.kl_divergence_)


@hookimpl
def phosphene_methods():
    return [tsne]
