"""PCA: a data set's pictures on the directions in which a model's features vary most."""

import dataclasses
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from phosphene import InputError, Reference, TensorDataset, hookimpl, load_model, method
from phosphene.results import Embedding
from phosphene.roles import Dataset, Model
from phosphene.spec import Cost, size

from ._features import FeatureLayer, at_least, embedded, principal_components


def _oracle() -> None:
    """Features on an ellipse's axes come out as they are, the long axis first, with its share."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(2, 2))
    model = load_model(network, mean=[0.0], std=[1.0], input_size=(1, 2, 2))
    halves = torch.tensor([[0.5, 0.9], [0.5, 0.1], [0.6, 0.5], [0.4, 0.5]])
    found = pca(model, TensorDataset(halves[:, None, None].expand(-1, 1, 2, 2)))
    assert found.points is not None
    assert torch.allclose(found.points, (halves - 0.5).flip(1), atol=1e-6)
    assert abs(float(found.numbers["component 1"]) - 0.32 / 0.34) < 1e-5


@method(
    family="embeddings",
    title="PCA",
    references=[
        Reference(
            key="pearson1901",
            title="On Lines and Planes of Closest Fit to Systems of Points in Space",
            authors="Pearson",
            year=1901,
            url="https://doi.org/10.1080/14786440109462720",
        )
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    oracle=_oracle,
)
def pca(
    model: Model,
    dataset: Dataset,
    *,
    layer: FeatureLayer = None,
    components: Annotated[int, Field(ge=1, le=1000, description="how many; two are drawn")] = 2,
) -> Embedding:
    """Show a data set's pictures on the principal components of their features.

    C = 1/(N-1) sum_i (phi_i - mean)(phi_i - mean)^T = sum_j lambda_j v_j v_j^T,  z_ij = v_j . (phi_i - mean)

    with phi what the classifier is given, or a named ``layer`` averaged over its places; lambda_1 >=
    lambda_2 >= ... ``points`` are z (N, components), ``numbers`` each component's share of the variance,
    lambda_j / sum lambda. A component's sign is such that the largest entry of v_j is positive. Exact, by
    the eigenvectors of C, or of the pictures' inner products where they are fewer than the features.
    InputError for fewer than two pictures, or fewer pictures or features than ``components``.
    """
    at_least(dataset, max(2, components), f"{components} principal components")
    found = embedded(model, dataset, layer)
    if components > (most := found.features.shape[1]):
        raise InputError(f"there are {most} features, so there can be no {components} components")
    points, shares = principal_components(found.features, components)
    axes = tuple(f"component {n}" for n in range(1, components + 1))
    return dataclasses.replace(found, points=points, axes=axes, numbers=dict(zip(axes, shares, strict=True)))


@hookimpl
def phosphene_methods():
    return [pca]
