"""The tuned twin where layers are read: it answers where it has what is asked for, and leaves no trace."""

import pytest
import torch
from tests.core.test_optimized_copy import both, small, used_to_life, wrapped
from torch import nn
from torchvision import models

from phosphene import methods
from phosphene.models import optimized_copy as twin
from phosphene.models.optimized_copy import allow_optimized, checksum
from phosphene.targets import Class, Predicted


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("resnet18", "grad_cam"), ("mobilenet_v2", "grad_cam"), ("mobilenet_v2", "guided_backprop"),
        ("resnet18", "lrp"), ("resnet18", "embed"),
    ],
)  # fmt: skip
def test_what_reads_layers_gives_the_same_with_and_without_a_twin(name, method, monkeypatch):
    torch.manual_seed(0)
    model = wrapped(used_to_life(models.get_model(name, weights=None)), 96)
    pictures = torch.rand(12, 3, 96, 96, dtype=torch.float64)
    arguments = (pictures,) if method == "embed" else (pictures[:5], 3)
    with_twin, without = both(monkeypatch, method, model, *arguments)
    assert with_twin.provenance.model["tuned"]
    made, expected = (r.features if method == "embed" else r.maps for r in (with_twin, without))
    torch.testing.assert_close(made, expected, rtol=1e-8, atol=1e-10)


def test_a_large_picture_needs_no_others_to_pay(monkeypatch):
    torch.manual_seed(0)
    model = wrapped(small(), 224)
    picture = torch.rand(1, 3, 224, 224, dtype=torch.float64)
    with_twin, without = both(monkeypatch, "saliency", model, picture, 3)
    assert with_twin.provenance.model["tuned"]
    torch.testing.assert_close(with_twin.maps, without.maps, rtol=1e-8, atol=1e-10)


class Between(nn.Module):
    """Convolutions whose outputs pass through other layers and containers on the way to their norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Dropout())
        self.norm = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.norm(self.first(x))).relu().mean((2, 3)))


def test_layers_that_a_folded_network_has_not_are_the_originals(images):
    torch.manual_seed(0)
    network = used_to_life(Between()).eval()
    model = wrapped(network)
    first = {"first", "first.0", "first.1", "norm", "norm.0"}
    assert model.structure.unfolded == {*first, "second.0", "second.1"}
    with torch.no_grad():
        right = {name: model.features(images, name) for name in model.structure.layers}
        given = {name: model.input_of(images, name) for name in model.structure.layers}
    for name in model.structure.layers:
        with model.guard(), torch.no_grad(), allow_optimized(model, 100) as optimized:
            torch.testing.assert_close(model.features(images, name), right[name])
            assert optimized.used == (name not in model.structure.unfolded), name
            torch.testing.assert_close(model.input_of(images, name), given[name])
            with model.tap(name) as tap:
                model(images)
            torch.testing.assert_close(tap[name], right[name])


def test_a_twin_made_while_layers_are_read_sees_them_once_and_keeps_no_hook(images):
    model = wrapped(small())
    outputs = []
    with model.guard(), torch.no_grad(), allow_optimized(model, 100) as optimized:
        with model.tap("2", replace=lambda output: outputs.append(output) or 2 * output) as tap:
            doubled = model(images)
        plain = model(images)
        assert optimized.used
        assert not torch.allclose(doubled, plain)
    assert [len(output) for output in outputs] == [6]  # no noise was seen, and the pictures once
    assert len(tap["2"]) == 6
    for network in (model.module, model._optimized_copy[1]):
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


def test_a_tap_of_another_model_leaves_this_one_to_itself(images):
    model, other = wrapped(small()), wrapped(small())
    with model.guard(), torch.no_grad(), allow_optimized(model, 100) as optimized:
        with other.tap("2"):
            model(images)
        assert not optimized.used


def changed(tensor: torch.Tensor, how: str) -> None:
    if how == "one":
        tensor[7777] += 1e-6
    elif how == "odd signs":
        tensor[1::2] *= -1
    elif how == "two signs":
        tensor[[101, 303]] *= -1
    elif how == "neighbours":
        tensor[[40_000, 40_001]] = tensor[[40_001, 40_000]]
    else:
        tensor.copy_(tensor.flip(0))


@pytest.mark.parametrize("how", ["one", "odd signs", "two signs", "neighbours", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_check_sum_sees_every_change(how, dtype):
    tensor = torch.randn(100_003, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = checksum(tensor)
    assert checksum(tensor.clone()) == before
    changed(tensor, how if dtype.itemsize > 2 or how != "one" else "two signs")
    assert checksum(tensor) != before


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (16289,), (2, 16289), (257, 129)])
def test_a_check_sum_is_of_any_shape(shape):
    tensor = torch.rand(shape)
    assert checksum(tensor) == checksum(tensor.clone())
    if tensor.numel():
        last = tensor.clone()
        last.view(-1)[-1] += 1
        assert checksum(last) != checksum(tensor)


def test_inside_a_run_a_check_sum_is_taken_once_until_something_is_written(monkeypatch):
    taken = []
    plain = twin._checksum
    monkeypatch.setattr(twin, "_checksum", lambda tensor: taken.append(tensor) or plain(tensor))
    tensor = torch.rand(5)
    with allow_optimized(None, 0):
        assert checksum(tensor) == checksum(tensor.view(5)) and len(taken) == 1
        tensor += 1
        assert checksum(tensor) == plain(tensor) and len(taken) == 2
    checksum(tensor)
    assert len(taken) == 3


def test_a_target_is_decided_by_the_pictures_where_it_is_open(images):
    model = wrapped(small().eval())
    with torch.no_grad():
        predicted = tuple(model(images).argmax(1).tolist())
    assert Predicted().resolve(model, images) == Class(predicted)
    assert Class(2).resolve(model, images) == Class(2)


def test_a_relu_may_be_written_over_as_without_the_rewrite(images):
    """Autograd keeps a ReLU's output and a clamp's input; guided backprop needs no more of either."""

    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.clamp(self.conv(x), min=0)
            x += 1
            y = x * 1
            z = torch.relu(y)
            y *= 2
            return self.head(z.mean((2, 3)))

    torch.manual_seed(0)
    network = Overwriting().double()
    maps = methods["guided_backprop"](wrapped(network), images, 1).maps
    active = network.conv((images - 0.4) / 0.2) > 0
    passed = (network.head.weight[1].clamp(min=0) / 14**2)[None, :, None, None] * active
    expected = torch.nn.functional.conv_transpose2d(passed, network.conv.weight / 0.2)
    torch.testing.assert_close(maps, expected.abs().amax(1).detach())
