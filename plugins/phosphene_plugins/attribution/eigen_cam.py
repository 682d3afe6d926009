"""Eigen-CAM: what a layer's maps have most in common, whatever the class."""

from typing import Any

import torch
from torch import nn

from phosphene import Method, Reference, hookimpl, load_model, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model
from phosphene.spec import Cost, size

from ._cam import SCALED, CamLayer, Normalize, by_convention


def one_pattern_is_found_again() -> None:
    """Maps that are all multiples u_k p of one pattern have |u| (p - mean p) as their component."""
    pattern, times = torch.randn(1, 3, 1, 1), torch.randn(6, 1, 1, 1)
    conv = nn.Conv2d(3, 6, 1, bias=False)
    conv.weight.data = pattern * times
    model = load_model(nn.Sequential(conv, nn.Flatten(), nn.Linear(6 * 6 * 5, 2)).double())
    images = torch.rand(3, 3, 6, 5, dtype=torch.float64)
    found = eigen_cam(model, images, layer="0").maps
    expected = (images * pattern).sum(1) * times.double().norm()
    expected = expected - expected.mean((1, 2), keepdim=True)
    torch.testing.assert_close(found.abs(), expected.abs(), rtol=1e-6, atol=1e-6)
    assert (found.amax((1, 2)) >= -found.amin((1, 2))).all()


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
    invariants=[SCALED],
    cost=Cost(forward=size.images),
    oracle=one_pattern_is_found_again,
)
def eigen_cam(
    model: Model, images: Images, *, layer: CamLayer = None, normalize: Normalize = None
) -> Attribution:
    """Show what a layer's maps have most in common: their first principal component, of no class.

    M = X v,  X_pk = A^k_p - mean_p A^k_p,  v = argmax_|v|=1 |X v|

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, h, w) at the layer's own size, raw and signed
    unless ``normalize`` says otherwise. A component has no sign of its own: it gets the one that makes
    its largest value positive. No gradients, and nothing above the layer runs. Raises ModelError for a
    layer without places.

    Source: Muhammad & Yeasin 2020, section III; the maps are centred, as principal components want.
    """
    layer = layer or model.last_map
    maps = model.maps(model.features(images, layer), images)
    places = maps.flatten(2).transpose(1, 2)
    centred = places - places.mean(1, keepdim=True)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    component = left[:, :, 0] * values[:, :1]
    highest, lowest = component.amax(1, keepdim=True), component.amin(1, keepdim=True)
    component = torch.where(highest < -lowest, -component, component).unflatten(1, maps.shape[2:])
    shown = by_convention(component, images, normalize, signed=True)
    return Attribution(images=images, maps=shown, targets=(f"first component of {layer}",) * len(images))


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [eigen_cam]
