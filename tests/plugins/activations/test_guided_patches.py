"""Guided patches: the guided gradient of each patch's unit, for the patches of top_patches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from phosphene import (
    Dataset,
    ModelError,
    Neuron,
    TensorDataset,
    guided,
    input_gradient,
    load_model,
    load_result,
    max_batch,
    methods,
    rewrite_backward,
    run,
)
from phosphene.testing.observation import assert_same_result

guided_patches = methods["activations.guided_patches"]

torch.manual_seed(0)
LAYERS = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 7, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
MODEL = load_model(nn.Sequential(*LAYERS, nn.Flatten(), nn.Linear(7, 2)).double(), input_size=(3, 14, 14))
IMAGES = torch.rand(8, 3, 14, 14, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_oracle():
    guided_patches.spec.oracle()


@pytest.mark.parametrize("layer", ["2", "3"])
@pytest.mark.parametrize("size", [1, 5, 32])
def test_gradient_is_that_of_the_patchs_unit_and_zero_outside_the_patch(layer, size):
    arguments = {"layer": layer, "channels": [0, 4, 6], "k": 4}
    with max_batch(size):
        result = guided_patches(MODEL, TensorDataset(IMAGES), **arguments)
    top = methods["top_patches"](MODEL, TensorDataset(IMAGES), **arguments)
    for name, value in top.fields():
        if name != "gradients":
            # Up to rounding: the optimized copy runs where there are enough passes for it to be faster.
            assert_same_result(getattr(result, name), value, rtol=1e-12, atol=1e-15)
    for i, (y, x) in enumerate(result.positions.tolist()):
        image = IMAGES[int(result.ids[i])][None]
        with MODEL.guard(), rewrite_backward(guided):
            full_gradient = input_gradient(MODEL, image, Neuron(layer, result.channels[i], y, x))[0]
        t, s, b, r = result.boxes[i].tolist()
        torch.testing.assert_close(result.gradients[i, :, : b - t, : r - s], full_gradient[:, t:b, s:r])
        full_gradient[:, t:b, s:r] = 0
        assert not full_gradient.any() and not result.gradients[i, :, b - t :].any()
        assert not result.gradients[i, :, :, r - s :].any()


def test_layer_without_a_relu_below_is_refused_before_reading():
    class Unread(Dataset):
        def __len__(self):
            return 3

        def read(self, indices):
            raise AssertionError("read before the layer was checked")

    with pytest.raises(ModelError, match="found no ReLU"):
        guided_patches(MODEL, Unread(), layer="0")


def test_layer_without_a_map_is_refused():
    with pytest.raises(ModelError, match="not a map|no map|spatial"):
        run("guided_patches", dataset="builtin:scenes/2", layer="classifier")


def test_estimated_passes_depend_on_the_number_of_channels():
    method = guided_patches
    inputs = {"model": MODEL, "dataset": TensorDataset(IMAGES)}
    for channels, count in ((None, 6), ([3, 4], 2), ("all", 7)):
        params = method.validate({"channels": channels, "k": 3, "layer": "2"})
        assert method.passes(inputs, params) == (1 + 8 + 3 * count, 1 + 3 * count)


@pytest.mark.parametrize("channels", [None, "all"])
def test_figure_has_patches_and_guided_gradients_and_saving(channels, tmp_path):
    arguments = {"dataset": "builtin:scenes/6", "layer": "features.3", "k": 2}
    result = run("guided_patches", **arguments, channels=channels, out=tmp_path / "out")
    assert_same_result(load_result(tmp_path / "out"), result)
    count = len(set(result.channels))
    assert len(result.panels()) == (3 * count if channels is None else count)
    assert (tmp_path / "out" / "pictures").is_dir() == (channels == "all")


def test_gradient_of_photographs_is_largest_at_the_center_of_the_patch(assets):
    weights = assets / "weights" / "mobilenet_v2.coral-ptq.torchvision.safetensors"
    model = load_model("torchvision:mobilenet_v2", weights=str(weights))
    photographs = sorted((assets / "images" / "demo").glob("*.png"))
    dataset = TensorDataset(torch.stack([model.transform(path) for path in photographs]))
    result = guided_patches(model, dataset, layer="features.7.conv.2", channels=[0, 22], k=2)
    for i, gradient in enumerate(result.gradients):
        top, left, bottom, right = result.boxes[i].tolist()
        inside = gradient[:, : bottom - top, : right - left].abs().sum(0)
        assert inside.max() > 0
        # The unit is at the center of its receptive field, where most of the gradient is.
        y, x = ((p + 0.5) * 224 / 14 for p in result.positions[i].tolist())
        rows = (torch.arange(top, bottom) + 0.5 - y).abs() < 48
        columns = (torch.arange(left, right) + 0.5 - x).abs() < 48
        assert inside[rows][:, columns].sum() > 0.8 * inside.sum()
