"""Activation statistics: streamed sums equal those of all images, in any order; mask coverage is exact."""

from __future__ import annotations

import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phosphene import TensorDataset, load_model, load_result, max_batch, methods, run
from phosphene.testing.observation import assert_same_result
from phosphene_plugins.activations.activation_statistics import mask_coverage

activation_statistics = methods["activations.activation_statistics"]

torch.manual_seed(0)
MODEL = load_model(
    nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4), nn.ReLU()
    ).double(),
    input_size=(3, 11, 11),
)
IMAGES = torch.rand(9, 3, 11, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CLASSES = ["b", "a", "b", "c", "a", "a", "c", "b", "b"]
MASKS = torch.rand(9, 11, 11, generator=torch.Generator().manual_seed(2)) > 0.6


def data(order: list[int]) -> TensorDataset:
    return TensorDataset(IMAGES[order], [CLASSES[i] for i in order], MASKS[order])


def test_oracle():
    activation_statistics.spec.oracle()


def test_streamed_statistics_equal_those_of_all_images_at_once():
    result = activation_statistics(MODEL, data(list(range(9))), layer="0")
    with torch.no_grad():
        maps = MODEL.features(IMAGES, "0")
    every = maps.transpose(0, 1).flatten(1)
    torch.testing.assert_close(result.active_fraction, (every > 0).double().mean(1))
    torch.testing.assert_close(result.active_image_fraction, (maps.amax((2, 3)) > 0).double().mean(0))
    torch.testing.assert_close(result.image_active_fraction, (maps > 0).double().mean((1, 2, 3)))
    torch.testing.assert_close(result.mean, every.mean(1))
    torch.testing.assert_close(result.std, every.std(1, unbiased=False))
    rows = [[i for i, name in enumerate(CLASSES) if name == label] for label in "abc"]
    means = torch.stack([maps.relu()[r].mean((0, 2, 3)) for r in rows])
    for channel in range(6):
        best = int(means[:, channel].argmax())
        rest = means[[i for i in range(3) if i != best], channel].mean()
        index = (means[best, channel] - rest) / (means[best, channel] + rest)
        torch.testing.assert_close(result.selectivity[channel], index)
        assert result.classes[int(result.preferred_class[channel])] == "abc"[best]


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(9)), batch=st.integers(1, 9), layer=st.sampled_from(["1", "4", "5"]))
def test_statistics_do_not_depend_on_order_and_batch_size(order, batch, layer):
    full = activation_statistics(MODEL, data(list(range(9))), layer=layer)
    with max_batch(batch):
        parts = activation_statistics(MODEL, data(order), layer=layer)
    torch.testing.assert_close(parts.image_active_fraction, full.image_active_fraction[order])
    for name, value in full.fields():
        if isinstance(value, Tensor) and name != "image_active_fraction":
            torch.testing.assert_close(getattr(parts, name), value, msg=name)
    assert (parts.dead, parts.always_on, parts.classes) == (full.dead, full.always_on, full.classes)


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 13), width=st.integers(1, 13), h=st.integers(1, 15), w=st.integers(1, 15),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_mask_coverage_of_grid_cells_is_exact(height, width, h, w, seed):
    mask = torch.rand(1, height, width, generator=torch.Generator().manual_seed(seed)) > 0.5
    fine = mask.repeat_interleave(h, 1).repeat_interleave(w, 2).double()  # cells and pixels fit both
    expected = fine.unflatten(1, (h, height)).unflatten(3, (w, width)).mean((2, 4))
    torch.testing.assert_close(mask_coverage(mask.double(), (h, w)), expected)


def test_background_reliance_of_a_constant_map_is_the_background_area():
    flat = nn.Sequential(nn.Conv2d(3, 1, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    nn.init.zeros_(flat[0].weight), nn.init.ones_(flat[0].bias)
    result = activation_statistics(load_model(flat, input_size=(3, 11, 11)), data(list(range(9))), layer="0")
    torch.testing.assert_close(result.background_reliance[0], result.background_area)
    torch.testing.assert_close(result.background_area, 1 - MASKS.float().mean())


def test_images_without_a_mask_are_left_out_of_the_background_reliance_only():
    class Some(TensorDataset):
        def masks(self, indices):
            return None if set(indices) & {0, 3} else super().masks(indices)

    masked = [1, 2, 4, 5, 6, 7, 8]
    with max_batch(4):
        result = activation_statistics(MODEL, Some(IMAGES, None, MASKS), layer="1")
    torch.testing.assert_close(
        result.background_reliance, activation_statistics(MODEL, data(masked), layer="1").background_reliance
    )
    assert len(result.ids) == 9 and result.selectivity is None and result.classes == ()


def test_statistics_without_classes_or_masks_are_none():
    bare = activation_statistics(MODEL, TensorDataset(IMAGES, ["one"] * 9), layer="1")
    assert bare.selectivity is None and bare.preferred_class is None
    assert bare.background_reliance is None and bare.background_area is None
    vectors = activation_statistics(MODEL, data(list(range(9))), layer="5")
    assert vectors.background_reliance is None and vectors.selectivity.shape == (4,)


def test_class_token_is_left_out():
    vit = load_model(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1), input_size=(3, 32, 32))
    images = torch.rand(2, 3, 32, 32)
    result = activation_statistics(vit, TensorDataset(images), layer="blocks.0.mlp.act")
    with torch.no_grad(), vit.guard():
        tokens = vit.features(images, "blocks.0.mlp.act")[:, 1:]
    torch.testing.assert_close(result.active_fraction, (tokens > 0).float().mean((0, 1)))


def test_figures_with_and_without_classes_and_masks_and_saving(tmp_path):
    for dataset in (data(list(range(9))), TensorDataset(IMAGES, CLASSES), TensorDataset(IMAGES, None, MASKS)):
        result = activation_statistics(MODEL, dataset, layer="1")
        assert result.figure() is not None and result.lines()[1].startswith("dead: ")
    result = run(
        "activation_statistics", dataset="builtin:scenes/8", layer="features.11", out=tmp_path / "out"
    )
    assert_same_result(load_result(tmp_path / "out"), result)
