"""Attacks that only ask the model: on labels alone, counted exactly, each image by itself."""

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

WAYS: dict[str, dict[str, Any]] = {
    "hop_skip_jump l2": {"norm": "l2"},
    "hop_skip_jump linf": {"norm": "linf"},
    "boundary": {},
    "square linf": {"norm": "linf", "eps": 0.1},
    "square l2": {"norm": "l2", "eps": 0.7},
    "square l1": {"norm": "l1", "eps": 5.0},
}
by_each = pytest.mark.parametrize("way", WAYS)
by_labels = pytest.mark.parametrize("way", [way for way in WAYS if "square" not in way])
SIZE = (3, 6, 6)
WEIGHT = torch.randn(4, 108, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 10


def attack(way: str, model: Model, images: Tensor, labels: Tensor, **params: Any) -> Any:
    return methods[f"attacks.{way.split()[0]}"](model, images, labels, **{"seed": 0, **WAYS[way], **params})


def label(pictures: Tensor) -> Tensor:
    return ((pictures.double() - 0.5).flatten(1) @ WEIGHT.T).argmax(1)


class Counted:
    """Labels as NumPy integers, of a function with no gradients that counts the pictures it is shown."""

    def __init__(self) -> None:
        self.shown = 0

    def __call__(self, pictures: Tensor) -> Any:
        self.shown += len(pictures)
        return np.asarray(label(torch.from_numpy(pictures.numpy())))


def asked(function: Callable[[Tensor], Any]) -> Model:
    return load_model(function, input_size=SIZE, classes=["a", "b", "c", "d"])


def linear() -> Model:
    layer = nn.Linear(108, 4).double()
    layer.weight.data, layer.bias.data = WEIGHT.clone(), -WEIGHT.sum(1) / 2
    return load_model(nn.Sequential(nn.Flatten(), layer), input_size=SIZE)


def pictures(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.rand(count, *SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn * 1.4 - 0.2).clamp(0, 1).to(dtype)


@by_each
@pytest.mark.parametrize("most", [1, 2, 7, 60, 400])
def test_queries_are_the_pictures_that_the_model_was_shown_and_within_the_budget(way: str, most: int) -> None:
    function, images = Counted(), pictures(3)
    labels = label(images)
    labels[1] = (labels[1] + 1) % 4  # one that needs no attack
    found = attack(way, asked(function), images, labels, max_queries=most)
    assert function.shown == int(found.queries.sum())
    assert 1 <= found.queries.min() <= found.queries.max() <= most
    assert found.queries[1] == 1
    assert torch.equal(found.adversarial[1], images[1])
    one = Counted()
    alone = attack(way, asked(one), images[:1], labels[:1], max_queries=most)
    assert one.shown == int(alone.queries) == int(found.queries[0])


@by_labels
def test_labels_alone_are_enough_and_success_is_what_the_function_says(way: str) -> None:
    images = pictures(5)
    labels = label(images)
    found = attack(way, asked(Counted()), images, labels, max_queries=600)
    assert found.success.all()
    assert torch.equal(found.after, label(found.adversarial))
    assert not found.after.eq(labels).any()
    assert found.confidence_before.eq(1).all()
    assert found.adversarial.min() >= 0 and found.adversarial.max() <= 1
    assert f"{int(found.queries[0])} queries" in found.panels()[0][2].title


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_hop_skip_jump_comes_within_fifteen_percent_of_the_nearest_boundary(norm: str) -> None:
    images = 0.5 + 0.02 * torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(5))
    logits = (images.double() - 0.5).flatten(1) @ WEIGHT.T
    labels = logits.argmax(1)
    apart = (WEIGHT[labels][:, None] - WEIGHT).norm(2 if norm == "l2" else 1, dim=2)
    gaps = (logits.gather(1, labels[:, None]) - logits) / apart
    nearest = gaps.scatter(1, labels[:, None], torch.inf).amin(1)
    found = attack(f"hop_skip_jump {norm}", asked(label), images, labels, steps=25, max_queries=20_000)
    ratio = found.distance(norm) / nearest
    assert ratio.min() >= 1 - 1e-4
    assert ratio.median() <= 1.15


@by_each
def test_batch_gives_what_its_images_give_alone_whatever_goes_through_at_once(way: str) -> None:
    model, images = linear(), pictures(3, 1, torch.float64)
    labels = label(images)
    together = attack(way, model, images, labels, max_queries=150)
    with max_batch(2):
        in_twos = attack(way, model, images, labels, max_queries=150)
    torch.testing.assert_close(in_twos.adversarial, together.adversarial)
    for n in range(3):
        alone = attack(way, model, images[n : n + 1], labels[n : n + 1], max_queries=150)
        torch.testing.assert_close(alone.adversarial[0], together.adversarial[n])


@by_each
def test_constant_added_to_the_logits_changes_nothing(way: str) -> None:
    model, images = linear(), pictures(2, 2, torch.float64)
    plain = attack(way, model, images, label(images), max_queries=120).adversarial
    model.module[1].bias.data += 8.0
    shifted = attack(way, model, images, label(images), max_queries=120).adversarial
    torch.testing.assert_close(shifted, plain)


@by_each
def test_model_that_always_says_the_same_ends_the_search_with_the_flag_down(way: str) -> None:
    function = asked(lambda shown: torch.zeros(len(shown), dtype=torch.long))
    images = pictures(2)
    found = attack(way, function, images, torch.tensor([0, 0]), max_queries=300)
    assert not found.success.any()
    assert found.adversarial.isfinite().all()
    if "square" not in way:
        assert torch.equal(found.adversarial, images)
    assert found.png()


@by_labels
def test_targeted_search_begins_at_the_start_and_keeps_the_class(way: str) -> None:
    many = pictures(60, 7)
    images = many[:2]
    wanted = (label(images) + 1) % 4
    start = torch.stack([many[(label(many) == int(k)).nonzero()[0, 0]] for k in wanted])
    found = attack(way, asked(Counted()), images, wanted, targeted=True, start=start, max_queries=500)
    assert found.success.all()
    assert torch.equal(label(found.adversarial), wanted)
    assert (found.distance("l2") < 0.8 * (start - images).flatten(1).norm(dim=1)).all()


@by_each
def test_targeted_equals_untargeted_where_there_are_two_classes(way: str) -> None:
    def two(shown: Tensor) -> Tensor:
        return (shown.double() - 0.5).flatten(1) @ WEIGHT[:2].T

    model, images = load_model(two, input_size=SIZE, classes=["no", "yes"]), pictures(2)
    said = two(images).argmax(1)
    away = attack(way, model, images, said, max_queries=200)
    towards = attack(way, model, images, 1 - said, targeted=True, max_queries=200)
    assert not torch.equal(away.adversarial, images)
    assert torch.equal(away.adversarial, towards.adversarial)


def test_start_is_read_for_all_images_and_refused_in_another_shape() -> None:
    found = run(
        "hop_skip_jump", images="builtin:scenes/2", start="builtin:scenes/1", labels=[3, 3], targeted=True,
        max_queries=30, seed=0, progress=False,
    )  # fmt: skip
    assert found.inputs["start"].shape == found.images.shape
    with pytest.raises(InputError, match="start pictures must have the images' shape"):
        attack("boundary", asked(label), pictures(2), torch.tensor([0, 0]), start=pictures(2)[..., 1:])
    with pytest.raises(InputError, match="needs one picture to start from, or 2, not 3"):
        attack("boundary", asked(label), pictures(2), torch.tensor([0, 0]), start=pictures(3))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    way=st.sampled_from(["square linf", "square l2", "square l1"]),
    eps=st.floats(1e-6, 30),
    targeted=st.booleans(),
    initial_area=st.floats(0.001, 1),
)
def test_square_stays_in_the_ball_and_in_the_pixel_range(
    seed: int, way: str, eps: float, targeted: bool, initial_area: float
) -> None:
    images, params = (
        pictures(3, seed, torch.float64),
        {"eps": eps, "targeted": targeted, "initial_area": initial_area},
    )
    found = attack(way, linear(), images, torch.tensor([0, 1, 2]), seed=seed, max_queries=25, **params)
    assert found.adversarial.min() >= 0 and found.adversarial.max() <= 1
    norm = WAYS[way]["norm"]
    assert found.distance(norm).max() <= eps * (1 + 1e-12)
    assert torch.equal(found.after, linear()(found.adversarial).argmax(1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_lowers_the_margin_with_more_queries(norm: str) -> None:
    model, images = linear(), pictures(6, 3, torch.float64)
    labels, margins = label(images), []
    for most in (2, 40, 400):
        found = attack(f"square {norm}", model, images, labels, eps=0.02, max_queries=most)
        logits = model(found.adversarial).detach()
        own = logits.gather(1, labels[:, None])
        margins.append(float((own - logits.scatter(1, labels[:, None], -torch.inf).amax(1, True)).mean()))
    assert margins[0] > margins[1] > margins[2]


@pytest.mark.parametrize("name", ["pgd", "bim", "fgsm", "saliency"])
def test_method_on_gradients_refuses_a_function_that_gives_labels(name: str) -> None:
    function = Counted()
    given = [torch.tensor([0])] if name != "saliency" else []
    with pytest.raises(ModelError, match="no gradient|labels alone|lets no gradient through"):
        methods[name](asked(function), pictures(1), *given)
    assert function.shown <= 1  # asked once, to see


def test_method_on_gradients_takes_a_function_that_lets_them_through() -> None:
    model = linear()
    through = load_model(lambda shown: model(shown.double()), input_size=SIZE, classes=["a", "b", "c", "d"])
    images = pictures(2)
    found = methods["pgd"](through, images, label(images), eps=0.3, step_size=0.1, seed=0)
    assert found.success.all()


def test_network_whose_picture_is_cut_off_is_refused_in_a_sentence() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear().module

        def forward(self, shown: Tensor) -> Tensor:
            return self.inner(shown.detach())

    model, images = load_model(Cut(), input_size=SIZE), pictures(2, dtype=torch.float64)
    for name in ("pgd", "deepfool", "carlini_wagner"):
        with pytest.raises(ModelError, match="no gradient flows through"):
            methods[name](model, images, label(images))
    assert attack("hop_skip_jump l2", model, images, label(images), max_queries=300).success.all()
