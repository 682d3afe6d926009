"""The optimized copy: the same logits faster, never those of other weights, without side effects."""

import threading

import pytest
import torch
from torch import nn
from torchvision import models

from phosphene import Model, load_model, methods
from phosphene.data import SceneDataset
from phosphene.models import optimized_copy
from phosphene.models.optimized_copy import allow_optimized


def randomize_norms(network: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms as after training, with statistics and weights other than 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor, low, high in (
                (part.running_mean, -0.2, 0.2), (part.running_var, 0.5, 1.5),
                (part.weight.data, 0.5, 1.5), (part.bias.data, -0.2, 0.2),
            ):  # fmt: skip
                tensor.uniform_(low, high, generator=generator)
    return network


def small(between: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), between or nn.LeakyReLU(0.1)]
    return randomize_norms(nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)))


def wrap(network: nn.Module, side: int = 16) -> Model:
    return load_model(network.double(), input_size=(3, side, side), mean=[0.4] * 3, std=[0.2] * 3)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def run_with_and_without_copy(
    monkeypatch: pytest.MonkeyPatch, name: str, *inputs: object, **params: object
) -> tuple:
    """A method's results with the optimized copy and without."""
    with_copy = methods[name](*inputs, **params)
    with monkeypatch.context() as patch:
        patch.setattr(optimized_copy, "MIN_PASSES", 10**9)
        without = methods[name](*inputs, **params)
    assert not without.provenance.model["optimized_copy"]
    return with_copy, without


@pytest.mark.parametrize(
    ("name", "folded"), [("resnet18", 20), ("mobilenet_v2", 52), ("densenet121", 59), ("googlenet", 57)]
)
def test_methods_return_the_same_with_and_without_the_copy(name, folded, monkeypatch):
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    network = randomize_norms(models.get_model(name, weights=None, **options))
    images = torch.rand(5, 3, 96, 96)
    single = load_model(network, input_size=(3, 96, 96))
    assert len(single.structure.folds) == folded  # DenseNet's other batch norms stand before convolutions
    with single.guard(), torch.no_grad(), allow_optimized(single, 100) as optimized:
        torch.testing.assert_close(single(images), network(images), rtol=1e-4, atol=1e-4)
        assert optimized.used
    # In double precision, so that no ReLU at its kink falls on the other side by rounding.
    model, images = wrap(network, 96), images.double()
    copy_maps, maps = run_with_and_without_copy(monkeypatch, "saliency", model, images, 3)
    assert copy_maps.provenance.model["optimized_copy"]
    torch.testing.assert_close(copy_maps.maps, maps.maps, rtol=1e-8, atol=1e-10)
    for norm in ("linf", "l2"):
        attack = {"steps": 2, "norm": norm, "eps": 0.5, "seed": 1}
        copy_result, result = run_with_and_without_copy(
            monkeypatch, "pgd", model, images[:2], torch.tensor([1, 2]), **attack
        )
        assert copy_result.provenance.model["optimized_copy"]
        torch.testing.assert_close(copy_result.adversarial, result.adversarial, rtol=0, atol=1e-8)


def train(network: nn.Sequential) -> None:
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    network(torch.rand(4, 3, 16, 16, dtype=torch.float64)).square().sum().backward()
    optimizer.step()


def change_in_place(network: nn.Sequential) -> None:
    with torch.no_grad():
        network[0].weight[2] = 0


def change_through_data(network: nn.Sequential) -> None:
    network[0].weight.data[2] = 0


def replace_layer(network: nn.Sequential) -> None:
    network[2] = nn.ReLU()


def set_attribute(network: nn.Sequential) -> None:
    network[2].negative_slope = 0.5


def permute_through_data(network: nn.Sequential) -> None:
    network[0].weight.data.copy_(network[0].weight.data.flip(1))  # the same values in another order


def change_stride(network: nn.Sequential) -> None:
    network[0].stride = (3, 3)


def change_list_element(network: nn.Sequential) -> None:
    network[2].scale[0] = 2.0  # in a list, which torch does not register


def change_tensor_attribute(network: nn.Sequential) -> None:
    network[2].factor.mul_(2)


def replace_function(network: nn.Sequential) -> None:
    network[2].function = torch.tanh


def replace_forward(network: nn.Sequential) -> None:
    network.forward = lambda x: nn.Sequential.forward(network, x) ** 2


def load_weights(network: nn.Sequential) -> None:
    network.load_state_dict(randomize_norms(small(Settings()).double(), seed=5).state_dict())


class Settings(nn.LeakyReLU):
    """An activation with settings of every kind."""

    def __init__(self) -> None:
        super().__init__(0.1)
        self.scale, self.factor, self.function = [1.0], torch.tensor(1.0), torch.sigmoid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(super().forward(x)) * self.scale[0] * self.factor


@pytest.mark.parametrize(
    "change",
    [
        train, change_in_place, change_through_data, permute_through_data, replace_layer,
        set_attribute, change_stride, change_list_element, change_tensor_attribute, replace_function,
        replace_forward, load_weights,
    ],
)  # fmt: skip
def test_optimized_copy_is_never_stale(change, images, monkeypatch):
    network = small(Settings())
    model = wrap(network)
    before, _ = run_with_and_without_copy(monkeypatch, "saliency", model, images, 1)
    original_state = [tensor.clone() for tensor in network.state_dict().values()]
    change(network)
    after, right = run_with_and_without_copy(monkeypatch, "saliency", model, images, 1)
    assert before.provenance.model["optimized_copy"] and after.provenance.model["optimized_copy"]
    torch.testing.assert_close(after.maps, right.maps, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(after.maps, before.maps, rtol=1e-3)
    same_weights = all(map(torch.equal, original_state, network.state_dict().values()))
    assert (before.provenance.model["digest"] == after.provenance.model["digest"]) == same_weights


def test_optimized_copy_follows_weights_that_change_during_a_run(images):
    network = small()
    model = wrap(network)
    with model.guard(), torch.no_grad(), allow_optimized(model, 100) as optimized:
        for _ in range(3):
            torch.testing.assert_close(model(images), model._logits(network(model.normalize(images))))
            network[0].weight[1] *= 2
    assert optimized.used


def test_layers_and_weights_are_those_of_the_original(images):
    network = small()
    model = wrap(network)
    weight = network[0].weight.detach().clone()
    with model.guard(), torch.no_grad(), allow_optimized(model, 100) as optimized:
        logits = model(images)
        assert optimized.used
        maps = network[0](model.normalize(images))
        assert torch.equal(model.features(images, "0"), maps)
        with model.tap("0", "1") as tap:
            torch.testing.assert_close(model(images), logits)
        assert torch.equal(tap["0"], maps)
        assert torch.equal(tap["1"], network[1](maps))
    assert torch.equal(model.layers["0"].weight, weight)
    assert type(model.module[1]) is nn.BatchNorm2d
    assert all(part.training for part in network.modules())
    assert all(p.requires_grad for p in network.parameters())


class Shared(nn.Module):
    """A convolution whose output is needed twice, one that runs twice, and a batch norm that does."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.again, self.other = (nn.Conv2d(n, 6, 3, padding=1) for n in (3, 6, 6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(x)
        x = x + self.norms[0](x)
        x = self.norms[1](self.again(self.again(x)))
        x = self.norms[2](self.norms[2](self.other(x)))
        return self.head(x.mean((2, 3)))


def test_network_without_batch_norms_becomes_channels_last(monkeypatch):
    model = load_model("builtin:shapes-vgg", dtype=torch.float64)
    images = SceneDataset(5, size=(24, 24)).read(range(5))
    assert model.structure.folds == ()
    with_copy, without = run_with_and_without_copy(monkeypatch, "saliency", model, images, 3)
    assert with_copy.provenance.model["optimized_copy"]
    assert model._cache.optimized[1].features[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model.module.features[0].weight.is_contiguous()
    torch.testing.assert_close(with_copy.maps, without.maps, rtol=1e-8, atol=1e-10)


def test_outputs_that_are_used_twice_are_not_folded():
    assert wrap(randomize_norms(Shared())).structure.folds == ()


class ReadingNormWeight(nn.Module):
    """It reads its batch norm's weight, which a folded one does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = small()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts(x) * self.parts[1].weight.sum()


def add_hook(network: nn.Module) -> nn.Module:
    network[2].register_forward_hook(lambda module, args, output: output * 2)
    return network


@pytest.mark.parametrize(
    ("network", "count"),
    [(small, 4), (lambda: small()[2:4], 6), (lambda: add_hook(small()), 6), (ReadingNormWeight, 6)],
    ids=["too few images", "nothing to fold", "a hook of the user", "reads a folded norm"],
)
def test_no_copy_where_it_costs_more_than_it_saves_or_is_impossible(network, count, images, monkeypatch):
    model = wrap(network())
    result = methods["saliency"](model, images[:count], lambda out: out.flatten(1).square().sum(1))
    assert not result.provenance.model["optimized_copy"]
    assert model._cache.optimized[1] is None


class StoringOutput(nn.Module):
    """It stores its last output in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.last_logits = small(), torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.parts(x)
        self.last_logits = logits.detach()
        return logits


def test_network_that_stores_outputs_runs_itself(images):
    network = StoringOutput()
    model = wrap(network)
    with torch.no_grad():
        model(images)
    with model.guard(), torch.no_grad(), allow_optimized(model, 100) as optimized:
        for batch in (images, 1 - images):
            logits = model(batch)
            assert torch.equal(network.last_logits, logits)
    assert not optimized.used


class Noisy(nn.Module):
    """It draws random numbers in every call, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = small()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts(x + 0.1 * torch.randn_like(x))


def test_random_network_draws_the_same_numbers_with_and_without_a_copy(images):
    model = wrap(Noisy())
    first, second = (methods["pgd"](model, images, torch.zeros(6, dtype=torch.long), seed=0) for _ in "ab")
    assert torch.equal(first.adversarial, second.adversarial)
    assert torch.equal(first.confidence_before, second.confidence_before)
    assert torch.equal(first.confidence_after, second.confidence_after)


def test_threads_share_an_optimized_copy(images):
    model = wrap(small())
    results: list[torch.Tensor] = []

    def work() -> None:
        for _ in range(5):
            results.append(methods["saliency"](model, images, 1).maps)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    assert all(torch.equal(maps, results[0]) for maps in results)
    assert model.module.training
