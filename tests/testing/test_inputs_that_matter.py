"""Checks of inputs that matter: data sets, masks, target labels; and what they must not refuse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor

from phosphene import Cost, Method, Reference, method, scores
from phosphene.attacks import build_result, project
from phosphene.results import AdversarialExamples, Attribution, Panel, Result
from phosphene.roles import Dataset, Images, Labels, Masks, Model, Target
from phosphene.spec import InvariantTo, ZeroWhen, size
from phosphene.testing import Outcome, check_method, linear_model

REFERENCES = [Reference(key="k", title="T", authors="A", year=2020, url="https://example.org")]
#: What ``filled_cells`` adds to each value.
ROUNDING = [3e-16]
#: What the wrong method below saves between its calls.
MEANS: dict[torch.Size, Tensor] = {}


@dataclass(frozen=True, eq=False, kw_only=True)
class Numbers(Result):
    """``values`` (N,) of the ``images`` (N, C, H, W)."""

    per_image: ClassVar[tuple[str, ...]] = ("images", "values")
    images: Tensor
    values: Tensor

    def panels(self) -> list[list[Panel]]:
        return [[Panel(image)] for image in self.images]


def outcome(tested: Method[..., Any], name: str) -> Outcome:
    (only,) = check_method(tested, profile="quick", only=[name]).outcomes
    return only


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    yield
    MEANS.clear()


@method(family="scores", references=REFERENCES, needs=["dataset"], cost=Cost(forward=0))
def distance_to_the_mean(images: Images, dataset: Dataset) -> Numbers:
    """Distance of each image from the mean image of a data set."""
    mean = dataset.images.to(images).mean(0)
    return Numbers(images=images, values=(images - mean).flatten(1).norm(dim=1))


@method(family="scores", references=REFERENCES, needs=["dataset"], cost=Cost(forward=0))
def cached_distance_to_the_mean(images: Images, dataset: Dataset) -> Numbers:
    """Distance of each image from the mean image of a data set, which is cached by the size."""
    mean = MEANS.setdefault(images.shape[1:], dataset.images.to(images).mean(0)).to(images)
    return Numbers(images=images, values=(images - mean).flatten(1).norm(dim=1))


def test_cache_that_ignores_the_dataset_is_reported() -> None:
    failure = outcome(cached_distance_to_the_mean, "dataset_matters")
    assert failure.verdict == "failed"
    assert "the same for another data set" in failure.reason
    assert outcome(distance_to_the_mean, "dataset_matters").verdict == "passed"


def targeted_attack(*, ignores_labels: bool) -> Method[..., Any]:
    @method(
        family="attacks",
        references=REFERENCES,
        needs=["gradients"],
        cost=Cost(forward=4 * size.images, backward=size.images),
    )
    def stepped(
        model: Model,
        images: Images,
        labels: Labels,
        *,
        targeted: Annotated[bool, Field(description="towards the labels")] = False,
    ) -> AdversarialExamples:
        """One step of the gradient."""
        points = images.clone().requires_grad_()
        before = model(points)
        followed = before.topk(2).indices[:, 1] if targeted and ignores_labels else labels
        chosen = before.gather(1, followed[:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen if targeted else -chosen, points)
        adversarial = project(images + 0.03 * gradient.sign(), images, 0.03, "linf")
        return build_result(model, images, adversarial, labels, before.detach(), targeted=targeted)

    return stepped


def test_labels_that_a_targeted_attack_ignores_are_reported() -> None:
    failure = outcome(targeted_attack(ignores_labels=True), "labels_matter")
    assert failure.verdict == "failed"
    assert "with targeted=True" in failure.reason
    assert outcome(targeted_attack(ignores_labels=False), "labels_matter").verdict == "passed"


@method(family="scores", references=REFERENCES, cost=Cost(forward=0))
def energy_in_the_mask(images: Images, masks: Masks) -> Numbers:
    """Mean of each image in its mask."""
    assert masks is not None
    masks &= images.sum(1) > 0.5
    return Numbers(images=images, values=(images.sum(1) * masks).mean((1, 2)))


def test_masks_that_a_method_requires_are_passed_and_not_changed() -> None:
    assert outcome(energy_in_the_mask, "answers").verdict == "passed"
    failure = outcome(energy_in_the_mask, "inputs_unchanged")
    assert (failure.verdict, failure.reason) == ("failed", "masks was changed")


@method(
    family="attribution",
    references=REFERENCES,
    needs=["dataset"],
    cost=Cost(forward=64 * size.images),
    relations=[ZeroWhen("constant")],
)
def filled_cells(
    model: Model,
    images: Images,
    dataset: Dataset,
    target: Target = None,
) -> Attribution:
    """Drop of the score when a quarter is filled from the first image of a data set."""
    target = target.resolve(model, images)
    filling = dataset.images[:1].to(images).mean(0).expand_as(images)
    maps = torch.zeros_like(images[:, 0])
    height, width = maps.shape[1] // 2, maps.shape[2] // 2
    with torch.no_grad():
        for rows in (slice(0, height), slice(height, None)):
            for columns in (slice(0, width), slice(width, None)):
                changed = images.clone()
                changed[:, :, rows, columns] = filling[:, :, rows, columns]
                drops = scores(model, images, target) - scores(model, changed, target)
                maps[:, rows, columns] = drops[:, None, None] + ROUNDING[0]
    return Attribution(images=images, maps=maps, targets=target.names(model, len(images)), layout="map")


def test_rounding_is_zero_where_the_score_is_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(filled_cells, "zero_when('constant')").verdict == "passed"
    monkeypatch.setattr(f"{__name__}.ROUNDING", [1e-9])
    assert outcome(filled_cells, "zero_when('constant')").verdict == "failed"


def test_colors_of_the_dataset_are_reordered_with_those_of_the_images() -> None:
    assert outcome(filled_cells, "independent_of_the_channel_order").verdict == "passed"


def equal_values() -> None:
    """Both images have the same mean, up to rounding."""
    images = torch.tensor([0.1, 0.3]).view(1, 1, 1, 2).repeat(2, 3, 4, 3)
    images[1] = images[1].flip(-1) * (1 + 1e-7)
    values = mean_pixels(linear_model(torch.ones(2, 3, 4, 6)), images).values
    torch.testing.assert_close(values, torch.full((2,), 0.2))


@method(
    family="scores",
    references=REFERENCES,
    cost=Cost(forward=0),
    relations=[InvariantTo("batch_order", fields=("values",))],
    oracle=equal_values,
)
def mean_pixels(model: Model, images: Images) -> Numbers:
    """Mean of each image."""
    return Numbers(images=images, values=images.mean((1, 2, 3)))


def test_values_that_differ_by_rounding_have_no_order() -> None:
    assert outcome(mean_pixels, "oracle").verdict == "passed"
    for change in ("shuffled", "rolled"):
        assert outcome(mean_pixels, f"oracle_rejects_{change}").verdict == "passed"
    assert outcome(mean_pixels, "oracle_rejects_scaled").verdict == "passed"
