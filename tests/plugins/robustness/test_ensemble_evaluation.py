"""Ensemble evaluation: the table equals attacks on each member and on the ensemble, run separately."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from phosphene import ModelError, load_model, load_result, methods
from phosphene.builtin.scenes import draw_scenes

evaluation = methods["robustness.ensemble_evaluation"]
SCENES = draw_scenes(4, seed=3, split="test")
OTHERS = [f"defended:{change}|builtin:shapes-resnet" for change in ("bit_depth(bits=2)", "median(size=3)")]
ATTACK = {"eps": 4 / 255, "step_size": 1 / 255, "steps": 4, "seed": 0}


def test_table_equals_attacks_on_each_member_and_on_the_ensemble(tmp_path: Path) -> None:
    # In double precision, so that folding batch norms changes no gradient's sign.
    first, images = load_model("builtin:shapes-resnet", dtype=torch.float64), SCENES.images.double()
    report = evaluation(first, images, SCENES.labels, models=OTHERS, mean_of="logits", **ATTACK)
    ensemble = load_model(
        f"ensemble:builtin:shapes-resnet + {' + '.join(OTHERS)}", mean_of="logits", dtype=torch.float64
    )
    classifiers = [first, *(load_model(uri, dtype=torch.float64) for uri in OTHERS), ensemble]
    examples = [methods["pgd"](model, images, SCENES.labels, **ATTACK).adversarial for model in classifiers]
    for row, batch in enumerate([images, *examples]):
        for column, model in enumerate(classifiers):
            accuracy = float((model(batch).argmax(1) == SCENES.labels).double().mean())
            assert report.accuracy[row, column] == pytest.approx(accuracy), (row, column)
    torch.testing.assert_close(report.adversarial, examples[-1])
    assert report.ensemble_accuracy == report.accuracy[-1, -1]
    assert report.member_accuracy.shape == report.transfer_accuracy.shape == (3,)
    assert report.worst_transfer_accuracy <= float(report.transfer_accuracy.min())
    assert (report.adversarial - images).abs().max() <= 4 / 255
    assert report.names[1] == "bit_depth(bits=2) | builtin:shapes-resnet"
    loaded = load_result(report.save(tmp_path / "table"))
    assert torch.equal(loaded.accuracy, report.accuracy) and loaded.lines() == report.lines()  # type: ignore[attr-defined]


def test_misclassified_images_count_as_errors() -> None:
    model = load_model("builtin:shapes-resnet")
    labels = (SCENES.labels + torch.tensor([1, 1, 0, 0])) % 10
    report = evaluation(model, SCENES.images, labels, **ATTACK)
    assert report.accuracy[0].tolist() == [0.5, 0.5]
    assert torch.equal(report.adversarial[:2], SCENES.images[:2])
    attacked = methods["pgd"](model, SCENES.images, labels, **ATTACK)
    assert (
        report.member_accuracy[0]
        == report.ensemble_accuracy
        == pytest.approx(1 - float(attacked.success.double().mean()))
    )


def test_members_of_other_classes_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot be compared"):
        evaluation(
            load_model("builtin:shapes-resnet"), SCENES.images, SCENES.labels,
            models=["torchvision:squeezenet1_1"],
        )  # fmt: skip
