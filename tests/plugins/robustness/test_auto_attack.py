"""AutoAttack: exact on linear models, no weaker than its attacks, with flags for doubtful results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from phosphene import Model, load_model, max_batch, methods
from phosphene.testing.observation import count_passes

auto_attack = methods["robustness.auto_attack"]
SIZE = (3, 6, 6)


class SmallNetwork(nn.Module):
    """A small network with a function before and one after it."""

    def __init__(
        self,
        classes: int = 5,
        preprocess: Callable[[Tensor], Tensor] = lambda x: x,
        postprocess: Callable[[Tensor], Tensor] = lambda z: z,
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten())
        self.head = nn.Linear(8 * 36, classes)
        self.preprocess, self.postprocess = preprocess, postprocess

    def forward(self, x: Tensor) -> Tensor:
        return self.postprocess(self.head(self.body(self.preprocess(x))))


def build_model(classes: int = 5, **changes: Callable[[Tensor], Tensor]) -> Model:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = SmallNetwork(classes, **changes).double()
    return load_model(module, input_size=SIZE, task="classification")


def random_images(count: int = 6) -> Tensor:
    return torch.rand(count, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def predict(model: Model, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(1)


def test_plain_model_at_full_effort_has_no_flags() -> None:
    model, images = build_model(), random_images()
    result = auto_attack(model, images, predict(model, images), eps=0.2, seed=0)
    assert result.success.all()
    assert result.flags() == {}
    assert {*result.broken_by} == {"apgd-ce"}
    assert result.lines()[0] == "robust accuracy 0.0% (0 of 6), 100.0% before any attack; apgd-ce broke 6"


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.3), ("l1", 1.5)])
def test_no_weaker_than_its_attacks(norm: str, eps: float) -> None:
    model, images = build_model(), random_images(8)
    labels = predict(model, images)
    ensemble = auto_attack(model, images, labels, eps=eps, norm=norm, effort=0.05, seed=0)
    assert 0 < ensemble.success.sum() < 8
    ball = {"eps": eps, "norm": norm, "seed": 0}
    for name, params in (("apgd", {"steps": 5}), ("square", {"max_queries": 250})):
        single = methods[f"attacks.{name}"](model, images, labels, **ball, **params)
        assert ensemble.success[single.success].all()
    fab = methods["attacks.fab"](model, images, labels, norm=norm, steps=5, target_classes=9, seed=0)
    assert ensemble.success[fab.success & (fab.distance(norm) <= eps)].all()
    assert [by == "" for by in ensemble.broken_by] == (~ensemble.success).tolist()
    assert torch.equal(ensemble.adversarial[~ensemble.success], images[~ensemble.success])
    assert ensemble.robust_accuracy == pytest.approx(1 - float(ensemble.success.double().mean()))


def test_later_attacks_run_only_on_unbroken_images() -> None:
    model, images = build_model(), random_images()
    labels = predict(model, images)
    model.structure  # noqa: B018  - recorded once, with a pass of its own
    with count_passes(model.module) as passes:
        auto_attack(model, images, labels, eps=0.9, seed=0)
    # Two checks, one attack with a prediction before and after it, and the final predictions.
    assert passes.forward < 6 * 20


@pytest.mark.parametrize("shift", [1, 0])
def test_misclassified_images_are_not_attacked_and_flagged_if_all_are(shift: int) -> None:
    model, images = build_model(), random_images()
    labels = (predict(model, images) + 1) % 5
    if not shift:  # one correct image
        labels[0] = (labels[0] + 4) % 5
    with max_batch(2):  # for any batch size
        result = auto_attack(model, images, labels, effort=0.02, seed=0)
    assert ("labels" in result.flags()) == bool(shift)
    assert result.broken_by.count("clean") == 6 - (not shift)
    wrong = torch.tensor([by == "clean" for by in result.broken_by])
    assert torch.equal(result.adversarial[wrong], images[wrong])
    assert result.clean_accuracy == pytest.approx(0 if shift else 1 / 6)


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_few_classes_are_attacked_and_flagged(classes: int) -> None:
    model, images = build_model(classes), random_images()
    result = auto_attack(model, images, predict(model, images), eps=0.3, effort=0.1, seed=0)
    assert "few classes" in result.flags()
    assert result.success.all() == (classes > 1)
    assert result.adversarial.isfinite().all()


def test_random_logits_are_flagged() -> None:
    model = build_model(postprocess=lambda z: z + 0.01 * torch.randn_like(z))
    images = random_images()
    result = auto_attack(model, images, predict(model, images), effort=0.01, seed=0)
    assert "random" in result.flags() and "eot_samples" in result.flags()["random"]


def test_probabilities_instead_of_logits_are_flagged() -> None:
    model, images = build_model(postprocess=lambda z: (3 * z).softmax(1)), random_images()
    result = auto_attack(model, images, predict(model, images), effort=0.01, seed=0)
    assert "probabilities" in result.flags()
    assert (
        "probabilities" not in auto_attack(build_model(), images, predict(model, images), effort=0.01).flags()
    )


def test_masked_gradients_are_flagged_and_square_succeeds() -> None:
    """Pixels are rounded to ten levels, and the gradient of that is zero."""
    model = build_model(preprocess=lambda x: (x * 9).round() / 9 + 0 * x)
    images = random_images()
    result = auto_attack(model, images, predict(model, images), eps=0.15, effort=0.1, seed=0)
    assert {"no gradient", "square"} <= result.flags().keys()
    assert "square" in result.broken_by
    assert ["square" in names for names in result.warnings] == [by == "square" for by in result.broken_by]


def test_saturated_cross_entropy_is_flagged_and_apgd_t_succeeds() -> None:
    model, images = build_model(postprocess=lambda z: 1e6 * z), random_images()
    labels = predict(model, images)
    result = auto_attack(model, images, labels, eps=0.1, effort=0.05, seed=0)
    assert "no gradient" in result.flags()
    plain = auto_attack(build_model(), images, labels, eps=0.1, effort=0.05, seed=0)
    assert torch.equal(result.success, plain.success)
    assert "apgd-t" in result.broken_by


def test_reduced_effort_is_flagged() -> None:
    model, images = build_model(), random_images(2)
    assert "effort" in auto_attack(model, images, predict(model, images), effort=0.5, eps=0.9, seed=0).flags()
    assert "effort" not in auto_attack(model, images, predict(model, images), eps=0.9, seed=0).flags()
