"""The optimized copy where layers are read: used where it has these layers, and without side effects."""

import pytest
import torch
from tests.core.test_optimized_copy import randomize_norms, run_with_and_without_copy, small, wrap
from torch import nn
from torchvision import models

from phosphene import methods
from phosphene.models import digest
from phosphene.models.digest import checksum
from phosphene.models.optimized_copy import allow_optimized
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
def test_methods_that_read_layers_return_the_same_with_and_without_the_copy(name, method, monkeypatch):
    torch.manual_seed(0)
    model = wrap(randomize_norms(models.get_model(name, weights=None)), 96)
    images = torch.rand(12, 3, 96, 96, dtype=torch.float64)
    arguments = (images,) if method == "embed" else (images[:5], 3)
    with_copy, without = run_with_and_without_copy(monkeypatch, method, model, *arguments)
    assert with_copy.provenance.model["optimized_copy"]
    actual, expected = (r.features if method == "embed" else r.maps for r in (with_copy, without))
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def test_copy_is_used_for_one_large_image(monkeypatch):
    torch.manual_seed(0)
    model = wrap(small(), 224)
    image = torch.rand(1, 3, 224, 224, dtype=torch.float64)
    with_copy, without = run_with_and_without_copy(monkeypatch, "saliency", model, image, 3)
    assert with_copy.provenance.model["optimized_copy"]
    torch.testing.assert_close(with_copy.maps, without.maps, rtol=1e-8, atol=1e-10)


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


def test_folded_layers_are_read_from_the_original(images):
    torch.manual_seed(0)
    network = randomize_norms(Between()).eval()
    model = wrap(network)
    first = {"first", "first.0", "first.1", "norm", "norm.0"}
    assert model.structure.unfolded == {*first, "second.0", "second.1"}
    with torch.no_grad():
        right = {name: model.features(images, name) for name in model.structure.layers}
        inputs = {name: model.input_of(images, name) for name in model.structure.layers}
    for name in model.structure.layers:
        with model.guard(), torch.no_grad(), allow_optimized(model, 100) as optimized:
            torch.testing.assert_close(model.features(images, name), right[name])
            assert optimized.used == (name not in model.structure.unfolded), name
            torch.testing.assert_close(model.input_of(images, name), inputs[name])
            with model.tap(name) as tap:
                model(images)
            torch.testing.assert_close(tap[name], right[name])


def test_copy_created_during_a_tap_runs_once_and_keeps_no_hook(images):
    model = wrap(small())
    outputs = []
    with model.guard(), torch.no_grad(), allow_optimized(model, 100) as optimized:
        with model.tap("2", replace=lambda output: outputs.append(output) or 2 * output) as tap:
            doubled = model(images)
        plain = model(images)
        assert optimized.used
        assert not torch.allclose(doubled, plain)
    assert [len(output) for output in outputs] == [6]  # the tap reads the pass on the images, not the noise
    assert len(tap["2"]) == 6
    for network in (model.module, model._cache.optimized[1]):
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


def test_tap_of_another_model_disables_the_copy(images):
    model, other = wrap(small()), wrap(small())
    with model.guard(), torch.no_grad(), allow_optimized(model, 100) as optimized:
        with other.tap("2"):
            model(images)
        assert not optimized.used


def change_elements(tensor: torch.Tensor, kind: str) -> None:
    if kind == "one":
        tensor[7777] += 1e-6
    elif kind == "odd signs":
        tensor[1::2] *= -1
    elif kind == "two signs":
        tensor[[101, 303]] *= -1
    elif kind == "neighbors":
        tensor[[40_000, 40_001]] = tensor[[40_001, 40_000]]
    else:
        tensor.copy_(tensor.flip(0))


@pytest.mark.parametrize("kind", ["one", "odd signs", "two signs", "neighbors", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_checksum_changes_with_the_values(kind, dtype):
    tensor = torch.randn(100_003, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = checksum(tensor)
    assert checksum(tensor.clone()) == before
    change_elements(tensor, kind if dtype.itemsize > 2 or kind != "one" else "two signs")
    assert checksum(tensor) != before


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (16289,), (2, 16289), (257, 129)])
def test_checksum_of_any_shape(shape):
    tensor = torch.rand(shape)
    assert checksum(tensor) == checksum(tensor.clone())
    if tensor.numel():
        last = tensor.clone()
        last.view(-1)[-1] += 1
        assert checksum(last) != checksum(tensor)


@pytest.mark.parametrize("size", [3, 16289, 100_003])
def test_checksum_is_the_same_on_other_devices(size, monkeypatch):
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(0))
    expected = checksum(tensor)
    # On other devices the words are copied, because they must be aligned there.
    monkeypatch.setattr(digest, "_as_words", lambda data: data.clone().view(torch.int64))
    assert checksum(tensor) == expected


def test_checksum_is_computed_once_in_a_run_until_the_tensor_is_written(monkeypatch):
    computed = []
    plain = digest._checksum
    monkeypatch.setattr(digest, "_checksum", lambda tensor: computed.append(tensor) or plain(tensor))
    tensor = torch.rand(5)
    with allow_optimized(None, 0):
        assert checksum(tensor) == checksum(tensor.view(5)) and len(computed) == 1
        tensor += 1
        assert checksum(tensor) == plain(tensor) and len(computed) == 2
    checksum(tensor)
    assert len(computed) == 3


def test_predicted_target_is_resolved_by_the_images(images):
    model = wrap(small().eval())
    with torch.no_grad():
        predicted = tuple(model(images).argmax(1).tolist())
    assert Predicted().resolve(model, images) == Class(predicted)
    assert Class(2).resolve(model, images) == Class(2)


def test_rewritten_relu_output_may_be_overwritten(images):
    """Autograd saves a ReLU's output and a clamp's input, and so does the rewritten ReLU."""

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
    maps = methods["guided_backprop"](wrap(network), images, 1).maps
    active = network.conv((images - 0.4) / 0.2) > 0
    passed = (network.head.weight[1].clamp(min=0) / 14**2)[None, :, None, None] * active
    expected = torch.nn.functional.conv_transpose2d(passed, network.conv.weight / 0.2)
    torch.testing.assert_close(maps, expected.abs().amax(1).detach())
