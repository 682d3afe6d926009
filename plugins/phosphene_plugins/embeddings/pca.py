"""PCA: principal component analysis of a data set's features."""

import dataclasses
from typing import Annotated, Any
from unittest import mock

import torch
from pydantic import Field
from torch import nn

from phosphene import InputError, Reference, TensorDataset, hookimpl, load_model, method
from phosphene.results import Embedding
from phosphene.roles import Dataset, Features, Model
from phosphene.spec import Agrees, Cost, size

from . import _feature_folds
from ._feature_folds import moments, nearest_center
from ._features import FeatureLayer, load_features, require_images
from ._principal_components import _components_of_blocks, principal_components
from ._relations import NeedsImages, components_by_svd, features_of


def _oracle() -> None:
    """Features on the axes of an ellipse are their own coordinates, the long axis first."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(2, 2))
    model = load_model(network, mean=[0.0], std=[1.0], input_size=(1, 2, 2))
    halves = torch.tensor([[0.5, 0.9], [0.5, 0.1], [0.6, 0.5], [0.4, 0.5]])
    result = pca(model, TensorDataset(halves[:, None, None].expand(-1, 1, 2, 2)))
    assert result.points is not None
    assert torch.allclose(result.points, (halves - 0.5).flip(1), atol=1e-6)
    # A third, constant feature has no variance, not rounding errors; neither have equal images.
    linear = nn.Linear(2, 3)
    wide = load_model(nn.Sequential(*network[:2], linear, nn.Linear(3, 2)), input_size=(1, 2, 2))
    with torch.no_grad():
        linear.weight.copy_(torch.eye(3)[:, :2])
        for bias in (7.3, -7.3):
            linear.bias.copy_(torch.tensor([0.0, 0.0, bias]))
            seven = TensorDataset(halves[[0, 1, 2, 3, 0, 1, 2], None, None].expand(-1, 1, 2, 2))
            points = pca(wide, seven, components=3).points
            assert points is not None and not points[:, 2].any()
    # The output of a layer, and features that are passed.
    flat = pca(wide, TensorDataset(halves[:, None, None].expand(-1, 1, 2, 2)), layer="1")
    call: Any = pca
    for other in (flat, call(features=halves)):
        assert other.points is not None and torch.allclose(other.points, result.points, atol=1e-6)
    moments_of_blocks_by_hand()
    equal = pca(wide, TensorDataset(torch.ones(2, 1, 2, 2))).points
    assert equal is not None and not equal.any()
    assert result.axes == ("component 1", "component 2")
    fractions = torch.stack([result.metrics[axis] for axis in result.axes])
    assert torch.allclose(fractions, torch.tensor([0.32, 0.02]) / 0.34, atol=1e-5)
    # All components preserve inner products, of fewer and of more images than features, also block by block.
    draw = torch.Generator().manual_seed(0)
    for shape, scale in (((4, 7), 1.0), ((7, 4), 1.0), ((4, 7), 1e-6), ((7, 4), 1e-6)):
        features = torch.randn(shape, generator=draw, dtype=torch.float64) * scale
        centered = features - features.mean(0)
        values = torch.linalg.svdvals(centered).square()[:3] / centered.square().sum()
        for function in (principal_components, _components_of_blocks):
            points, _ = function(features, 4)
            torch.testing.assert_close(points @ points.T / scale**2, centered @ centered.T / scale**2)
            points, fractions = function(features, 3)
            torch.testing.assert_close(fractions, values)
            torch.testing.assert_close(points.square().sum(0) / centered.square().sum(), values)
            same, fractions = function(features[:1].expand(4, -1), 2)
            assert not same.any() and fractions.tolist() == [0, 0]


def moments_of_blocks_by_hand() -> None:
    """Mean, scatter and fourth moment of blocks of rows; a feature that differs by rounding; centers."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(8, 3, generator=draw) * torch.tensor([1.0, 0.0, 5.0]) - torch.tensor([0, 0, 20.0])
    features[:, 1] = 1000 + 2.0**-12 * torch.tensor([0, 1, 0, 0, 1, 0, 0, 1])
    for values in (features, -features):
        with mock.patch.object(_feature_folds, "BLOCK_ROWS", 3):
            of_blocks = moments(values)
        centered = values.double() - values.double().mean(0)
        centered[:, 1] = 0
        torch.testing.assert_close(of_blocks.mean, values.double().mean(0))
        torch.testing.assert_close(of_blocks.scatter, centered.T @ centered)
        torch.testing.assert_close(of_blocks.fourth, centered.norm(dim=1).pow(4).sum())
        assert not of_blocks.scatter[1].any() and not of_blocks.center(values.double())[:, 1].any()
    rows, centers = (torch.randn(n, 4, generator=draw) for n in (20, 5))
    nearest, distances = nearest_center(rows, centers)
    expected = (rows[:, None] - centers).norm(dim=2).min(1)
    assert torch.equal(nearest, expected.indices)
    torch.testing.assert_close(distances, expected.values)


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
        ),
        Reference(
            key="jolliffe2002",
            title="Principal Component Analysis, second edition",
            authors="Jolliffe",
            year=2002,
            url="https://doi.org/10.1007/b98835",
        ),
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    oracle=_oracle,
    relations=[
        *features_of("points"),
        NeedsImages(2, where={"components": 1}),
        NeedsImages(3, where={"components": 3}),
        Agrees(components_by_svd, fields=("points",), where={"components": 3}),
    ],
)
def pca(
    model: Model | None = None,
    dataset: Dataset | None = None,
    features: Features | None = None,
    *,
    layer: FeatureLayer = None,
    components: Annotated[
        int, Field(ge=1, le=1000, description="number of components; figures show the first two")
    ] = 2,
) -> Embedding:
    """Principal component analysis (PCA) of a data set's features.

    C = 1/(N-1) sum_i (phi_i - mean)(phi_i - mean)^T = sum_j lambda_j v_j v_j^T,  z_ij = v_j . (phi_i - mean)

    with lambda_1 >= lambda_2 >= ...; phi_i is the input of the model's linear classifier for image i, or
    the output of ``layer`` averaged over its positions. Exact, from the eigenvectors of C, or of the Gram
    matrix if there are more features than images. The sign of v_j is such that its largest entry is
    positive.

    Returns:
        ``points`` (N, components): z. ``metrics``: for each component its fraction of the variance,
        lambda_j / sum lambda. ``features`` (N, D), ``ids``, ``labels``, ``thumbnails`` as ``embed`` returns
        them.

    Raises:
        InputError: fewer than two images, or fewer images or features than ``components``.
        ModelError: no layer is named and the model has no linear classifier.

    Example::
        from phosphene import run

        result = run("pca", dataset="builtin:scenes/32")
        result.points.shape  # (32, 2)
        result.metrics["component 1"]

    Source:
        Pearson 1901; Jolliffe 2002, section 1.1.
    """
    require_images(dataset, features, max(2, components), f"{components} principal components")
    embedding = load_features(model, dataset, features, layer)
    if components > (count := embedding.features.shape[1]):
        raise InputError(f"there are {count} features, so there can be no {components} components")
    points, fractions = principal_components(embedding.features, components)
    axes = tuple(f"component {n}" for n in range(1, components + 1))
    metrics = {axis: fractions[n] for n, axis in enumerate(axes)}
    return dataclasses.replace(embedding, points=points, axes=axes, metrics=metrics)


@hookimpl
def phosphene_methods():
    return [pca]
