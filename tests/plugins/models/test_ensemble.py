"""Ensembles: the average of several models is a model with logits, gradients and class names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from phosphene import InputError, ModelError, UnknownName, load_model, methods
from phosphene.builtin.scenes import draw_scenes

BOTH = "builtin:shapes-vgg + builtin:shapes-resnet"
IMAGES = draw_scenes(2, seed=1).images


@pytest.mark.parametrize("mean_of", ["probabilities", "logits"])
def test_logits_are_the_mean_of_the_members(mean_of: str) -> None:
    members = [load_model(uri) for uri in BOTH.split(" + ")]
    model = load_model(f"ensemble:{BOTH}", mean_of=mean_of)
    if mean_of == "logits":
        torch.testing.assert_close(model(IMAGES), sum(m(IMAGES) for m in members) / 2)
    else:
        expected = sum(m(IMAGES).softmax(1) for m in members) / 2
        torch.testing.assert_close(model(IMAGES).softmax(1), expected)
    assert model.classes == members[0].classes and model.input_size == members[0].input_size


def test_ensemble_is_attacked_explained_and_loaded_like_any_model() -> None:
    uri = f"ensemble:defended:bit_depth(bits=3)|{BOTH}"
    model = load_model(uri)
    assert model.digest != load_model(f"ensemble:{BOTH}").digest
    attacked = methods["pgd"](model, IMAGES, model(IMAGES).argmax(1), eps=16 / 255, steps=6, seed=0)
    assert attacked.success.any()
    assert methods["grad_cam"](model, IMAGES).maps.any()
    assert model.source is not None
    source = dict(model.source)
    loaded = load_model(source.pop("uri"), **source)
    assert loaded.digest == model.digest and torch.equal(loaded(IMAGES), model(IMAGES))
    assert torch.equal(model.copy()(IMAGES), model(IMAGES))
    defended = load_model(f"defended:median(size=3)|ensemble:{BOTH}")
    assert defended(IMAGES).shape == (2, 10)


def test_members_defenses_are_in_every_pass_and_in_the_gradient() -> None:
    model = load_model(
        "ensemble:defended:bit_depth(bits=1)|builtin:shapes-vgg + builtin:shapes-resnet", mean_of="logits"
    )
    members = [load_model("builtin:shapes-vgg"), load_model("builtin:shapes-resnet")]
    torch.testing.assert_close(model(IMAGES), (members[0](IMAGES.round()) + members[1](IMAGES)) / 2)
    saliency = methods["saliency"](model, IMAGES, 3)
    assert saliency.maps.isfinite().all() and saliency.maps.any()


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("builtin:shapes-vgg", {}, InputError, "must name several models"),
        (BOTH, {"weights": "DEFAULT"}, InputError, "weights of its own"),
        (BOTH, {"mean_of": "votes"}, InputError, "probabilities or of logits, not of 'votes'"),
        (f"{BOTH} + builtin:shapes-vg", {}, UnknownName, "shapes-vgg"),
        ("builtin:shapes-vgg + torchvision:squeezenet1_1", {}, ModelError, "cannot be compared"),
    ],
)
def test_invalid_ensembles_are_refused(name: str, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        load_model(f"ensemble:{name}", **options)
