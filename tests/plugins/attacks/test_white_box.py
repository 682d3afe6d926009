"""Promises of all white-box attacks: independent images, success flags, finite results on any model."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from phosphene import Model, ModelError, load_model, methods

#: Every attack with parameters for a short run.
ATTACKS: dict[str, dict[str, Any]] = {
    "fgsm": {},
    "bim": {"steps": 4},
    "pgd": {"steps": 4, "seed": 0},
    "apgd": {"steps": 8, "seed": 0},
    "deepfool": {"steps": 30},
    "carlini_wagner": {"steps": 20, "search_steps": 3},
    "fab": {"steps": 8, "seed": 0},
    "penalized_target": {"steps": 40, "penalty": 1.0},
}
#: The attacks with a parameter ``targeted``, and those with ``norm``.
TARGETED = [name for name in ATTACKS if "targeted" in methods[f"attacks.{name}"].spec.params.model_fields]
NORMED = [name for name in ATTACKS if "norm" in methods[f"attacks.{name}"].spec.params.model_fields]
each_attack = pytest.mark.parametrize("name", ATTACKS)
#: Every attack with every norm that it has, None where it has no such parameter.
SETTINGS = [
    (name, norm)
    for name in ATTACKS
    for norm in (
        get_args(methods[f"attacks.{name}"].spec.params.model_fields["norm"].annotation)
        if name in NORMED
        else [None]
    )
]


def attack(name: str, model: Model, images: Tensor, labels: Tensor, **params: Any) -> Any:
    return methods[f"attacks.{name}"](model, images, labels, **(ATTACKS[name] | params))


def network(classes: int = 5, gain: float = 1.0) -> Model:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, classes)
        ).double()
    module[3].weight.data *= gain
    return load_model(module, input_size=(3, 6, 6), task="classification")


def random_images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def attackable_labels(name: str, model: Model, images: Tensor) -> Tensor:
    """Labels for which the images are not adversarial yet."""
    predictions = model(images).argmax(1)
    return (predictions + 1) % model.class_count if name == "penalized_target" else predictions


@each_attack
def test_succeeds_on_an_undefended_network(name: str) -> None:
    model, images = network(), random_images()
    params = {"eps": 0.3} if name in ("fgsm", "bim", "pgd", "apgd") else {}
    params |= {"step_size": 0.1} if name in ("bim", "pgd", "penalized_target") else {}
    result = attack(name, model, images, attackable_labels(name, model, images), **params)
    assert result.success.all()
    assert (result.distance("linf") > 0).all()


@each_attack
def test_batch_equals_single_images(name: str) -> None:
    model, images = network(), random_images()
    labels = attackable_labels(name, model, images)
    labels[1] = (labels[1] + 2) % 5  # adversarial already, or another target
    complete = attack(name, model, images, labels)
    for n in range(4):
        single = attack(name, model, images[n : n + 1], labels[n : n + 1])
        torch.testing.assert_close(complete.adversarial[n : n + 1], single.adversarial, rtol=0, atol=1e-9)


@each_attack
def test_image_that_is_adversarial_already_is_unchanged(name: str) -> None:
    model, images = network(), random_images()
    predictions = model(images).argmax(1)
    labels = predictions if name == "penalized_target" else (predictions + 1) % 5
    result = attack(name, model, images, labels)
    assert torch.equal(result.adversarial, images)
    assert result.success.all()


@pytest.mark.parametrize("name", TARGETED)
def test_targeted_attack_reaches_the_target(name: str) -> None:
    model, images = network(), random_images()
    labels = (model(images).argmax(1) + 2) % 5
    params = {"eps": 0.5} if name in ("fgsm", "bim", "pgd", "apgd") else {}
    params |= {"step_size": 0.1, "steps": 10} if name in ("bim", "pgd") else {}
    result = attack(name, model, images, labels, targeted=True, **params)
    assert result.targeted
    assert torch.equal(result.success, result.after == labels)
    assert result.success[:2].all() or name == "fgsm"


@pytest.mark.parametrize("name", TARGETED)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_targeted_equals_untargeted_for_two_classes(name: str, norm: str) -> None:
    model, images = network(classes=2), random_images()
    predictions = model(images).argmax(1)
    untargeted = attack(name, model, images, predictions, norm=norm)
    targeted_result = attack(name, model, images, 1 - predictions, norm=norm, targeted=True)
    torch.testing.assert_close(untargeted.adversarial, targeted_result.adversarial, rtol=0, atol=1e-9)


@each_attack
@pytest.mark.parametrize("shift", [-100.0, 0.5])
def test_constant_added_to_the_logits_does_not_matter(name: str, shift: float) -> None:
    model, images = network(), random_images()
    labels = attackable_labels(name, model, images)
    plain = attack(name, model, images, labels).adversarial
    model.module[3].bias.data += shift
    torch.testing.assert_close(attack(name, model, images, labels).adversarial, plain, rtol=0, atol=1e-8)


@each_attack
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_zero_gradient_ends_without_success(name: str, classes: int) -> None:
    model, images = network(classes=classes, gain=0.0), random_images()
    model.module[3].bias.data = torch.arange(classes, 0, -1).double()
    labels = torch.full((4,), int(name == "penalized_target" and classes > 1))
    result = attack(name, model, images, labels)
    assert result.adversarial.isfinite().all()
    assert not result.success.any() or (name == "penalized_target" and classes == 1)


@each_attack
@pytest.mark.parametrize("gain", [1e-30, 1e12])
def test_result_is_finite_for_any_scale_of_the_logits(name: str, gain: float) -> None:
    model, images = network(gain=gain), random_images()
    model.module[3].bias.data *= gain
    result = attack(name, model, images, attackable_labels(name, model, images))
    assert result.adversarial.isfinite().all()
    assert result.adversarial.min() >= 0 and result.adversarial.max() <= 1


class Undefined(nn.Module):
    """Logits or gradients that are NaN or infinite: a root at zero, an overflow, 0 / 0."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.network = kind, network().module

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images)
        match self.kind:
            case "root":
                return logits + 1e-9 * torch.sqrt(torch.relu(images - 0.5)).sum((1, 2, 3))[:, None]
            case "overflow":
                return logits * 1e308 * 10
        return logits * torch.nan


@pytest.mark.parametrize(("name", "norm"), SETTINGS)
def test_result_is_finite_for_nan_gradients(name: str, norm: str | None) -> None:
    model, images = load_model(Undefined("root"), input_size=(3, 6, 6)), random_images()
    result = attack(
        name, model, images, attackable_labels(name, model, images), **({"norm": norm} if norm else {})
    )
    assert result.adversarial.isfinite().all()
    assert result.adversarial.min() >= 0 and result.adversarial.max() <= 1


@each_attack
@pytest.mark.parametrize("kind", ["overflow", "undefined"])
def test_logits_that_are_not_finite_are_refused(name: str, kind: str) -> None:
    model = load_model(Undefined(kind).eval(), input_size=(3, 6, 6))
    with pytest.raises(ModelError, match="logits of module:Undefined are not finite"):
        attack(name, model, random_images(), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("name", ["carlini_wagner", "deepfool", "fab"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_distance_does_not_depend_on_the_scale_of_the_logits(name: str, norm: str) -> None:
    model, images = network(), random_images()
    labels = attackable_labels(name, model, images)
    plain = attack(name, model, images, labels, norm=norm).distance(norm)
    model.module[3].weight.data *= 1000
    model.module[3].bias.data *= 1000
    torch.testing.assert_close(
        attack(name, model, images, labels, norm=norm).distance(norm), plain, rtol=1e-6, atol=0
    )
