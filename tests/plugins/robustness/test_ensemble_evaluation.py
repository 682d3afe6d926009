"""Members, what is made on them, and the whole: the numbers are what the models say."""

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


def test_table_is_what_attacks_on_each_and_on_their_average_give(tmp_path: Path) -> None:
    # In double precision, where no sign of a gradient hangs on how batch norms are folded.
    first, images = load_model("builtin:shapes-resnet", dtype=torch.float64), SCENES.images.double()
    found = evaluation(first, images, SCENES.labels, models=OTHERS, mean_of="logits", **ATTACK)
    whole = load_model(
        f"ensemble:builtin:shapes-resnet + {' + '.join(OTHERS)}", mean_of="logits", dtype=torch.float64
    )
    asked = [first, *(load_model(uri, dtype=torch.float64) for uri in OTHERS), whole]
    examples = [methods["pgd"](model, images, SCENES.labels, **ATTACK).adversarial for model in asked]
    for row, pictures in enumerate([images, *examples]):
        for column, model in enumerate(asked):
            right = float((model(pictures).argmax(1) == SCENES.labels).double().mean())
            assert found.accuracy[row, column] == pytest.approx(right), (row, column)
    torch.testing.assert_close(found.adversarial, examples[-1])
    assert found.ensemble_accuracy == found.accuracy[-1, -1]
    assert found.member_accuracy.shape == found.transfer_accuracy.shape == (3,)
    assert found.worst_transfer_accuracy <= float(found.transfer_accuracy.min())
    assert (found.adversarial - images).abs().max() <= 4 / 255
    assert found.names[1] == "bit_depth(bits=2) | builtin:shapes-resnet"
    back = load_result(found.save(tmp_path / "table"))
    assert torch.equal(back.accuracy, found.accuracy) and back.lines() == found.lines()  # type: ignore[attr-defined]


def test_images_that_are_mistaken_from_the_outset_count_as_lost_and_batches_change_nothing() -> None:
    model = load_model("builtin:shapes-resnet")
    labels = (SCENES.labels + torch.tensor([1, 1, 0, 0])) % 10
    found = evaluation(model, SCENES.images, labels, **ATTACK)
    assert found.accuracy[0].tolist() == [0.5, 0.5]
    assert torch.equal(found.adversarial[:2], SCENES.images[:2])
    alone = methods["pgd"](model, SCENES.images, labels, **ATTACK)
    assert (
        found.member_accuracy[0]
        == found.ensemble_accuracy
        == pytest.approx(1 - float(alone.success.double().mean()))
    )


def test_members_of_other_classes_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot be compared"):
        evaluation(
            load_model("builtin:shapes-resnet"), SCENES.images, SCENES.labels,
            models=["torchvision:squeezenet1_1"],
        )  # fmt: skip
