"""AutoAttack: exact on linear models, no weaker than its parts, and outspoken about what looks wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from phosphene import Model, load_model, max_batch, methods
from phosphene.testing.observation import traffic

auto_attack = methods["robustness.auto_attack"]
SIZE = (3, 6, 6)


class Built(nn.Module):
    """A small network, with something done to what goes in and to what comes out."""

    def __init__(
        self,
        classes: int = 5,
        given: Callable[[Tensor], Tensor] = lambda x: x,
        made: Callable[[Tensor], Tensor] = lambda z: z,
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten())
        self.head = nn.Linear(8 * 36, classes)
        self.given, self.made = given, made

    def forward(self, x: Tensor) -> Tensor:
        return self.made(self.head(self.body(self.given(x))))


def built(classes: int = 5, **changes: Callable[[Tensor], Tensor]) -> Model:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = Built(classes, **changes).double()
    return load_model(module, input_size=SIZE)


def pictures(count: int = 6) -> Tensor:
    return torch.rand(count, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def said(model: Model, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(1)


def test_honest_model_under_the_whole_standard_raises_no_flag() -> None:
    model, images = built(), pictures()
    found = auto_attack(model, images, said(model, images), eps=0.2, seed=0)
    assert found.success.all()
    assert found.flags() == {}
    assert {*found.broken_by} == {"apgd-ce"}
    assert found.lines()[0] == "robust accuracy 0.0% (0 of 6), 100.0% before any attack; apgd-ce broke 6"


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.3), ("l1", 1.5)])
def test_no_weaker_than_its_parts(norm: str, eps: float) -> None:
    model, images = built(), pictures(8)
    labels = said(model, images)
    whole = auto_attack(model, images, labels, eps=eps, norm=norm, effort=0.05, seed=0)
    assert 0 < whole.success.sum() < 8
    ball = {"eps": eps, "norm": norm, "seed": 0}
    for name, params in (("apgd", {"steps": 5}), ("square", {"max_queries": 250})):
        part = methods[f"attacks.{name}"](model, images, labels, **ball, **params)
        assert whole.success[part.success].all()
    near = methods["attacks.fab"](model, images, labels, norm=norm, steps=5, target_classes=9, seed=0)
    assert whole.success[near.success & (near.distance(norm) <= eps)].all()
    assert [by == "" for by in whole.broken_by] == (~whole.success).tolist()
    assert torch.equal(whole.adversarial[~whole.success], images[~whole.success])
    assert whole.robust_accuracy == pytest.approx(1 - float(whole.success.double().mean()))


def test_later_attacks_see_only_what_the_earlier_left_standing() -> None:
    model, images = built(), pictures()
    labels = said(model, images)
    model.structure  # noqa: B018  - recorded once, with a pass of its own
    with traffic(model.module) as seen:
        auto_attack(model, images, labels, eps=0.9, seed=0)
    # Twice looked at, once attacked with a look before and one after, and judged.
    assert seen.forward < 6 * 20


@pytest.mark.parametrize("shift", [1, 0])
def test_all_wrong_from_the_outset_is_said_and_nothing_is_attacked(shift: int) -> None:
    model, images = built(), pictures()
    labels = (said(model, images) + 1) % 5
    if not shift:  # one that is right
        labels[0] = (labels[0] + 4) % 5
    with max_batch(2):  # and whatever goes through at once
        found = auto_attack(model, images, labels, effort=0.02, seed=0)
    assert ("labels" in found.flags()) == bool(shift)
    assert found.broken_by.count("clean") == 6 - (not shift)
    wrong = torch.tensor([by == "clean" for by in found.broken_by])
    assert torch.equal(found.adversarial[wrong], images[wrong])
    assert found.clean_accuracy == pytest.approx(0 if shift else 1 / 6)


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_few_classes_are_attacked_all_the_same_and_named(classes: int) -> None:
    model, images = built(classes), pictures()
    found = auto_attack(model, images, said(model, images), eps=0.3, effort=0.1, seed=0)
    assert "few classes" in found.flags()
    assert found.success.all() == (classes > 1)
    assert found.adversarial.isfinite().all()


def test_random_answers_are_named() -> None:
    model = built(made=lambda z: z + 0.01 * torch.randn_like(z))
    images = pictures()
    found = auto_attack(model, images, said(model, images), effort=0.01, seed=0)
    assert "random" in found.flags() and "eot" in found.flags()["random"]


def test_probabilities_in_the_place_of_logits_are_named() -> None:
    model, images = built(made=lambda z: (3 * z).softmax(1)), pictures()
    found = auto_attack(model, images, said(model, images), effort=0.01, seed=0)
    assert "probabilities" in found.flags()
    assert "probabilities" not in auto_attack(built(), images, said(model, images), effort=0.01).flags()


def test_masked_gradients_are_named_and_square_gets_past_them() -> None:
    """Pixels are rounded to ten levels, and the gradient of that is zero."""
    model = built(given=lambda x: (x * 9).round() / 9 + 0 * x)
    images = pictures()
    found = auto_attack(model, images, said(model, images), eps=0.15, effort=0.1, seed=0)
    assert {"no gradient", "square"} <= found.flags().keys()
    assert "square" in found.broken_by
    assert ["square" in names for names in found.warnings] == [by == "square" for by in found.broken_by]


def test_logits_so_large_that_the_cross_entropy_is_flat_are_named_and_no_hindrance() -> None:
    model, images = built(made=lambda z: 1e6 * z), pictures()
    labels = said(model, images)
    found = auto_attack(model, images, labels, eps=0.1, effort=0.05, seed=0)
    assert "no gradient" in found.flags()
    plain = auto_attack(built(), images, labels, eps=0.1, effort=0.05, seed=0)
    assert torch.equal(found.success, plain.success)
    assert "apgd-t" in found.broken_by


def test_what_is_less_than_the_standard_says_so() -> None:
    model, images = built(), pictures(2)
    assert "effort" in auto_attack(model, images, said(model, images), effort=0.5, eps=0.9, seed=0).flags()
    assert "effort" not in auto_attack(model, images, said(model, images), eps=0.9, seed=0).flags()
