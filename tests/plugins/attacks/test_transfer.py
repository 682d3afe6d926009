"""Transfer: rates over the images that both models classify correctly."""

from __future__ import annotations

import pytest
import torch

from phosphene import InputError, ModelError, PhospheneError, load_model, load_result, methods, run

transfer = methods["attacks.transfer"]
OTHERS = ["builtin:shapes-resnet"]


def test_rates_equal_the_predictions_for_the_examples(tmp_path) -> None:
    result = run("transfer", models=OTHERS, images="builtin:scenes/12", steps=4, seed=0, progress=False)
    models = [load_model("builtin:shapes-vgg"), load_model(OTHERS[0])]
    labels = models[0](result.images).argmax(1)
    right = [m(result.images).argmax(1) == labels for m in models]
    for i in range(2):
        for j, target in enumerate(models):
            correct = right[i] & right[j]
            wrong = target(result.adversarial[i]).argmax(1) != labels
            assert int(result.counts[i, j]) == int(correct.sum())
            assert float(result.rates[i, j]) == pytest.approx(float((wrong & correct).sum() / correct.sum()))
    assert result.names == ("builtin:shapes-vgg", *OTHERS)
    assert (result.adversarial - result.images).abs().max() <= 16 / 255
    loaded = load_result(result.save(tmp_path / "table"))
    assert torch.equal(loaded.rates, result.rates)
    assert loaded.png()


def test_without_momentum_and_augmentations_equals_bim() -> None:
    model = load_model("builtin:shapes-vgg")
    images = run("bim", images="builtin:scenes/3", steps=1, progress=False).images
    labels = model(images).argmax(1)
    params = {"eps": 0.03, "step_size": 0.01, "steps": 3}
    transfer_result = transfer(model, images, labels, momentum=0.0, augmentations=(), **params)
    torch.testing.assert_close(
        transfer_result.adversarial[0], methods["bim"](model, images, labels, **params).adversarial
    )


def test_incompatible_models_raise() -> None:
    model, images = load_model("builtin:shapes-vgg"), torch.rand(1, 3, 64, 64)
    with pytest.raises(ModelError, match="cannot be compared"):
        transfer(model, images, [0], models=["torchvision:squeezenet1_1"])
    with pytest.raises(PhospheneError, match="shapes-resnt"):
        transfer(model, images, [0], models=["builtin:shapes-resnt"])
    with pytest.raises(InputError):
        transfer(model, images, [0], models=[3])
