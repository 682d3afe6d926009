"""Objectives of attacks on many images at once: contrast, region, box and similarity."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from phosphene import InputError, Model, ModelError, TensorDataset, load_model, run
from phosphene.targets import ObjectiveClassifier, Similar, parse_target


class Case(NamedTuple):
    """A network, images in which the objective holds in all but the last, and the objective as text."""

    build: Callable[[], Model]
    images: Tensor
    objective: str
    name: str


class Colors(nn.Module):
    """A segmentation: the logits of red, green and blue are the pixel's channels times 10."""

    def forward(self, x: Tensor) -> Tensor:
        return 10 * x


class BrightBox(nn.Module):
    """A detector: a box of the image with the brightness as score, where that is above 0.35."""

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        detections = []
        for score in x.mean((1, 2, 3)):
            count = int(score > 0.35)
            boxes, labels = torch.tensor([[0.0, 0, 8, 8]])[:count], torch.ones(count).long()
            detections.append({"boxes": boxes, "labels": labels, "scores": score[None][:count]})
        return detections


def images_of(*colors: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colors)[:, :, None, None].repeat(1, 1, 8, 8)


def mean_color() -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def classifier() -> Model:
    """Logits of three classes, 20 times the mean of the channels."""
    linear = nn.Linear(3, 3, bias=False)
    linear.weight.data = 20 * torch.eye(3)
    return load_model(nn.Sequential(mean_color(), linear), input_size=(3, 8, 8), classes=["r", "g", "b"])


def segmenter() -> Model:
    names = ["red", "green", "blue"]
    return load_model(Colors(), input_size=(3, 8, 8), classes=names, task="segmentation")


def detector() -> Model:
    names = ["background", "lamp"]
    return load_model(BrightBox(), input_size=(3, 8, 8), classes=names, task="detection")


def embedder() -> Model:
    return load_model(mean_color(), input_size=(3, 8, 8), task="embedding")


RED, BLUE = (0.5, 0.42, 0.4), (0.2, 0.3, 0.6)
CASES = {
    "contrast": Case(classifier, images_of(RED, (0.6, 0.5, 0.1), BLUE), "contrast:r,g", "r - g"),
    "region": Case(segmenter, images_of(RED, (0.6, 0.5, 0.1), BLUE), "region:red", "region:red"),
    "box": Case(detector, images_of((0.5,) * 3, (0.4,) * 3, (0.1,) * 3), "box:lamp", "box:lamp"),
    "similar": Case(embedder, images_of((0.5, 0.0, 0.1), (0.4, 0.05, 0.0), BLUE), "similar:red.png", ""),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    monkeypatch.chdir(tmp_path)
    return CASES[request.param]


def holds(case: Case, images: Tensor, originals: Tensor) -> list[bool]:
    """Whether the objective holds in each image, by the region or box of the original."""
    model = case.build()
    views = ObjectiveClassifier.of_images(model, parse_target(case.objective, model), originals)
    return [bool(views.for_rows([n])(images[n : n + 1]).argmax(1)) for n in range(len(images))]


SETTINGS: dict[str, dict[str, Any]] = {
    "transfer": {"eps": 0.4, "step_size": 0.1, "steps": 6, "augmentations": (), "seed": 0},
    "ensemble_evaluation": {"eps": 0.4, "step_size": 0.1, "steps": 6, "seed": 0},
    "gradient_masking_checks": {"eps": 0.4, "steps": 6, "max_queries": 20, "seed": 0},
    "auto_attack": {"eps": 0.4, "effort": 0.05, "seed": 0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_methods_with_labels_change_objectives(name: str, case: Case) -> None:
    model, images = case.build(), case.images
    assert holds(case, images, images) == [True, True, False]
    if name == "auto_attack":  # an attack on single images: all of them have to show the object
        images = images[:2]
    result: Any = run(name, model=model, images=images, labels=case.objective, **SETTINGS[name])
    match name:
        case "transfer":
            assert result.rates.tolist() == [[1.0]] and result.counts.tolist() == [[2]]
            assert holds(case, result.adversarial[0], images) == [False, False, False]
        case "ensemble_evaluation":
            torch.testing.assert_close(result.accuracy[0], torch.tensor([2 / 3, 2 / 3]))
            assert result.ensemble_accuracy == 0 and result.member_accuracy.tolist() == [0]
            assert holds(case, result.adversarial, images) == [False, False, False]
        case "gradient_masking_checks":
            assert result.success_by_steps[-1] == 1 and len(result.images) == 2
            assert holds(case, result.adversarial, images[:2]) == [False, False]
            assert all(name.startswith("not ") for name in result.names_after)
        case "auto_attack":
            assert result.success.all() and result.robust_accuracy == 0
            assert holds(case, result.adversarial, images) == [False, False]


@pytest.mark.parametrize("name", ["universal", "patch"])
def test_one_change_of_all_images_changes_objectives(name: str, case: Case) -> None:
    model, images = case.build(), case.images
    settings: dict[str, Any] = {"eps": 0.4, "attack": "fgsm"}
    if name == "patch":
        settings = {"size": 0.5, "steps": 20, "batch": 2, "lr": 0.2, "degrees": 0.0, "scale": 1.0, "seed": 0}
        settings |= {"shape": "square", "augmentations": ()}
        if case.objective != "box:lamp":  # a patch covers a quarter of the image
            images = torch.cat([images_of((0.45, 0.42, 0.2), (0.5, 0.48, 0.1)), images[2:]])
    result: Any = run(
        name, model=model, dataset=TensorDataset(images), objective=case.objective, held_out=0, **settings
    )
    assert holds(case, images, images) == [True, True, False]
    after = holds(case, result.adversarial, images)
    # Of the two images in which the objective holds; the third is not counted.
    assert result.fooling_rate == after[:2].count(False) / 2 >= 0.5
    assert result.names_before[2] == result.names_after[2]
    assert not result.names_before[0].startswith("not ")
    changed = [a != b for a, b in zip(result.names_before, result.names_after, strict=True)]
    assert changed == [not after[0], not after[1], False]


def test_robust_accuracy_of_objectives(case: Case) -> None:
    model, images = case.build(), case.images
    report: Any = run(
        "robust_accuracy", model=model, dataset=TensorDataset(images), target=case.objective,
        attacks=["pgd", "fgsm"], eps=[1e-4, 0.4], params={"pgd": {"step_size": 0.1}}, seed=0,
    )  # fmt: skip
    assert report.correct.tolist() == [True, True, False]
    assert report.success[0].tolist() == [True, True, False] and report.accuracy(0.4, "pgd") == 0
    assert report.accuracy(1e-4) == pytest.approx(2 / 3)
    assert holds(case, report.adversarial, images) == [False, False, False]


def test_objectives_of_several_models_are_those_of_each(tmp_path: Path, monkeypatch: Any) -> None:
    """The other model of ``transfer`` is attacked and evaluated on the objective by its own embedding."""
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("phosphene_plugins.models._ensembles.load_model", lambda uri, **_: embedder())
    images, settings = CASES["similar"].images, SETTINGS["transfer"]
    result: Any = run(
        "transfer", model=embedder(), models=["other:"], images=images, labels="similar:red.png", **settings
    )
    assert result.rates.tolist() == [[1.0, 1.0], [1.0, 1.0]] and result.counts.tolist() == [[2, 2], [2, 2]]
    vector = Similar(torch.tensor([1.0, 0, 0]))
    with pytest.raises(InputError, match="a vector is an embedding of one model"):
        run("transfer", model=embedder(), models=["other:"], images=images, labels=vector, **settings)


def test_refusals_of_objectives() -> None:
    model, images = segmenter(), CASES["region"].images
    dataset = TensorDataset(images[2:])
    for name in ("universal", "patch"):
        with pytest.raises(InputError, match="region:red holds in none of the 1 training images"):
            run(name, model=model, dataset=dataset, objective="region:red")
        with pytest.raises(ModelError, match="region:3"):  # without an objective
            run(name, model=model, dataset=dataset)
        with pytest.raises(InputError, match="pattern"):
            run(name, model=classifier(), dataset=dataset, objective="r")
    with pytest.raises(InputError, match="leave one of them out"):
        run("patch", model=classifier(), dataset=dataset, objective="contrast:r,g", target_class="r")
    settings = SETTINGS["gradient_masking_checks"]
    with pytest.raises(InputError, match="classifies none of the images as its label"):
        run("gradient_masking_checks", model=model, images=images[2:], labels="region:red", **settings)
    with pytest.raises(InputError, match="image by image"):
        ObjectiveClassifier.of_images(model, parse_target("region:red", model), images)(images)
    # A detector's default is its best box, as for attacks on single images.
    lamps = TensorDataset(CASES["box"].images[:2])
    assert run("universal", model=detector(), dataset=lamps, eps=0.4, attack="fgsm").fooling_rate == 1


def test_a_defense_stands_before_the_objective() -> None:
    model, images = segmenter(), CASES["region"].images[:1]
    view = ObjectiveClassifier.view(model, parse_target("region:red@all", model), images)
    flipped = view.defended(lambda x: x.flip(1), "flip")
    assert view(images).argmax(1) == 1 and flipped(images).argmax(1) == 0
