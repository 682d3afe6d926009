"""Distillation stops no attack on logits; smooth activations replace ReLUs; trained bounds hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phosphene import (
    InputError,
    ModelError,
    ProgressEvent,
    TensorDataset,
    load_model,
    load_result,
    methods,
    run,
)
from phosphene.testing.observation import count_passes
from phosphene_plugins.defenses.smooth_activations import SmoothActivation, count_relus

distill = methods["defensive_distillation"]
smooth = methods["smooth_activations"]
certify = methods["interval_bounds"]
bounds_fit = methods["interval_bounds_fit"]


def small() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 16), nn.ReLU()
    return nn.Sequential(*body, nn.Linear(16, 2))


@pytest.fixture(scope="module")
def dataset() -> TensorDataset:
    """Two classes: brighter above, or below."""
    labels = torch.arange(120) % 2
    images = 0.5 + 0.2 * torch.randn(120, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 0.5
    images[labels == 0, :, :4] += 0.25
    images[labels == 1, :, 4:] += 0.25
    return TensorDataset(images.clamp(0, 1), [str(label) for label in labels.tolist()])


def build_model(network: nn.Module) -> Any:
    return load_model(network, input_size=(1, 8, 8), mean=[0.6], std=[0.2])


@pytest.mark.parametrize(
    "name", ["defensive_distillation", "smooth_activations", "interval_bounds_fit", "adversarial_training"]
)
def test_oracles(name: str) -> None:
    methods[name].spec.oracle()


TRAININGS = {
    "adversarial_training": {"algorithm": "trades", "attack_steps": 2},
    "defensive_distillation": {},
    "smooth_activations": {},
    "interval_bounds_fit": {},
    "lipschitz_fit": {},
}


@pytest.mark.parametrize("name", ["interval_bounds_fit", "lipschitz_fit", "defensive_distillation"])
def test_images_of_another_size_are_refused(name: str) -> None:
    smaller = TensorDataset(torch.rand(6, 1, 6, 6), ["0", "1"] * 3)
    with pytest.raises(
        InputError, match=r"does not take images of \(1, 6, 6\); its input size is \(1, 8, 8\)"
    ):
        methods[name](build_model(small()), smaller, steps=1, batch=2)


@pytest.mark.parametrize("name", list(TRAININGS))
def test_cost_is_the_number_of_passes(name: str, dataset: TensorDataset) -> None:
    """Exactly, for the most expensive options: labels="predicted" passes the held-out images once more."""
    model = build_model(small())
    model.structure  # noqa: B018  - recorded once, with a pass of its own
    params = methods[name].validate(
        {**TRAININGS[name], "steps": 9, "batch": 2, "labels": "predicted", "held_out": 0.25, "seed": 0}
    )
    with count_passes(model.module) as passes:
        methods[name](model, TensorDataset(dataset.images), **params)
    cost = methods[name].spec.cost
    assert cost is not None
    assert (passes.forward, passes.backward) == cost.evaluate(params, dataset=len(dataset))


def test_distillation_masks_the_gradient_of_probabilities_only(dataset: TensorDataset) -> None:
    plain = trained_normally(dataset)
    student = distill(plain, dataset, temperature=40, steps=150, batch=30, lr=0.02, eps=0.1, seed=0).model()
    images, labels = dataset.images[108:], [int(name) for name in dataset.classes[108:]]  # type: ignore[index]
    weak = {"eps": 0.4, "step_size": 0.1, "steps": 10, "random_start": False}
    before, after = (
        methods["pgd"](m, images, labels, **weak).success.double().mean() for m in (plain, student)
    )
    broken = methods["carlini_wagner"](student, images, labels, steps=60, search_steps=4)
    assert before == 1 and after <= 0.25
    assert broken.success.all()
    assert student(images).abs().max() > 10 * plain(images).abs().max()


def trained_normally(dataset: TensorDataset) -> Any:
    """The small network, trained on the cross-entropy."""
    result = bounds_fit(
        build_model(small()), dataset, eps=1e-6, kappa=1.0, steps=60, batch=30, lr=0.01, seed=0
    )
    return result.model()


def test_completed_teacher_is_not_trained_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataset": "builtin:scenes/8", "steps": 3, "batch": 2, "seed": 1}
    complete = run("defensive_distillation", **options, out=tmp_path / "complete")
    count = 0

    def stop(event: ProgressEvent) -> None:
        nonlocal count
        count += 1
        if count == 4:  # the first step of the student
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("defensive_distillation", **options, out=tmp_path / "cut", progress=stop)
    events: list[ProgressEvent] = []
    resumed = run("defensive_distillation", **options, out=tmp_path / "cut", progress=events.append)
    assert [event.total for event in events] == [2, 2]
    assert torch.equal(complete.losses, resumed.losses)
    for one, other in zip(complete.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_smooth_activations_replace_relus(dataset: TensorDataset) -> None:
    network = small()
    result = smooth(
        build_model(network), dataset, activation="softplus", sharpness=4.0, steps=2, batch=4, seed=0
    )
    types = [type(part) for part in result.network]
    assert types[1] is types[4] is SmoothActivation and result.note == "2 ReLUs are softplus now"
    assert (
        count_relus(result.model(), dataset.images[:1]) == 0
        and count_relus(build_model(network), dataset.images[:1]) == 2
    )
    assert type(network[1]) is nn.ReLU
    sharp = smooth(
        build_model(network), dataset, activation="gelu", sharpness=1000, steps=1, batch=4, lr=1e-9
    )
    torch.testing.assert_close(
        sharp.model()(dataset.images), build_model(network)(dataset.images), atol=1e-2, rtol=0
    )


def test_smooth_network_loads_and_is_trained_adversarially(tmp_path: Path) -> None:
    quick: dict[str, Any] = {"dataset": "builtin:scenes/8", "steps": 1, "batch": 2, "seed": 0}
    result = run("smooth_activations", **quick, out=tmp_path / "smooth")
    loaded = load_model(f"trained:{tmp_path / 'smooth'}")
    assert loaded.digest == result.model().digest
    assert sum(isinstance(part, SmoothActivation) for part in loaded.module.modules()) == 8
    run("adversarial_training", model=loaded, **quick, attack_steps=1, out=tmp_path / "robust")
    robust = load_model(f"trained:{tmp_path / 'robust'}")
    assert sum(isinstance(part, SmoothActivation) for part in robust.module.modules()) == 8
    assert load_result(tmp_path / "robust").model().digest == robust.digest


def test_functional_relus_are_refused(dataset: TensorDataset) -> None:
    class FunctionalReLU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).relu()

    with pytest.raises(ModelError, match="1 ReLUs that are no nn.ReLU modules"):
        smooth(build_model(FunctionalReLU()), dataset, steps=1, batch=2)
    with pytest.raises(ModelError, match="no nn.ReLU"):
        smooth(build_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 2))), dataset, steps=1, batch=2)


def test_training_certifies_and_no_attack_succeeds_inside(dataset: TensorDataset) -> None:
    eps = 0.06
    plain = trained_normally(dataset)
    result = bounds_fit(plain, dataset, eps=eps, steps=120, batch=30, lr=0.01, seed=0)
    proven, clean, robust = (result.curves[name] for name in ("proven", "clean", "under PGD-10"))
    assert proven[0] <= 0.5 and proven[-1] > 0.8
    assert bool((proven <= robust).all()) and bool((robust <= clean).all())
    images, labels = dataset.images[:60], [int(name) for name in dataset.classes[:60]]  # type: ignore[index]
    trained = result.model()
    is_certified = certify(trained, images, eps=eps, halvings=0).radius >= eps * (1 - 1e-6)
    assert is_certified.double().mean() > 0.8
    for attack in ("pgd", "apgd", "square"):
        options = {"max_queries": 200} if attack == "square" else {"steps": 30}
        attacked = methods[attack](trained, images, labels, eps=eps, seed=0, **options)
        correct = trained(images).argmax(1) == torch.tensor(labels)
        assert not (attacked.success & is_certified & correct).any(), attack
