"""What is recorded once for all instances of the kit's networks is what each of them would record."""

import dataclasses

import pytest
import torch

from phosphene import Model, PhospheneError, unit_centers
from phosphene.testing import Case
from phosphene.testing.networks import PURPOSE_BUILT, image_size, network_names
from phosphene.testing.symmetric_networks import (
    RELATION_NETWORKS,
    recorded_relation_network,
    relation_network,
)


def assert_equal(recorded: Model, own: Model) -> None:
    one, other = recorded.structure, own.structure
    assert dataclasses.replace(one, head=None) == dataclasses.replace(other, head=None)
    assert (one.head is None) == (other.head is None)
    if one.head is not None:
        assert (recorded.head.layer, recorded.head.relu) == (own.head.layer, own.head.relu)
        assert torch.equal(recorded.head.weight, own.head.weight)
        assert torch.equal(recorded.head.bias, own.head.bias)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", [*network_names(), *PURPOSE_BUILT])
def test_recorded_network_is_that_of_a_new_one(name: str, double: bool) -> None:
    case = Case(name, double=double)
    model, new = (case.model(recorded=recorded) for recorded in (True, False))
    if (size := (model.input_size[0], *image_size(model))) not in model._cache.structures:
        assert name in ("rows", "two outputs")
        return
    model, new = model.at_size(size), new.at_size(size)
    assert_equal(model, new)
    assert model._cache.class_counts == new._cache.class_counts
    assert model.attention_layers == new.attention_layers
    assert model._cache.window_axes == new._cache.window_axes
    for layer, shape in model._cache.centers:
        assert model._cache.centers[layer, shape] == unit_centers(new, layer, shape[1:])


@pytest.mark.parametrize("name", RELATION_NETWORKS)
def test_recorded_relation_network_is_that_of_a_new_one(name: str) -> None:
    recorded, new = recorded_relation_network(name), relation_network(name)
    assert torch.equal(recorded.images, new.images)
    for (path, weight), other in zip(
        recorded.model.module.state_dict().items(), new.model.module.state_dict().values(), strict=True
    ):
        assert torch.equal(weight, other) and weight.data_ptr() != other.data_ptr(), path
    assert_equal(recorded.model, new.model)
    assert recorded.model.attention_layers == new.model.attention_layers


def test_network_that_cannot_be_read_is_refused_as_before() -> None:
    with pytest.raises(PhospheneError):
        Case("rows").model().structure  # noqa: B018
