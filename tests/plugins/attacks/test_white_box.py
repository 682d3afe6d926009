"""What all white-box attacks promise: each image alone, no work where none is due, an end on any model."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from phosphene import Model, load_model, methods

#: Every attack with parameters that make it short.
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
#: Those that can be told which class is wanted, and how.
TARGETED = [name for name in ATTACKS if "targeted" in methods[f"attacks.{name}"].spec.params.model_fields]
NORMED = [name for name in ATTACKS if "norm" in methods[f"attacks.{name}"].spec.params.model_fields]
every = pytest.mark.parametrize("name", ATTACKS)
#: Every attack with every norm that it knows, None where it knows but one.
WAYS = [
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
    return load_model(module, input_size=(3, 6, 6))


def pictures(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def towards(name: str, model: Model, images: Tensor) -> Tensor:
    """Labels that give the attack something to do."""
    said = model(images).argmax(1)
    return (said + 1) % model.class_count if name == "penalized_target" else said


@every
def test_attack_succeeds_on_a_network_that_has_never_seen_one(name: str) -> None:
    model, images = network(), pictures()
    wide = {"eps": 0.3} if name in ("fgsm", "bim", "pgd", "apgd") else {}
    wide |= {"step_size": 0.1} if name in ("bim", "pgd", "penalized_target") else {}
    found = attack(name, model, images, towards(name, model, images), **wide)
    assert found.success.all()
    assert (found.distance("linf") > 0).all()


@every
def test_images_do_not_depend_on_each_other(name: str) -> None:
    model, images = network(), pictures()
    labels = towards(name, model, images)
    labels[1] = (labels[1] + 2) % 5  # one that needs nothing, or another class
    whole = attack(name, model, images, labels)
    for n in range(4):
        alone = attack(name, model, images[n : n + 1], labels[n : n + 1])
        torch.testing.assert_close(whole.adversarial[n : n + 1], alone.adversarial, rtol=0, atol=1e-9)


@every
def test_image_that_is_where_it_should_be_comes_back_unchanged(name: str) -> None:
    model, images = network(), pictures()
    said = model(images).argmax(1)
    labels = said if name == "penalized_target" else (said + 1) % 5
    found = attack(name, model, images, labels)
    assert torch.equal(found.adversarial, images)
    assert found.success.all()


@pytest.mark.parametrize("name", TARGETED)
def test_wanted_class_is_reached(name: str) -> None:
    model, images = network(), pictures()
    labels = (model(images).argmax(1) + 2) % 5
    wide = {"eps": 0.5} if name in ("fgsm", "bim", "pgd", "apgd") else {}
    wide |= {"step_size": 0.1, "steps": 10} if name in ("bim", "pgd") else {}
    found = attack(name, model, images, labels, targeted=True, **wide)
    assert found.targeted
    assert torch.equal(found.success, found.after == labels)
    assert found.success[:2].all() or name == "fgsm"


@pytest.mark.parametrize("name", TARGETED)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_between_two_classes_away_from_one_is_towards_the_other(name: str, norm: str) -> None:
    model, images = network(classes=2), pictures()
    said = model(images).argmax(1)
    away = attack(name, model, images, said, norm=norm)
    near = attack(name, model, images, 1 - said, norm=norm, targeted=True)
    torch.testing.assert_close(away.adversarial, near.adversarial, rtol=0, atol=1e-9)


@every
@pytest.mark.parametrize("shift", [-100.0, 0.5])
def test_constant_on_all_logits_changes_nothing(name: str, shift: float) -> None:
    model, images = network(), pictures()
    labels = towards(name, model, images)
    plain = attack(name, model, images, labels).adversarial
    model.module[3].bias.data += shift
    torch.testing.assert_close(attack(name, model, images, labels).adversarial, plain, rtol=0, atol=1e-8)


@every
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_flat_model_ends_in_an_honest_failure(name: str, classes: int) -> None:
    model, images = network(classes=classes, gain=0.0), pictures()
    model.module[3].bias.data = torch.arange(classes, 0, -1).double()
    labels = torch.full((4,), int(name == "penalized_target" and classes > 1))
    found = attack(name, model, images, labels)
    assert found.adversarial.isfinite().all()
    assert not found.success.any() or (name == "penalized_target" and classes == 1)


@every
@pytest.mark.parametrize("gain", [1e-30, 1e12])
def test_any_scale_of_the_logits_gives_pixels(name: str, gain: float) -> None:
    model, images = network(gain=gain), pictures()
    model.module[3].bias.data *= gain
    found = attack(name, model, images, towards(name, model, images))
    assert found.adversarial.isfinite().all()
    assert found.adversarial.min() >= 0 and found.adversarial.max() <= 1


class Undefined(nn.Module):
    """Logits or gradients that are no numbers: a root at zero, an overflow, 0 / 0."""

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


@pytest.mark.parametrize(("name", "norm"), WAYS)
@pytest.mark.parametrize("kind", ["root", "overflow", "undefined"])
def test_logits_and_gradients_that_are_no_numbers_leave_pixels(
    name: str, norm: str | None, kind: str
) -> None:
    model, images = load_model(Undefined(kind), input_size=(3, 6, 6)), pictures()
    found = attack(name, model, images, towards(name, model, images), **({"norm": norm} if norm else {}))
    assert found.adversarial.isfinite().all()
    assert found.adversarial.min() >= 0 and found.adversarial.max() <= 1
    assert found.success.sum() == 0 or kind != "undefined" or name == "penalized_target"


@pytest.mark.parametrize("name", ["carlini_wagner", "deepfool", "fab"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_smallest_perturbation_does_not_depend_on_the_scale_of_the_logits(name: str, norm: str) -> None:
    model, images = network(), pictures()
    labels = towards(name, model, images)
    plain = attack(name, model, images, labels, norm=norm).distance(norm)
    model.module[3].weight.data *= 1000
    model.module[3].bias.data *= 1000
    torch.testing.assert_close(
        attack(name, model, images, labels, norm=norm).distance(norm), plain, rtol=1e-6, atol=0
    )
