"""Checks that values are finite: at once, deferred to the end of a call, and where values cannot be read."""

import pytest
import torch
from torch import Tensor, nn

from phosphene import DivergenceError, Model, ModelError, finite_values, load_model, methods
from phosphene.finite_values import (
    NotFiniteError,
    all_finite,
    check_finite,
    contains_non_finite,
    defer_checks,
)


class Network(nn.Module):
    """A network with logits that are ``factors[call]`` times those of a linear layer."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.factors = nn.Linear(3, 4), list(factors)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)).tanh()) * (self.factors.pop(0) if self.factors else 1.0)


def load(network: nn.Module) -> Model:
    """A model of a network in eval mode."""
    return load_model(network.eval(), input_size=(3, 8, 8))


def images() -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Treats the CPU as a device on which a value is read only at the cost of a wait; counts the reads."""
    reads: list[None] = []
    monkeypatch.setattr(finite_values, "_waits", lambda device: True)
    monkeypatch.setattr(finite_values, "_read", lambda flag: reads.append(None) or bool(flag))
    return reads


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_whose_sum_overflows_are_finite(dtype):
    values = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(values) and all_finite(values * torch.tensor([1, -1] * 32, dtype=dtype))
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert not all_finite(values.index_fill(0, torch.tensor(3), bad))
    assert not all_finite(torch.tensor([torch.inf, -torch.inf], dtype=dtype))


def test_tensors_in_containers_and_networks_are_checked():
    bad = torch.tensor([1.0, torch.nan])
    network = nn.Linear(2, 1)
    assert not contains_non_finite([{"a": (torch.ones(2), torch.arange(2), "nan", None)}, network])
    network.bias.data.fill_(torch.inf)
    for value in (bad, [bad], {"a": (1, bad)}, network, {"networks": [network]}):
        assert contains_non_finite(value)


def test_deferred_checks_read_the_first_pass_and_the_end(accelerator):
    model, x = load(Network()), images()
    with defer_checks():
        for _ in range(5):
            model(x)
        assert len(accelerator) == 1
    assert len(accelerator) == 2


@pytest.mark.parametrize("call", [0, 1, 3])
def test_deferred_check_raises_for_any_pass(accelerator, call):
    model, passed = load(Network(*[1.0] * call, torch.nan)), []

    def loop() -> None:
        with defer_checks():
            for _ in range(5):
                model(images())
                passed.append(True)

    with pytest.raises(NotFiniteError, match="logits of module:Network are not finite"):
        loop()
    assert len(passed) == (0 if call == 0 else 5)


def test_method_with_deferred_checks_raises(accelerator):
    labels = load(Network())(images()).argmax(1)
    options = {"eps": 1e-4, "step_size": 1e-5, "steps": 50, "seed": 0}  # too small to succeed: all steps run
    methods["pgd"](load(Network()), images(), labels, **options)
    assert len(accelerator) < 10
    model = load(Network(*[1.0] * 20, torch.nan))
    with pytest.raises(ModelError, match="logits of module:Network are not finite"):
        methods["pgd"](model, images(), labels, **options)


def test_error_in_a_block_is_not_replaced_by_that_of_a_deferred_check(accelerator):
    def fail() -> None:
        with defer_checks():
            for value in (1.0, torch.nan):
                check_finite(torch.tensor([value]), "numbers", lambda: ValueError("not finite"))
            raise KeyError

    with pytest.raises(KeyError):
        fail()


def test_images_that_are_not_finite_are_the_cause_that_is_named():
    model = load(Network())
    with pytest.raises(DivergenceError, match="the images passed to module:Network are not finite"):
        model(images() * torch.nan)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_transforms_tracers_and_devices_without_values_pass():
    model, x = load(Network()), images()
    with model.guard():
        logits = model(x)
        torch.testing.assert_close(torch.vmap(lambda image: model(image[None])[0])(x), logits)
        gradient = torch.func.vmap(torch.func.grad(lambda image: model(image[None])[0, 0]))(x)
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf, create_graph=True)
        torch.testing.assert_close(gradient, expected.detach())
        second = torch.autograd.grad(expected.square().sum(), leaf)[0]
        assert second.isfinite().all() and second.any()
        _, slope = torch.func.jvp(model, (x,), (torch.ones_like(x),))
        assert slope.shape == logits.shape
        traced = torch.jit.trace(lambda images: model(images), x, check_trace=False)
        torch.testing.assert_close(traced(x * 0.5), model(x * 0.5))


def test_check_does_not_change_gradients_or_saved_tensors():
    model, x = load(Network()), images().requires_grad_()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(1) or t, lambda t: t):
        model(x)
        counted = len(saved)
        model._logits(model._run(x))
    assert len(saved) == 2 * counted


def test_result_that_is_not_finite_names_its_field():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))

    class Root(nn.Module):
        """A root of the distance to the image's own mean: its gradient is infinite where they are equal."""

        def forward(self, x: Tensor) -> Tensor:
            return (x - x.detach()).sqrt()

    model = load(nn.Sequential(Root(), *network))
    with pytest.raises(ModelError, match="saliency: maps of the result is not finite; gradients or features"):
        methods["saliency"](model, images(), 0)


def test_network_that_is_changed_to_other_classes_is_refused():
    network = Network()
    model = load(network)
    model(images())
    network.linear = nn.Linear(3, 7)
    with pytest.raises(ModelError, match="returned 7 logits .*, and 4 in an earlier pass"):
        model(images())
    assert load_model(network, input_size=(3, 8, 8))(images()).shape == (2, 7)


def test_training_mode_is_not_checked():
    network = Network(torch.nan, torch.nan).train()
    model = load_model(network, input_size=(3, 8, 8))
    assert model(images()).isnan().all()
    with model.guard(), pytest.raises(NotFiniteError):
        model(images())
