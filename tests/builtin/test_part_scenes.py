"""Scenes of objects made of parts: streams, and the same scene without a part or with another's shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phosphene.builtin.part_scenes import (
    PART_CLASSES,
    PART_NAMES,
    PARTS,
    SIZE,
    PartScenes,
    draw_part_scenes,
)
from phosphene.errors import InputError, UnknownName


@pytest.fixture(scope="module")
def scenes() -> PartScenes:
    return draw_part_scenes(12, seed=3)


def near(mask: Tensor, pixels: int) -> Tensor:
    """A mask (H, W) grown by a number of pixels."""
    return F.max_pool2d(mask[None].float(), 2 * pixels + 1, 1, pixels)[0].bool()


def test_shapes_types_and_values(scenes: PartScenes) -> None:
    assert scenes.images.shape == (12, 3, SIZE, SIZE) and scenes.images.dtype == torch.float32
    assert torch.equal((scenes.images * 255).round() / 255, scenes.images)
    assert scenes.images.min() >= 0 and scenes.images.max() <= 1
    assert scenes.part_maps.shape == (12, SIZE, SIZE) and scenes.part_maps.min() == -1
    for index in range(len(scenes)):
        masks = scenes.part_masks(index)
        assert len(masks) == len(scenes.parts(index)) and masks.any((1, 2)).all()
        assert torch.equal(masks.any(0), scenes.masks[index])
        assert 0.03 < scenes.masks[index].double().mean() < 0.5


def test_a_scene_depends_on_its_index_alone(scenes: PartScenes) -> None:
    single = draw_part_scenes(1, seed=3, start=7)
    assert torch.equal(single.images[0], scenes.images[7])
    assert torch.equal(single.part_maps[0], scenes.part_maps[7])
    assert not torch.equal(draw_part_scenes(1, seed=4, start=7).images, single.images)
    assert not torch.equal(draw_part_scenes(1, seed=3, start=7, split="test").images, single.images)
    assert len(draw_part_scenes(0)) == 0


def test_pixels_are_those_that_the_network_was_trained_on() -> None:
    means = draw_part_scenes(2).images.mean((2, 3)) * 255
    expected = torch.tensor([[101.801, 103.367, 67.105], [145.370, 169.994, 193.506]])
    assert torch.allclose(means, expected, atol=0.01)


@pytest.mark.parametrize("index", range(4))
def test_removing_a_part_changes_only_its_surroundings(scenes: PartScenes, index: int) -> None:
    for number, name in enumerate(scenes.parts(index)):
        without = draw_part_scenes(1, seed=3, start=index, remove=[name])
        mask = scenes.part_masks(index)[number]
        assert not (without.part_maps[0] == number).any()
        outside = ~mask
        assert torch.equal(without.part_maps[0][outside], scenes.part_maps[index][outside])
        # Its shadow falls up to 9 pixels away, and is soft.
        changed = (without.images[0] != scenes.images[index]).any(0)
        assert changed[mask].double().mean() > 0.5
        assert not changed[~near(mask, 18)].any()


def test_an_exchanged_part_is_drawn_in_the_other_shape_at_its_position(scenes: PartScenes) -> None:
    labels = scenes.labels.tolist()
    index = next(i for i, label in enumerate(labels) if PART_CLASSES[label] in ("cat", "bear"))
    cat_or_bear = draw_part_scenes(1, seed=3, start=index)
    own, other = ("cat", "bear") if PART_CLASSES[labels[index]] == "cat" else ("bear", "cat")
    changed = draw_part_scenes(1, seed=3, start=index, exchange={"ears": f"{other}.ears"})
    same = draw_part_scenes(1, seed=3, start=index, exchange={"ears": f"{own}.ears"})
    assert torch.equal(same.images, cat_or_bear.images)
    ears = cat_or_bear.part_maps[0] == PARTS[own].index("ears")
    others = changed.part_maps[0] == PARTS[own].index("ears")
    assert 0.2 < (ears & others).sum() / (ears | others).sum() < 0.9
    different = (changed.images[0] != cat_or_bear.images[0]).any(0)
    assert different.any() and not different[~near(ears | others, 18)].any()


def test_unknown_parts_and_splits_are_refused() -> None:
    with pytest.raises(UnknownName, match="wheels"):
        draw_part_scenes(1, remove=["wheel"])
    with pytest.raises(UnknownName, match="ears"):
        draw_part_scenes(1, exchange={"ear": "cat.ears"})
    with pytest.raises(UnknownName, match=r"cat\.ears"):
        draw_part_scenes(1, exchange={"ears": "cat.ear"})
    with pytest.raises(InputError, match="split must be"):
        draw_part_scenes(1, split="validation")  # type: ignore[arg-type]


def test_every_class_can_be_drawn_without_all_of_its_parts() -> None:
    bare = draw_part_scenes(2, remove=PART_NAMES)
    assert not bare.masks.any()
