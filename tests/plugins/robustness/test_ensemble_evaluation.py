"""Members, what is made on them, and the whole: the numbers are what the models say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from phosphene import ModelError, load_model, load_result, methods
from phosphene.builtin.scenes import draw_scenes

evaluation = methods["robustness.ensemble_evaluation"]
SCENES = draw_scenes(6, seed=3, split="test")
OTHERS = ["defended:bit_depth(bits=2)|builtin:shapes-resnet", "builtin:shapes-vgg"]
ATTACK = {"eps": 4 / 255, "step_size": 1 / 255, "steps": 4}


def test_table_is_what_attacks_on_each_and_on_their_average_give(tmp_path: Path) -> None:
    first = load_model("builtin:shapes-resnet")
    found = evaluation(first, SCENES.images, SCENES.labels, models=OTHERS, mean_of="logits", **ATTACK)
    whole = load_model(f"ensemble:builtin:shapes-resnet + {' + '.join(OTHERS)}", mean_of="logits")
    asked = [first, *map(load_model, OTHERS), whole]
    examples = [methods["bim"](model, SCENES.images, SCENES.labels, **ATTACK).adversarial for model in asked]
    for row, pictures in enumerate([SCENES.images, *examples]):
        for column, model in enumerate(asked):
            right = float((model(pictures).argmax(1) == SCENES.labels).double().mean())
            assert found.accuracy[row, column] == pytest.approx(right), (row, column)
    torch.testing.assert_close(found.adversarial, examples[-1])
    assert found.whole == found.accuracy[-1, -1] and found.alone.shape == found.transferred.shape == (3,)
    assert found.whole <= found.borrowed <= float(found.transferred.min())
    assert (found.adversarial - SCENES.images).abs().max() <= 4 / 255
    assert found.names[1] == "bit_depth(bits=2) | builtin:shapes-resnet"
    back = load_result(found.save(tmp_path / "table"))
    assert torch.equal(back.accuracy, found.accuracy) and back.lines() == found.lines()  # type: ignore[attr-defined]


def test_images_that_are_mistaken_from_the_outset_count_as_lost_and_batches_change_nothing() -> None:
    model = load_model("builtin:shapes-resnet")
    labels = (SCENES.labels + torch.tensor([1] * 3 + [0] * 3)) % 10
    found = evaluation(model, SCENES.images, labels, **ATTACK)
    assert found.accuracy[0, 0] == found.accuracy[0, 1] == 0.5
    assert torch.equal(found.adversarial[:3], SCENES.images[:3])
    alone = methods["bim"](model, SCENES.images, labels, **ATTACK)
    assert found.alone[0] == found.whole == pytest.approx(1 - float(alone.success.double().mean()))


def test_members_of_other_classes_are_refused() -> None:
    with pytest.raises(ModelError, match="means nothing to the other"):
        evaluation(
            load_model("builtin:shapes-resnet"), SCENES.images, SCENES.labels,
            models=["torchvision:squeezenet1_1"],
        )  # fmt: skip
