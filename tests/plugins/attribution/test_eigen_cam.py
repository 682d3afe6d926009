"""Eigen-CAM: largest variance, the component's sign, and no target."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phosphene import Model, load_model, methods

eigen_cam = methods["attribution.eigen_cam"]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 7, 3), nn.Tanh(), nn.Flatten(), nn.Linear(336, 3)).double()
    return load_model(network, input_size=(3, 8, 10))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_no_direction_has_a_larger_variance(model: Model, images: Tensor) -> None:
    maps = model.features(images, "1").detach().flatten(2)
    component = eigen_cam(model, images, layer="1").maps.flatten(1)
    torch.testing.assert_close(component.sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    directions = torch.randn(200, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    directions /= directions.norm(dim=1, keepdim=True)
    others = torch.einsum("dk,nkp->ndp", directions, maps - maps.mean(2, keepdim=True))
    assert (component.norm(dim=1)[:, None] >= others.norm(dim=2)).all()


def test_the_largest_value_is_positive_for_maps_of_either_sign(model: Model, images: Tensor) -> None:
    first = eigen_cam(model, images, layer="1").maps
    model.module[0].weight.data *= -1
    model.module[0].bias.data *= -1
    second = eigen_cam(model, images, layer="1").maps
    for maps in (first, second):
        assert (maps.amax((1, 2)) >= -maps.amin((1, 2))).all()
    torch.testing.assert_close(first, second)


def test_it_has_no_target_and_runs_nothing_above_the_layer(model: Model, images: Tensor) -> None:
    assert [declared.name for declared in eigen_cam.spec.inputs] == ["model", "images"]
    assert "3" in model.structure.layers  # recorded here, by a forward pass of its own
    calls: list[str] = []
    model.module[3].register_forward_hook(lambda *_: calls.append("head"))
    result = eigen_cam(model, images, layer="1")
    assert not calls
    assert result.targets == ("first component of 1",) * 4


def test_constant_maps_have_no_component(model: Model) -> None:
    assert not eigen_cam(model, torch.full((1, 3, 8, 10), 0.5, dtype=torch.float64), layer="1").maps.any()
