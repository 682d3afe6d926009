"""Occlusion: equality with brute force, and every parameter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phosphene import InputError, Model, Neuron, load_model, max_batch, methods
from phosphene.builtin.scenes import draw_scenes
from phosphene.images import gaussian_blur, noise_images

occlusion = methods["attribution.occlusion"]


def small_model() -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    return load_model(network.double())


def random_images(height: int = 9, width: int = 7) -> Tensor:
    return torch.rand(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_oracle() -> None:
    occlusion.spec.oracle()


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 9), st.integers(4, 9), st.integers(1, 12), st.data(), st.sampled_from(["mean", "sum"]))
def test_every_pixel_combines_the_drops_of_its_windows(
    height: int, width: int, window: int, data: st.DataObject, aggregate: str
) -> None:
    stride = data.draw(st.integers(1, window))
    model, images = small_model(), random_images(height, width)
    maps = occlusion(model, images, 1, window=window, stride=stride, aggregate=aggregate).maps
    total, times = torch.zeros(2, height, width, dtype=torch.float64), torch.zeros(height, width)
    top = 0
    while True:
        left = 0
        while True:
            mask = torch.zeros(height, width, dtype=torch.bool)
            mask[top : top + window, left : left + window] = True
            with torch.no_grad():
                drop = model(images)[:, 1] - model(torch.where(mask, 0.5, images))[:, 1]
            total[:, mask] += drop[:, None]
            times += mask
            if left + window >= width:
                break
            left += stride
        if top + window >= height:
            break
        top += stride
    assert times.min() >= 1
    torch.testing.assert_close(maps, total / times if aggregate == "mean" else total)


def test_the_batch_size_does_not_change_the_result() -> None:
    model, images = small_model(), random_images()
    batch_sizes: list[int] = []
    full = occlusion(model, images, window=3).maps
    handle = model.module.register_forward_pre_hook(lambda _, args: batch_sizes.append(len(args[0])))
    with max_batch(4):
        parts = occlusion(model, images, window=3).maps
    handle.remove()
    assert max(batch_sizes) == 4
    torch.testing.assert_close(parts, full, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("height", "width", "params"), [(9, 7, {}), (16, 20, {"window": 5}), (6, 6, {"window": 9})]
)
def test_the_cost_equals_the_number_of_forward_passes(
    height: int, width: int, params: dict[str, int]
) -> None:
    model, images = small_model(), random_images(height, width)
    model = model.for_images(images)
    assert model.structure
    batch_sizes: list[int] = []
    model.module.register_forward_pre_hook(lambda _, args: batch_sizes.append(len(args[0])))
    occlusion(model, images, 0, **params)
    full = occlusion.validate(params)
    assert occlusion.spec.cost is not None
    assert occlusion.spec.cost.evaluate(full, images=2, height=height, width=width) == (sum(batch_sizes), 0)


def test_the_default_target_is_predicted_for_the_unoccluded_image() -> None:
    """A prediction that changes under occlusion must not change the target."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False))
    network[1].weight.data = torch.stack([torch.ones(12), torch.full((12,), 0.9)])
    network[1].weight.data[1, 0] = -5.0
    result = occlusion(load_model(network), torch.ones(1, 3, 2, 2), window=1, stride=1, baseline="zero")
    assert result.targets == ("class 0",)
    torch.testing.assert_close(result.maps, torch.full((1, 2, 2), 3.0))


def test_noise_is_the_same_for_all_images_and_depends_on_the_seed() -> None:
    model = small_model()
    repeated = random_images()[:1].expand(3, -1, -1, -1).clone()
    with max_batch(2):
        maps = occlusion(model, repeated, 0, baseline="noise", seed=3).maps
    assert torch.equal(maps[0], maps[1])
    assert torch.allclose(maps[0], maps[2], rtol=1e-12)
    assert torch.allclose(
        maps[:1], occlusion(model, repeated[:1], 0, baseline="noise", seed=3).maps, rtol=1e-12
    )
    assert not torch.allclose(maps[:1], occlusion(model, repeated[:1], 0, baseline="noise", seed=4).maps)


@pytest.mark.parametrize("baseline", ["gray", "zero", "mean", "blur", "noise"])
def test_occluding_everything_drops_to_the_baselines_score(baseline: str) -> None:
    model, images = small_model(), random_images()
    maps = occlusion(model, images, 2, window=9, baseline=baseline, seed=0).maps
    assert (maps == maps[:, :1, :1]).all()
    blank = {"gray": torch.full_like(images, 0.5), "zero": torch.zeros_like(images)}
    blank["mean"] = images.mean((2, 3), keepdim=True).expand_as(images)
    blank["blur"] = gaussian_blur(images, 4.5)
    blank["noise"] = noise_images((2, 3, 9, 7), seed=0, sd=0.3).double()
    with torch.no_grad():
        drop = (model(images) - model(blank[baseline]))[:, 2]
    torch.testing.assert_close(maps[:, 0, 0], drop)


def test_a_constant_image_equals_its_mean_and_blur() -> None:
    flat = torch.full((1, 3, 8, 8), 0.3, dtype=torch.float64)
    for baseline in ("mean", "blur"):
        assert occlusion(small_model(), flat, baseline=baseline).maps.abs().max() < 1e-12


def test_the_drop_of_a_probability_is_that_of_the_softmax() -> None:
    model, images = small_model(), random_images()
    maps = occlusion(model, images, window=9, baseline="zero", score="probability").maps
    with torch.no_grad():
        before, after = model(images).softmax(1), model(torch.zeros_like(images)).softmax(1)
    top = before.argmax(1)
    torch.testing.assert_close(maps[:, 0, 0], (before - after)[[0, 1], top])


def test_a_neurons_map_is_zero_outside_its_receptive_field() -> None:
    maps = occlusion(small_model(), random_images(), Neuron("0", 1, 4, 3), window=1).maps
    outside = torch.ones(9, 7, dtype=torch.bool)
    outside[3:6, 2:5] = False
    assert maps[:, outside].abs().max() < 1e-12
    assert (maps[:, 3:6, 2:5] != 0).all()


def test_smoothing_keeps_the_sum() -> None:
    rough, smooth = (occlusion(small_model(), random_images(), 0, window=2, smooth=s).maps for s in (0, 1.5))
    torch.testing.assert_close(rough.sum((1, 2)), smooth.sum((1, 2)))
    assert smooth.std() < rough.std()


def test_a_stride_that_skips_pixels_and_a_neurons_probability_are_refused() -> None:
    model, images = small_model(), random_images()
    with pytest.raises(InputError, match="stride=4"):
        occlusion(model, images, window=3, stride=4)
    with pytest.raises(InputError, match="probability"):
        occlusion(model, images, "0[1]", score="probability")


def test_peaks_lie_on_the_objects_of_the_bundled_scenes() -> None:
    scenes = draw_scenes(12, seed=11, split="test")
    heat = occlusion(load_model("builtin:shapes-vgg"), scenes.images, scenes.labels.tolist(), stride=8).heat()
    peaks = heat.flatten(1).argmax(1)
    assert scenes.masks.flatten(1)[torch.arange(12), peaks].float().mean() > 0.8
