"""Neuron visualization: oracle, every kind of unit, partial evaluation, closed ReLUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from phosphene import DivergenceError, InputError, Model, load_model, max_batch, methods, run
from phosphene.testing import Case, check

visualize = methods["synthesis.neuron_visualization"]


def test_oracle() -> None:
    assert visualize.spec.oracle is not None
    visualize.spec.oracle()


def test_score_of_each_kind_of_unit(model: Model) -> None:
    few: dict[str, Any] = {"layer": "2", "steps": 1, "seed": 0, "parametrization": "pixels"}
    few |= {"jitter": 0, "rotate": 0, "rescale": 1}
    start = visualize(model, lr=1e-12, **few).images[:1]
    maps = model.features(start, "2")[0]
    result = {unit: visualize(model, unit=unit, channels=(1, 3), direction=[2.0, -1.0], **few)
            for unit in ("neuron", "channel", "layer", "direction")}  # fmt: skip
    torch.testing.assert_close(result["neuron"].scores[0], maps[[1, 3], 2, 2], atol=1e-9, rtol=0)
    torch.testing.assert_close(result["channel"].scores[0], maps[[1, 3]].mean((1, 2)), atol=1e-9, rtol=0)
    torch.testing.assert_close(result["layer"].scores[0, 0], maps.square().mean(), atol=1e-9, rtol=0)
    torch.testing.assert_close(
        result["direction"].scores[0, 0], (2 * maps[1] - maps[3]).mean(), atol=1e-9, rtol=0
    )
    assert result["neuron"].targets == ("2[1,2,2]", "2[3,2,2]")
    assert visualize(model, unit="neuron", position=(0, 1), channels=(4,), **few).targets == ("2[4,0,1]",)


def test_every_regulariser_alone_and_all_together(model: Model) -> None:
    alone: list[dict[str, Any]] = [
        {"l2": 0.1}, {"total_variation": 0.05}, {"blur_every": 2}, {"clip_norm": 20},
        {"clip_contribution": 20}, {"jitter": 2}, {"rotate": 10.0}, {"rescale": 1.2},
        {"parametrization": "fourier"}, {"optimizer": "sgd"},
    ]  # fmt: skip
    bare: dict[str, Any] = {"l2": 0.0, "blur_every": 0, "jitter": 0, "parametrization": "pixels"}
    bare |= {"rotate": 0, "rescale": 1, "layer": "2", "channels": (0, 1), "steps": 10, "seed": 0}
    plain = visualize(model, **bare)
    assert (plain.scores[-1] > plain.scores[0]).all()
    together: dict[str, Any] = {}
    for one in alone:
        result = visualize(model, **bare | one)
        assert not torch.equal(result.images, plain.images), one
        together |= one
    assert visualize(model, **bare | together).images.shape == (2, 3, 12, 12)


@pytest.mark.parametrize("name", ["synthesis.neuron_visualization", "synthesis.class_visualization"])
@pytest.mark.parametrize("penalty", ["batch_norm", "diversity"])
def test_passes_of_the_penalties_are_within_the_cost(name: str, penalty: str) -> None:
    check(methods[name], "within_cost", Case(params={penalty: 0.5, "variants": 2, "steps": 40}))


def test_layers_above_do_not_run_and_batch_size_changes_nothing(model: Model) -> None:
    ran = []
    handle = model.module[3].register_forward_hook(lambda *_: ran.append(1))
    model.structure  # noqa: B018  - introspection runs the network once
    ran.clear()
    full = visualize(model, layer="2", channels=(0, 1, 2), steps=3, seed=0)
    handle.remove()
    assert not ran
    with max_batch(2):
        parts = visualize(model, layer="2", channels=(0, 1, 2), steps=3, seed=0)
    torch.testing.assert_close(parts.images, full.images, atol=1e-9, rtol=0)
    assert parts.scores.shape == (3, 3)
    # a linear layer has channels and no positions
    assert visualize(model, layer="6", channels=(0,), unit="neuron", steps=2).images.shape == (1, 3, 12, 12)


def test_inactive_unit_starts_from_coarse_noise_or_is_refused(model: Model) -> None:
    plain: dict[str, Any] = {"layer": "relu4_2", "channels": (0, 3), "steps": 3, "seed": 0}
    with pytest.raises(DivergenceError, match=r"\[0, 1\] cannot start"):
        run("neuron_visualization", start_noise=0.0, **plain)
    assert (run("neuron_visualization", **plain).scores[-1] > 0).all()
    with torch.no_grad():
        model.module[0].bias.fill_(-100.0)
    with pytest.raises(DivergenceError, match="cannot start"):
        visualize(model, layer="1", channels=(0,), steps=12)


def test_units_outside_the_layer_are_refused(model: Model) -> None:
    with pytest.raises(InputError, match="8 channels of 5x5"):
        visualize(model, layer="2", channels=(8,))
    with pytest.raises(InputError, match="5x5"):
        visualize(model, layer="2", unit="neuron", position=(5, 0))
    with pytest.raises(InputError, match="2 numbers, one per channel"):
        visualize(model, layer="2", unit="direction", channels=(0, 1), direction=[1.0])
    with pytest.raises(InputError, match="start needs one image, or 2"):
        visualize(model, torch.rand(3, 3, 12, 12), layer="2", channels=(0, 1))


def test_coarse_start_noise_does_not_depend_on_the_batch() -> None:
    conv = nn.Conv2d(3, 3, 1)
    with torch.no_grad():  # closed on the fine noise around 1/2, open on the bright areas of coarse noise
        conv.weight.fill_(1)
        conv.bias.fill_(-2)
    network = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(768, 2)).double()
    model = load_model(network, input_size=(3, 16, 16))
    few: dict[str, Any] = {"layer": "1", "steps": 1, "lr": 1e-12, "seed": 0, "parametrization": "pixels"}
    together = visualize(model, channels=(0, 1, 2), jitter=0, blur_every=0, start_noise=0.01, **few)
    alone = visualize(model, channels=(0,), jitter=0, blur_every=0, start_noise=0.01, **few)
    assert alone.images.std() > 0.1  # coarse
    torch.testing.assert_close(together.images[:1], alone.images, rtol=0, atol=1e-9)
