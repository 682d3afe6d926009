"""Transfer: who is fooled by whose examples, counted where both were right."""

from __future__ import annotations

import pytest
import torch

from phosphene import InputError, ModelError, PhospheneError, load_model, load_result, methods, run

transfer = methods["attacks.transfer"]
OTHERS = ["builtin:shapes-resnet"]


def test_table_is_what_the_models_say_of_the_examples(tmp_path) -> None:
    found = run("transfer", models=OTHERS, images="builtin:scenes/12", steps=4, seed=0, progress=False)
    models = [load_model("builtin:shapes-vgg"), load_model(OTHERS[0])]
    labels = models[0](found.images).argmax(1)
    right = [m(found.images).argmax(1) == labels for m in models]
    for i in range(2):
        for j, victim in enumerate(models):
            both = right[i] & right[j]
            wrong = victim(found.adversarial[i]).argmax(1) != labels
            assert int(found.counts[i, j]) == int(both.sum())
            assert float(found.rates[i, j]) == pytest.approx(float((wrong & both).sum() / both.sum()))
    assert found.names == ("builtin:shapes-vgg", *OTHERS)
    assert (found.adversarial - found.images).abs().max() <= 16 / 255
    back = load_result(found.save(tmp_path / "table"))
    assert torch.equal(back.rates, found.rates)
    assert back.png()


def test_without_momentum_and_changes_it_is_bim() -> None:
    model = load_model("builtin:shapes-vgg")
    images = run("bim", images="builtin:scenes/3", steps=1, progress=False).images
    labels = model(images).argmax(1)
    params = {"eps": 0.03, "step_size": 0.01, "steps": 3}
    ours = transfer(model, images, labels, momentum=0.0, augmentations=(), **params)
    torch.testing.assert_close(
        ours.adversarial[0], methods["bim"](model, images, labels, **params).adversarial
    )


def test_models_that_do_not_fit_are_refused() -> None:
    model, images = load_model("builtin:shapes-vgg"), torch.rand(1, 3, 64, 64)
    with pytest.raises(ModelError, match="means nothing to the other"):
        transfer(model, images, [0], models=["torchvision:squeezenet1_1"])
    with pytest.raises(PhospheneError, match="shapes-resnt"):
        transfer(model, images, [0], models=["builtin:shapes-resnt"])
    with pytest.raises(InputError):
        transfer(model, images, [0], models=[3])
