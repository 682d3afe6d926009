"""Eigen-CAM: first principal component of a layer's feature maps, without a class."""

from typing import Any

import torch
from torch import nn

from phosphene import (
    Method,
    Reference,
    at_least_float32,
    hookimpl,
    load_model,
    method,
    unit_centers,
)
from phosphene.results import Attribution
from phosphene.roles import Images, Model
from phosphene.spec import Cost, InvariantTo, size

from ._cam import CamLayer
from ._oracle_networks import NORMALIZATION
from ._relations import EQUIVARIANT


def multiples_of_one_pattern_have_it_as_component() -> None:
    """Feature maps that are all multiples u_k p of one pattern have the component |u| (p - mean p)."""
    generator = torch.Generator().manual_seed(0)
    pattern, factors = (torch.randn(shape, generator=generator) for shape in ((1, 3, 1, 1), (6, 1, 1, 1)))
    conv = nn.Conv2d(3, 6, 1, bias=False)
    conv.weight.data = pattern * factors
    network = nn.Sequential(conv, nn.Flatten(), nn.Linear(6 * 6 * 5, 2)).double()
    model = load_model(network, **NORMALIZATION)
    images = torch.rand(3, 3, 6, 5, dtype=torch.float64, generator=generator)
    maps = eigen_cam(model, images, layer="0").maps
    expected = (model.normalize(images) * pattern).sum(1) * factors.double().norm()
    expected = expected - expected.mean((1, 2), keepdim=True)
    torch.testing.assert_close(maps.abs(), expected.abs(), rtol=1e-6, atol=1e-6)
    assert (maps.amax((1, 2)) >= -maps.amin((1, 2))).all()


@method(
    family="attribution",
    title="Eigen-CAM",
    references=[
        Reference(
            key="muhammad2020",
            title="Eigen-CAM: Class Activation Map using Principal Components",
            authors="Muhammad, Yeasin",
            year=2020,
            url="https://arxiv.org/abs/2008.00299",
        )
    ],
    cost=Cost(forward=size.images),
    oracle=multiples_of_one_pattern_have_it_as_component,
    relations=[*EQUIVARIANT, InvariantTo("batch_order")],
)
def eigen_cam(model: Model, images: Images, *, layer: CamLayer = None) -> Attribution:
    """Eigen-CAM: first principal component of a layer's feature maps, without a class.

    M = X v,  X_pk = A^k_p - mean_p A^k_p,  v = argmax_|v|=1 |X v|

    The sign of a component is arbitrary: it is chosen such that the largest absolute value is positive. No
    gradients are needed, and nothing above the layer runs.

    Returns:
        ``maps`` (N, h, w), raw and signed, at the layer's own size.

    Raises:
        ModelError for a layer without spatial positions.

    Example::
        from phosphene import run

        result = run("eigen_cam", images="builtin:scenes/2")
        result.maps.shape  # (2, 8, 8)

    Source:
        Muhammad & Yeasin 2020, section III, with the maps centered, as principal components require.
    """
    layer = layer or model.last_map
    maps = model.maps(model.features(images, layer), images, layer)
    vectors = at_least_float32(maps).flatten(2).transpose(1, 2)
    centered = vectors - vectors.mean(1, keepdim=True)
    left, values, _ = torch.linalg.svd(centered, full_matrices=False)
    component = left[:, :, 0] * values[:, :1]
    highest, lowest = component.amax(1, keepdim=True), component.amin(1, keepdim=True)
    component = torch.where(highest < -lowest, -component, component).unflatten(1, maps.shape[2:])
    names = (f"first component of {layer}",) * len(images)
    centers = unit_centers(model, layer, images.shape[2:])
    return Attribution(images=images, maps=component, targets=names, centers=centers)


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [eigen_cam]
