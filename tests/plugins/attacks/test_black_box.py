"""Black-box attacks: predicted classes suffice, queries are counted exactly, images are independent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phosphene import InputError, Model, ModelError, load_model, methods, run
from phosphene.models.batch_size import max_batch

SETTINGS: dict[str, dict[str, Any]] = {
    "hop_skip_jump l2": {"norm": "l2"},
    "hop_skip_jump linf": {"norm": "linf"},
    "boundary": {},
    "square linf": {"norm": "linf", "eps": 0.1},
    "square l2": {"norm": "l2", "eps": 0.7},
    "square l1": {"norm": "l1", "eps": 5.0},
}
each_attack = pytest.mark.parametrize("setting", SETTINGS)
each_decision_attack = pytest.mark.parametrize(
    "setting", [setting for setting in SETTINGS if "square" not in setting]
)
SIZE = (3, 6, 6)
WEIGHT = torch.randn(4, 108, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 10


def attack(setting: str, model: Model, images: Tensor, labels: Tensor, **params: Any) -> Any:
    return methods[f"attacks.{setting.split()[0]}"](
        model, images, labels, **{"seed": 0, **SETTINGS[setting], **params}
    )


def label(images: Tensor) -> Tensor:
    return ((images.double() - 0.5).flatten(1) @ WEIGHT.T).argmax(1)


class Counted:
    """A function without gradients that returns NumPy labels and counts its inputs."""

    def __init__(self) -> None:
        self.inputs = 0

    def __call__(self, images: Tensor) -> Any:
        self.inputs += len(images)
        return np.asarray(label(torch.from_numpy(images.numpy())))


def black_box(function: Callable[[Tensor], Any]) -> Model:
    return load_model(function, input_size=SIZE, classes=["a", "b", "c", "d"])


def linear() -> Model:
    layer = nn.Linear(108, 4).double()
    layer.weight.data, layer.bias.data = WEIGHT.clone(), -WEIGHT.sum(1) / 2
    return load_model(nn.Sequential(nn.Flatten(), layer), input_size=SIZE)


def random_images(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    pixels = torch.rand(count, *SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (pixels * 1.4 - 0.2).clamp(0, 1).to(dtype)


@each_attack
@pytest.mark.parametrize("most", [1, 2, 7, 60, 400])
def test_queries_equal_the_inputs_and_stay_within_the_budget(setting: str, most: int) -> None:
    function, images = Counted(), random_images(3)
    labels = label(images)
    labels[1] = (labels[1] + 1) % 4  # misclassified without an attack
    result = attack(setting, black_box(function), images, labels, max_queries=most)
    assert function.inputs == int(result.queries.sum())
    assert 1 <= result.queries.min() <= result.queries.max() <= most
    assert result.queries[1] == 1
    assert torch.equal(result.adversarial[1], images[1])
    one = Counted()
    single = attack(setting, black_box(one), images[:1], labels[:1], max_queries=most)
    assert one.inputs == int(single.queries) == int(result.queries[0])


@each_decision_attack
def test_labels_suffice_and_success_equals_the_prediction(setting: str) -> None:
    images = random_images(5)
    labels = label(images)
    result = attack(setting, black_box(Counted()), images, labels, max_queries=600)
    assert result.success.all()
    assert torch.equal(result.after, label(result.adversarial))
    assert not result.after.eq(labels).any()
    assert result.confidence_before.eq(1).all()
    assert result.adversarial.min() >= 0 and result.adversarial.max() <= 1
    assert f"{int(result.queries[0])} queries" in result.panels()[0][2].title


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_hop_skip_jump_comes_within_fifteen_percent_of_the_nearest_boundary(norm: str) -> None:
    images = 0.5 + 0.02 * torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(5))
    logits = (images.double() - 0.5).flatten(1) @ WEIGHT.T
    labels = logits.argmax(1)
    class_distances = (WEIGHT[labels][:, None] - WEIGHT).norm(2 if norm == "l2" else 1, dim=2)
    boundary_distances = (logits.gather(1, labels[:, None]) - logits) / class_distances
    nearest = boundary_distances.scatter(1, labels[:, None], torch.inf).amin(1)
    result = attack(f"hop_skip_jump {norm}", black_box(label), images, labels, steps=25, max_queries=20_000)
    ratio = result.distance(norm) / nearest
    assert ratio.min() >= 1 - 1e-4
    assert ratio.median() <= 1.15


@each_attack
def test_batch_equals_single_images_for_any_batch_size(setting: str) -> None:
    model, images = linear(), random_images(3, 1, torch.float64)
    labels = label(images)
    together = attack(setting, model, images, labels, max_queries=150)
    with max_batch(2):
        batched = attack(setting, model, images, labels, max_queries=150)
    torch.testing.assert_close(batched.adversarial, together.adversarial)
    for n in range(3):
        single = attack(setting, model, images[n : n + 1], labels[n : n + 1], max_queries=150)
        torch.testing.assert_close(single.adversarial[0], together.adversarial[n])


@each_attack
def test_constant_added_to_the_logits_does_not_matter(setting: str) -> None:
    model, images = linear(), random_images(2, 2, torch.float64)
    plain = attack(setting, model, images, label(images), max_queries=120).adversarial
    model.module[1].bias.data += 8.0
    shifted = attack(setting, model, images, label(images), max_queries=120).adversarial
    torch.testing.assert_close(shifted, plain)


@each_attack
def test_constant_prediction_ends_without_success(setting: str) -> None:
    function = black_box(lambda inputs: torch.zeros(len(inputs), dtype=torch.long))
    images = random_images(2)
    result = attack(setting, function, images, torch.tensor([0, 0]), max_queries=300)
    assert not result.success.any()
    assert result.adversarial.isfinite().all()
    if "square" not in setting:
        assert torch.equal(result.adversarial, images)
    assert result.png()


@each_decision_attack
def test_targeted_search_starts_at_the_start_image(setting: str) -> None:
    many = random_images(60, 7)
    images = many[:2]
    targets = (label(images) + 1) % 4
    start = torch.stack([many[(label(many) == int(k)).nonzero()[0, 0]] for k in targets])
    result = attack(
        setting, black_box(Counted()), images, targets, targeted=True, start=start, max_queries=500
    )
    assert result.success.all()
    assert torch.equal(label(result.adversarial), targets)
    assert (result.distance("l2") < 0.8 * (start - images).flatten(1).norm(dim=1)).all()


@each_attack
def test_targeted_equals_untargeted_for_two_classes(setting: str) -> None:
    def two(inputs: Tensor) -> Tensor:
        return (inputs.double() - 0.5).flatten(1) @ WEIGHT[:2].T

    model, images = load_model(two, input_size=SIZE, classes=["no", "yes"]), random_images(2)
    predictions = two(images).argmax(1)
    untargeted = attack(setting, model, images, predictions, max_queries=200)
    targeted_result = attack(setting, model, images, 1 - predictions, targeted=True, max_queries=200)
    assert not torch.equal(untargeted.adversarial, images)
    assert torch.equal(untargeted.adversarial, targeted_result.adversarial)


def test_start_is_repeated_for_all_images_and_checked() -> None:
    result = run(
        "hop_skip_jump", images="builtin:scenes/2", start="builtin:scenes/1", labels=[3, 3], targeted=True,
        max_queries=30, seed=0, progress=False,
    )  # fmt: skip
    assert result.inputs["start"].shape == result.images.shape
    with pytest.raises(InputError, match="start images must have the images' shape"):
        attack(
            "boundary",
            black_box(label),
            random_images(2),
            torch.tensor([0, 0]),
            start=random_images(2)[..., 1:],
        )
    with pytest.raises(InputError, match="needs one image to start from, or 2, not 3"):
        attack("boundary", black_box(label), random_images(2), torch.tensor([0, 0]), start=random_images(3))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    setting=st.sampled_from(["square linf", "square l2", "square l1"]),
    eps=st.floats(1e-6, 30),
    targeted=st.booleans(),
    initial_area=st.floats(0.001, 1),
)
def test_square_result_is_in_the_ball_and_in_the_pixel_range(
    seed: int, setting: str, eps: float, targeted: bool, initial_area: float
) -> None:
    images, params = (
        random_images(3, seed, torch.float64),
        {"eps": eps, "targeted": targeted, "initial_area": initial_area},
    )
    result = attack(setting, linear(), images, torch.tensor([0, 1, 2]), seed=seed, max_queries=25, **params)
    assert result.adversarial.min() >= 0 and result.adversarial.max() <= 1
    norm = SETTINGS[setting]["norm"]
    assert result.distance(norm).max() <= eps * (1 + 1e-12)
    assert torch.equal(result.after, linear()(result.adversarial).argmax(1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_lowers_the_margin_with_more_queries(norm: str) -> None:
    model, images = linear(), random_images(6, 3, torch.float64)
    labels, margins = label(images), []
    for most in (2, 40, 400):
        result = attack(f"square {norm}", model, images, labels, eps=0.02, max_queries=most)
        logits = model(result.adversarial).detach()
        own = logits.gather(1, labels[:, None])
        margins.append(float((own - logits.scatter(1, labels[:, None], -torch.inf).amax(1, True)).mean()))
    assert margins[0] > margins[1] > margins[2]


@pytest.mark.parametrize("name", ["pgd", "bim", "fgsm", "saliency"])
def test_gradient_methods_refuse_a_function_that_returns_labels(name: str) -> None:
    function = Counted()
    arguments = [torch.tensor([0])] if name != "saliency" else []
    with pytest.raises(ModelError, match="no gradient|labels alone|lets no gradient through"):
        methods[name](black_box(function), random_images(1), *arguments)
    assert function.inputs <= 1  # one pass may read the type of the output


def test_gradient_methods_accept_a_differentiable_function() -> None:
    model = linear()
    function_model = load_model(
        lambda inputs: model(inputs.double()), input_size=SIZE, classes=["a", "b", "c", "d"]
    )
    images = random_images(2)
    result = methods["pgd"](function_model, images, label(images), eps=0.3, step_size=0.1, seed=0)
    assert result.success.all()


def test_detached_network_raises_model_error() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear().module

        def forward(self, inputs: Tensor) -> Tensor:
            return self.inner(inputs.detach())

    model, images = load_model(Cut(), input_size=SIZE), random_images(2, dtype=torch.float64)
    for name in ("pgd", "deepfool", "carlini_wagner"):
        with pytest.raises(ModelError, match="no gradient flows through"):
            methods[name](model, images, label(images))
    assert attack("hop_skip_jump l2", model, images, label(images), max_queries=300).success.all()
