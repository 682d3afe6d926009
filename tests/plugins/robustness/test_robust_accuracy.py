"""Robust accuracy: it never rises with eps, is what each attack says, and goes on where it was cut off."""

from __future__ import annotations

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
from phosphene.testing.observation import assert_alike, traffic
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


def pictures(count: int = 16) -> Tensor:
    return torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def known(model: Model, images: Tensor) -> TensorDataset:
    """A data set of them, whose first picture the model has wrong."""
    labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 5
    return TensorDataset(images, [str(n) for n in labels.tolist()])


def measured(model: Model, images: Tensor, **params: Any) -> RobustnessReport:
    given = {"attacks": ["fgsm", "pgd", "deepfool"], "eps": EPS, "seed": 0}
    return robust_accuracy(model, known(model, images), **(given | params))


def test_accuracy_never_rises_and_the_worst_case_is_the_worst() -> None:
    found = measured(network(), pictures())
    for attack in (*found.attacks, None):
        values = [found.accuracy(eps, attack) for eps in (0, 0.005, *EPS, 0.2)]
        assert values == sorted(values, reverse=True)
        assert values[0] == 15 / 16
    for eps in EPS:
        each = [found.radius(attack) > eps for attack in found.attacks]
        assert torch.equal(found.radius() > eps, torch.stack(each).all(0))
    assert found.accuracy(EPS[1]) < found.accuracy(EPS[0]) < 15 / 16


def test_every_curve_is_what_the_attack_says_alone() -> None:
    model, images = network(), pictures()
    found = measured(model, images)
    labels = torch.tensor([model.class_index(name) for name in known(model, images).classes or ()])
    for eps in EPS:
        alone = methods["attacks.fgsm"](model, images, labels, eps=eps)
        assert found.accuracy(eps, "fgsm") <= 1 - float(alone.success.double().mean())
    first = methods["attacks.fgsm"](model, images, labels, eps=EPS[0])
    assert found.accuracy(EPS[0], "fgsm") == 1 - float(first.success.double().mean())
    near = methods["attacks.deepfool"](model, images, labels, norm="linf")
    far = torch.where(near.success, near.distance("linf"), torch.inf)
    torch.testing.assert_close(found.radius("deepfool"), far, rtol=0, atol=0)


def test_radius_of_the_ball_itself_counts_in_any_precision() -> None:
    """An example at a distance of just eps is one within eps: 1/255 in single precision is more than that."""
    for dtype in (torch.float32, torch.float64):
        model = network(dtype)
        images = 0.3 + 0.4 * pictures().to(dtype)
        for eps in (1 / 255, 0.1, 0.3):
            found = measured(model, images, attacks=["fgsm"], eps=[eps])
            broken = found.success[0]
            assert (found.radii[0][broken] <= eps).all()
            assert found.accuracy(eps, "fgsm") == float((found.correct & ~broken).double().mean())


def test_what_fell_in_a_smaller_ball_is_not_attacked_again() -> None:
    model, images = network(), pictures()
    dataset = known(model, images)
    model.structure  # noqa: B018  - recorded once, with a pass of its own

    def passes(*eps: float) -> int:
        with traffic(model.module) as seen:
            result = robust_accuracy(
                model, dataset, attacks=["pgd"], eps=eps, seed=0, params={"pgd": {"steps": 30}}
            )
        assert result.accuracy(0.7) == 0
        return seen.forward

    assert passes(0.7) == passes(0.7, 0.8) == passes(0.8, 0.7, 0.7)


def test_nearest_example_is_the_one_that_is_shown() -> None:
    model, images = network(), pictures()
    found = measured(model, images, examples=6)
    assert (
        torch.equal(found.adversarial[0], images[0]) and found.panels()[0][1].title == "misclassified before"
    )
    said = model(found.adversarial).argmax(1)
    labels = [model.class_index(name) for name in known(model, images).classes or ()]
    for n, by in enumerate(found.broken_by[1:], start=1):
        far = float((found.adversarial[n] - images[n]).abs().max())
        assert by and int(said[n]) != labels[n]
        assert far == pytest.approx(float(found.radius()[n]), rel=1e-4)


def test_expensive_attack_sees_as_many_pictures_as_the_budget_pays_for() -> None:
    found = measured(network(), pictures(), budget=400)
    # Three radii of 10 steps: 3 * (13 forward + 2 * 10 backward).
    fgsm, pgd, _ = found.counts
    assert fgsm == 16 and pgd == 400 // (3 * (13 + 20))
    assert len(found.radius("pgd")) == pgd and not found.success[1, pgd:].any()
    assert f"| {pgd} " in found.lines()[3]
    assert len(found.radius()) == 16


def test_run_that_was_cut_off_gives_what_a_whole_one_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "INTERVAL", 0.0)
    given = {
        "dataset": "builtin:scenes/5", "batch_size": 2, "attacks": ["fgsm", "pgd"], "eps": EPS[:2],
        "params": {"pgd": {"steps": 2}}, "seed": 0,
    }  # fmt: skip
    whole = run("robust_accuracy", progress=False, **given)

    def cut(event: ProgressEvent) -> None:
        if event.done == 7:  # of 12: between the two radii of an attack
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("robust_accuracy", out=tmp_path / "report", progress=cut, **given)
    assert [path.name for path in tmp_path.iterdir()] == [".report.unfinished"]
    attacked: list[int] = []
    fgsm = methods["attacks.fgsm"]
    function = fgsm.function
    monkeypatch.setattr(fgsm, "function", lambda *a, **k: attacked.append(1) or function(*a, **k))
    again = run("robust_accuracy", out=tmp_path / "report", progress=False, **given)
    assert len(attacked) <= 4  # of the second batch at most, and of the third
    assert_alike(again, whole)
    back = load_result(tmp_path / "report")
    assert isinstance(back, RobustnessReport)
    assert back.lines() == whole.lines()


def test_model_that_gives_labels_alone_is_attacked_by_what_needs_no_more() -> None:
    def says(shown: Tensor) -> Tensor:
        return (shown.mean((1, 2, 3)) > 0.5).long()

    model = load_model(says, input_size=(3, 6, 6), classes=["dark", "light"])
    images = torch.full((3, 3, 6, 6), 0.5) + torch.tensor([-0.05, 0.1, 0.3])[:, None, None, None]
    dataset = TensorDataset(images, ["dark", "light", "dark"])
    found = robust_accuracy(
        model, dataset, attacks=["hop_skip_jump"], eps=[0.06, 0.2], seed=0,
        params={"hop_skip_jump": {"max_queries": 200}},
    )  # fmt: skip
    assert [found.accuracy(eps) for eps in (0, 0.02, 0.2)] == pytest.approx([2 / 3, 2 / 3, 0])
    with pytest.raises(ModelError, match="gives labels alone"):
        robust_accuracy(model, dataset, attacks=["hop_skip_jump", "pgd"], seed=0)


def test_ensemble_is_an_attack_like_any_other_and_the_models_own_answer_a_truth() -> None:
    model, images = network(), pictures(4)
    found = robust_accuracy(
        model, TensorDataset(images), attacks=["auto_attack"], params={"auto_attack": {"effort": 0.02}},
        eps=[0.2], target="predicted", seed=0,
    )  # fmt: skip
    assert [found.accuracy(eps) for eps in (0, 0.2)] == [1, 0]


@pytest.mark.parametrize(
    ("given", "told"),
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
def test_what_cannot_be_measured_is_refused_before_any_work(given: dict[str, Any], told: str) -> None:
    model = network()
    model.structure  # noqa: B018  - recorded once, with a pass of its own
    with traffic(model.module) as seen, pytest.raises((InputError, KeyError), match=told):
        robust_accuracy(model, TensorDataset(pictures(2), ["0", "1"]), seed=0, **given)
    assert seen.passes == 0


def test_data_set_without_classes_is_refused() -> None:
    with pytest.raises(InputError, match="has no labels"):
        robust_accuracy(network(), TensorDataset(pictures(2)), seed=0)
