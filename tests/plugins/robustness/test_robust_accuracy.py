"""Robust accuracy: never rises with eps, equals each attack run separately, and resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phosphene import (
    InputError,
    Model,
    ModelError,
    ProgressEvent,
    TensorDataset,
    checkpoints,
    load_model,
    load_result,
    methods,
    run,
)
from phosphene.testing.observation import assert_same_result, count_passes
from phosphene_plugins.robustness._robustness_report import RobustnessReport

robust_accuracy = methods["robustness.robust_accuracy"]
EPS = [0.01, 0.03, 0.08]


def network(dtype: torch.dtype = torch.float32) -> Model:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 5)
        )  # fmt: skip
    return load_model(module.to(dtype), input_size=(3, 6, 6))


def random_images(count: int = 16) -> Tensor:
    return torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def label_images(model: Model, images: Tensor) -> TensorDataset:
    """A data set with the predicted labels, except for a wrong label of the first image."""
    labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 5
    return TensorDataset(images, [str(n) for n in labels.tolist()])


def evaluate(model: Model, images: Tensor, **params: Any) -> RobustnessReport:
    options = {"attacks": ["fgsm", "pgd", "deepfool"], "eps": EPS, "seed": 0}
    return robust_accuracy(model, label_images(model, images), **(options | params))


def test_accuracy_never_rises_with_eps_and_the_worst_case_is_the_minimum() -> None:
    report = evaluate(network(), random_images())
    for attack in (*report.attacks, None):
        values = [report.accuracy(eps, attack) for eps in (0, 0.005, *EPS, 0.2)]
        assert values == sorted(values, reverse=True)
        assert values[0] == 15 / 16
    for eps in EPS:
        each = [report.radius(attack) > eps for attack in report.attacks]
        assert torch.equal(report.radius() > eps, torch.stack(each).all(0))
    assert report.accuracy(EPS[1]) < report.accuracy(EPS[0]) < 15 / 16


def test_each_curve_equals_the_attack_run_separately() -> None:
    model, images = network(), random_images()
    report = evaluate(model, images)
    labels = torch.tensor([model.class_index(name) for name in label_images(model, images).classes or ()])
    for eps in EPS:
        single = methods["attacks.fgsm"](model, images, labels, eps=eps)
        assert report.accuracy(eps, "fgsm") <= 1 - float(single.success.double().mean())
    first = methods["attacks.fgsm"](model, images, labels, eps=EPS[0])
    assert report.accuracy(EPS[0], "fgsm") == 1 - float(first.success.double().mean())
    deepfool_result = methods["attacks.deepfool"](model, images, labels, norm="linf")
    distance = torch.where(deepfool_result.success, deepfool_result.distance("linf"), torch.inf)
    torch.testing.assert_close(report.radius("deepfool"), distance, rtol=0, atol=0)


def test_example_at_a_distance_of_eps_counts_in_any_precision() -> None:
    """An example at a distance of just eps is one within eps: 1/255 in single precision is more than that."""
    for dtype in (torch.float32, torch.float64):
        model = network(dtype)
        images = 0.3 + 0.4 * random_images().to(dtype)
        for eps in (1 / 255, 0.1, 0.3):
            report = evaluate(model, images, attacks=["fgsm"], eps=[eps])
            broken = report.success[0]
            assert (report.radii[0][broken] <= eps).all()
            assert report.accuracy(eps, "fgsm") == float((report.correct & ~broken).double().mean())


def test_broken_images_are_not_attacked_again_in_larger_balls() -> None:
    model, images = network(), random_images()
    dataset = label_images(model, images)
    model.structure  # noqa: B018  - recorded once, with a pass of its own

    def passes(*eps: float) -> int:
        with count_passes(model.module) as counter:
            result = robust_accuracy(
                model, dataset, attacks=["pgd"], eps=eps, seed=0, params={"pgd": {"steps": 30}}
            )
        assert result.accuracy(0.7) == 0
        return counter.forward

    assert passes(0.7) == passes(0.7, 0.8) == passes(0.8, 0.7, 0.7)


def test_result_holds_the_nearest_examples() -> None:
    model, images = network(), random_images()
    report = evaluate(model, images, examples=6)
    assert (
        torch.equal(report.adversarial[0], images[0])
        and report.panels()[0][1].title == "misclassified before"
    )
    predicted = model(report.adversarial).argmax(1)
    labels = [model.class_index(name) for name in label_images(model, images).classes or ()]
    for n, by in enumerate(report.broken_by[1:], start=1):
        distance = float((report.adversarial[n] - images[n]).abs().max())
        assert by and int(predicted[n]) != labels[n]
        assert distance == pytest.approx(float(report.radius()[n]), rel=1e-4)


def test_expensive_attack_runs_on_as_many_images_as_the_budget_allows() -> None:
    report = evaluate(network(), random_images(), budget=400)
    # Three radii of 10 steps: 3 * (13 forward + 2 * 10 backward).
    fgsm, pgd, _ = report.counts
    assert fgsm == 16 and pgd == 400 // (3 * (13 + 20))
    assert len(report.radius("pgd")) == pgd and not report.success[1, pgd:].any()
    assert f"| {pgd} " in report.lines()[3]
    assert len(report.radius()) == 16


def record_call(name: str, function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    return call


def test_interrupted_run_resumes_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "INTERVAL", 0.0)
    options = {
        "dataset": "builtin:scenes/5", "batch_size": 2, "attacks": ["fgsm", "pgd"], "eps": EPS[:2],
        "params": {"pgd": {"steps": 2}}, "seed": 0,
    }  # fmt: skip
    complete = run("robust_accuracy", progress=False, **options)

    def interrupt(event: ProgressEvent) -> None:
        if event.description == "pgd" and event.done == 2:  # of three batches of the second attack
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("robust_accuracy", out=tmp_path / "report", progress=interrupt, **options)
    assert (tmp_path / ".report.unfinished").is_file()
    attacked: list[str] = []
    for name in ("fgsm", "pgd"):
        method = methods[f"attacks.{name}"]
        monkeypatch.setattr(method, "function", record_call(name, method.function, attacked))
    resumed = run("robust_accuracy", out=tmp_path / "report", progress=False, **options)
    # The two radii of the last batch at most.
    assert 0 < len(attacked) <= 2 and {*attacked} == {"pgd"}
    assert_same_result(resumed, complete)
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    loaded = load_result(tmp_path / "report")
    assert isinstance(loaded, RobustnessReport)
    assert loaded.lines() == complete.lines()


def test_model_without_logits_is_attacked_by_decision_based_attacks() -> None:
    def classify(images: Tensor) -> Tensor:
        return (images.mean((1, 2, 3)) > 0.5).long()

    model = load_model(classify, input_size=(3, 6, 6), classes=["dark", "light"])
    images = torch.full((3, 3, 6, 6), 0.5) + torch.tensor([-0.05, 0.1, 0.3])[:, None, None, None]
    dataset = TensorDataset(images, ["dark", "light", "dark"])
    report = robust_accuracy(
        model, dataset, attacks=["hop_skip_jump"], eps=[0.06, 0.2], seed=0,
        params={"hop_skip_jump": {"max_queries": 200}},
    )  # fmt: skip
    assert [report.accuracy(eps) for eps in (0, 0.02, 0.2)] == pytest.approx([2 / 3, 2 / 3, 0])
    with pytest.raises(ModelError, match="returns labels alone"):
        robust_accuracy(model, dataset, attacks=["hop_skip_jump", "pgd"], seed=0)


def test_auto_attack_is_an_attack_and_predicted_classes_can_be_the_truth() -> None:
    model, images = network(), random_images(4)
    report = robust_accuracy(
        model, TensorDataset(images), attacks=["auto_attack"], params={"auto_attack": {"effort": 0.02}},
        eps=[0.2], target="predicted", seed=0,
    )  # fmt: skip
    assert [report.accuracy(eps) for eps in (0, 0.2)] == [1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": ["penalized_target"]}, "no untargeted attack"),
        ({"attacks": ["transfer"]}, "no untargeted attack"),
        ({"attacks": ["grad_cam"]}, "no untargeted attack"),
        ({"attacks": ["fgms"]}, "fgsm"),
        ({"attacks": ["deepfool"], "norm": "l1"}, "deepfool: norm"),
        ({"params": {"bim": {}}}, "not among attacks"),
        ({"params": {"pgd": {"eps": 0.1}}}, "the same for all attacks"),
        ({"params": {"pgd": {"targeted": True}}}, "the same for all attacks"),
        ({"params": {"pgd": {"step": 1}}}, "steps"),
    ],
)
def test_invalid_attacks_and_parameters_are_refused_before_any_work(
    options: dict[str, Any], message: str
) -> None:
    model = network()
    model.structure  # noqa: B018  - recorded once, with a pass of its own
    with count_passes(model.module) as counter, pytest.raises((InputError, KeyError), match=message):
        robust_accuracy(model, TensorDataset(random_images(2), ["0", "1"]), seed=0, **options)
    assert counter.started == 0


def test_data_set_without_labels_is_refused() -> None:
    with pytest.raises(InputError, match="has no labels"):
        robust_accuracy(network(), TensorDataset(random_images(2)), seed=0)


def test_attacks_may_be_a_mapping_without_parameters() -> None:
    options = {"dataset": "builtin:scenes/2", "eps": [1 / 255], "seed": 0}
    result = run("robust_accuracy", attacks={"fgsm": {}}, **options)  # type: ignore[arg-type]
    assert result.attacks == ("fgsm",)
    with pytest.raises(InputError, match="params="):
        run("robust_accuracy", attacks={"fgsm": {"eot_samples": 2}}, **options)  # type: ignore[arg-type]
