"""The bundled scenes: any number for a seed, consistent with their masks, not classified by color."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phosphene.builtin.drawing import integers, keys_of
from phosphene.builtin.scenes import BACKGROUNDS, CLASSES, Scenes, _draw, draw_scenes


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes(600, seed=3)


def equal(a: Scenes, b: Scenes) -> bool:
    return all(
        torch.equal(getattr(a, field), getattr(b, field))
        for field in ("images", "labels", "masks", "backgrounds")
    )


def test_shapes_types_and_ranges(scenes: Scenes) -> None:
    assert len(scenes) == 600
    assert scenes.images.shape == (600, 3, 64, 64)
    assert scenes.images.dtype == torch.float32
    assert scenes.masks.shape == (600, 64, 64)
    assert scenes.masks.dtype == torch.bool
    assert scenes.labels.dtype == scenes.backgrounds.dtype == torch.int64
    assert scenes.images.isfinite().all()
    assert scenes.images.min() >= 0
    assert scenes.images.max() <= 1
    assert set(scenes.labels.tolist()) == set(range(len(CLASSES)))
    assert set(scenes.backgrounds.tolist()) == set(range(len(BACKGROUNDS)))


def test_images_survive_eight_bits_exactly(scenes: Scenes) -> None:
    bytes_ = (scenes.images * 255).round().to(torch.uint8)
    assert torch.equal(bytes_.float() / 255, scenes.images)


def test_a_scene_does_not_depend_on_the_others_of_a_batch(scenes: Scenes) -> None:
    for start, count in ((0, 1), (37, 5), (250, 20), (599, 1)):
        part = slice(start, start + count)
        single = draw_scenes(count, seed=3, start=start)
        expected = Scenes(
            scenes.images[part], scenes.labels[part], scenes.masks[part], scenes.backgrounds[part]
        )
        assert equal(single, expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_scene_does_not_depend_on_the_number_of_threads(scenes: Scenes, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(draw_scenes(100, seed=3).images, scenes.images[:100])
    finally:
        torch.set_num_threads(before)


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draw_scenes(3)
    assert torch.equal(before, torch.get_rng_state())


def test_streams_are_disjoint(scenes: Scenes) -> None:
    streams = [scenes.images[:50], draw_scenes(50, seed=3, split="test").images]
    streams += [draw_scenes(50, seed=4).images, draw_scenes(50, seed=3, start=600).images]
    flat = torch.cat(streams).flatten(1)
    assert len(flat.unique(dim=0)) == len(flat)


def test_masks_cover_a_tenth_to_a_fifth(scenes: Scenes) -> None:
    area = scenes.masks.float().mean((1, 2))
    assert area.min() >= 0.09
    assert area.max() <= 0.21
    assert 0.14 <= area.mean() <= 0.18


def test_area_does_not_predict_the_class(scenes: Scenes) -> None:
    area = scenes.masks.float().mean((1, 2))
    by_class = torch.stack([area[scenes.labels == c].mean() for c in range(len(CLASSES))])
    assert by_class.max() - by_class.min() < 0.025


def test_mask_is_where_the_object_is() -> None:
    """Two classes in one scene differ inside either mask or its shadow, and nowhere else."""
    keys, kinds = keys_of(f"scene/1/train/{i}" for i in range(40)), draw_scenes(40, seed=1).backgrounds
    one_images, one_masks = _draw(keys, torch.full((40,), 0), kinds)
    two_images, two_masks = _draw(keys, torch.full((40,), 6), kinds)
    changed = (one_images != two_images).any(1)
    near = F.max_pool2d((one_masks | two_masks).float()[:, None], 25, 1, 12)[:, 0] > 0
    assert not (changed & ~near).any()
    only_one_covers = one_masks ^ two_masks
    assert changed[only_one_covers].float().mean() > 0.97


def test_the_object_does_not_depend_on_the_background(scenes: Scenes) -> None:
    keys = keys_of(f"scene/3/train/{i}" for i in range(60))
    _, masks = _draw(keys, scenes.labels[:60], torch.arange(60) % len(BACKGROUNDS))
    assert torch.equal(masks, scenes.masks[:60])


def test_class_and_background_are_drawn_evenly_and_independently() -> None:
    keys = keys_of(f"scene/0/train/{i}" for i in range(12_000))
    labels = integers(keys, "class", below=len(CLASSES))
    kinds = integers(keys, "background", below=len(BACKGROUNDS))
    counts = torch.zeros(len(CLASSES), len(BACKGROUNDS))
    counts.index_put_((labels, kinds), torch.ones(()), accumulate=True)
    chi_squared = ((counts - 200) ** 2 / 200).sum()
    assert chi_squared < 100  # 59 degrees of freedom: one in a thousand lies above 98


def color_only_accuracy(train: Scenes, test: Scenes) -> float:
    """Test accuracy of logistic regression on color histograms (4x4x4 bins)."""

    def histograms(scenes: Scenes) -> Tensor:
        levels = (scenes.images * 3.999).long()
        bins = (levels[:, 0] * 16 + levels[:, 1] * 4 + levels[:, 2]).flatten(1)
        counts = torch.zeros(len(bins), 64).scatter_add_(1, bins, torch.ones(()).expand_as(bins))
        return (counts / bins.shape[1]).sqrt()

    inputs, weight = histograms(train), torch.zeros(64, len(CLASSES), requires_grad=True)
    bias = torch.zeros(len(CLASSES), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight + bias, train.labels) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert ((inputs @ weight + bias).argmax(1) == train.labels).double().mean() > 0.2  # it does learn
    return ((histograms(test) @ weight + bias).argmax(1) == test.labels).double().mean().item()


def test_color_alone_does_not_predict_the_class(scenes: Scenes) -> None:
    held_out = draw_scenes(400, seed=3, split="test")
    assert color_only_accuracy(scenes, held_out) < 0.18


def test_no_scenes_and_bad_requests() -> None:
    assert len(draw_scenes(0)) == 0
    with pytest.raises(ValueError, match="split must be"):
        draw_scenes(2, split="validation")  # type: ignore[arg-type]
