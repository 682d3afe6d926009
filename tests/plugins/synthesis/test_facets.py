"""Multifaceted visualization: planted facets, batches, seeds, examples and invalid requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phosphene import Class, InputError, Model, TensorDataset, load_model, load_result, methods, run
from phosphene_plugins.synthesis._activation_maximization import ActivationMaximization

facets = methods["synthesis.facets"]
PLAIN: dict[str, Any] = {"jitter": 0, "blur_every": 0, "parametrization": "pixels", "lr": 0.02, "seed": 0}


class Templates(nn.Module):
    """Class 0 is the larger of two templates' responses, class 1 a third template's."""

    def __init__(self, templates: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(templates[0].numel(), len(templates), bias=False)
        self.linear.weight.data.copy_(templates.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        responses = self.linear(x.flatten(1))
        return torch.stack([responses[:, :2].amax(1), responses[:, 2]], 1)


@pytest.fixture
def templates() -> Tensor:
    patterns = torch.full((3, 1, 6, 6), -0.2)
    patterns[0, :, :, :3], patterns[1, :, :3, :], patterns[2, :, 3:, 3:] = 0.5, 0.5, 0.5
    patterns[1, :, :, :3] = -0.4
    return patterns


@pytest.fixture
def model(templates: Tensor) -> Model:
    return load_model(Templates(templates), mean=[0.5], std=[1.0], input_size=(1, 6, 6))


@pytest.fixture
def dataset(templates: Tensor) -> TensorDataset:
    torch.manual_seed(0)
    kinds = torch.tensor([0] * 9 + [1] * 6 + [2] * 10)
    return TensorDataset((0.5 + 0.4 * templates[kinds].sign() + 0.1 * torch.randn(25, 1, 6, 6)).clamp(0, 1))


def test_oracle() -> None:
    assert facets.spec.oracle is not None
    facets.spec.oracle()


def test_maximum_of_two_templates_has_a_prototype_of_each(
    model: Model, dataset: TensorDataset, templates: Tensor
) -> None:
    result = facets(model, Class(0), dataset, layer="linear", k=2, top=15, l2=0.5, **PLAIN)
    assert result.sizes.tolist() == [9, 6]
    assert [int(i) < 9 for i in result.ids] == [True] * 4 + [False] * 4
    expected = (0.5 + templates[:2] / (2 * 0.5)).clamp(0, 1)
    assert (result.images - expected).abs().mean() < 0.02
    assert (result.scores[-1] > result.mean_scores).all()
    alone = facets(model, Class(0), dataset, layer="linear", k=1, top=15, l2=0.5, **PLAIN)
    assert len(alone.images) == 1 and int(alone.sizes) == 15
    best = model(dataset.images)[:, 0].argsort(descending=True)[:15]
    torch.testing.assert_close(alone.sources[0], dataset.images[best].mean(0))


def test_classes_equal_their_facets_alone(model: Model, dataset: TensorDataset) -> None:
    both = facets(model, Class((1, 0)), dataset, layer="linear", k=2, top=9, steps=5, **PLAIN)
    assert both.targets == tuple(f"class {c}, facet {n}" for c in (1, 0) for n in (1, 2))
    alone = facets(model, Class(1), dataset, layer="linear", k=2, top=9, steps=5, **PLAIN)
    torch.testing.assert_close(both.images[:2], alone.images)
    assert both.ids[: len(alone.ids)] == alone.ids
    assert len(both.panels()) == 4 and int(both.example_counts.sum()) == len(both.examples) == len(both.ids)
    assert both.panels()[2][0].is_output


@pytest.mark.parametrize("target", ["linear", "linear[1]", Class(1)])
def test_any_unit_with_a_seed_is_repeatable(model: Model, dataset: TensorDataset, target: Any) -> None:
    first, again = (
        facets(model, target, dataset, layer="linear", k=3, top=12, steps=3, seed=4) for _ in "ab"
    )
    assert torch.equal(first.images, again.images) and first.ids == again.ids
    assert first.sizes.sum() == 12 and first.images.min() >= 0 and first.images.max() <= 1


def test_equal_images_are_one_facet(model: Model) -> None:
    equal = TensorDataset(torch.full((6, 1, 6, 6), 0.7))
    with pytest.warns(UserWarning, match="distinct clusters"):
        result = facets(model, Class(1), equal, layer="linear", k=3, steps=2, seed=0)
    assert result.sizes.tolist() == [6]


def test_too_many_facets_and_no_target_are_refused(model: Model, dataset: TensorDataset) -> None:
    with pytest.raises(InputError, match="25 images form at most 25 facets, not 26"):
        facets(model, Class(0), dataset, k=26)
    with pytest.raises(InputError, match="10 images form at most 10 facets, not 12"):
        facets(model, Class(0), dataset, k=12, top=10)
    with pytest.raises(InputError, match="for example target="):
        facets(model, None, dataset)


def test_saved_result_has_its_examples(tmp_path: Path) -> None:
    result = run("facets", dataset="builtin:scenes/12", target="star", k=2, top=6, steps=2, frames=1, seed=0,
               out=tmp_path / "facets", progress=False)  # fmt: skip
    loaded = load_result(tmp_path / "facets")
    assert loaded.ids == result.ids and torch.equal(loaded.examples, result.examples)
    assert (tmp_path / "facets" / "film.gif").is_file()


def test_defaults_are_those_of_class_visualization() -> None:
    defaults = methods["synthesis.class_visualization"].spec.params.model_fields
    params = ActivationMaximization(deconvnet_steps=16).model_dump()
    assert len(params) == 24
    assert params == {name: defaults[name].default for name in params}
