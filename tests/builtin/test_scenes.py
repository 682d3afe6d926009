"""The bundled scenes and textures: endless by seed, true to their masks, not told by colour."""

from __future__ import annotations

import pytest
import torch

from phosphene.builtin.scenes import BACKGROUNDS, CLASSES, Scenes, draw_scenes
from phosphene.builtin.textures import TEXTURES, draw_texture
from phosphene.builtin.train import colour_only_accuracy


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


def test_a_scene_does_not_depend_on_what_is_drawn_with_it(scenes: Scenes) -> None:
    for start, count in ((0, 1), (37, 5), (250, 20), (599, 1)):
        part = slice(start, start + count)
        alone = draw_scenes(count, seed=3, start=start)
        expected = Scenes(
            scenes.images[part], scenes.labels[part], scenes.masks[part], scenes.backgrounds[part]
        )
        assert equal(alone, expected)


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
    draw_texture("dots", 32)
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


def test_area_does_not_tell_the_class(scenes: Scenes) -> None:
    area = scenes.masks.float().mean((1, 2))
    by_class = torch.stack([area[scenes.labels == c].mean() for c in range(len(CLASSES))])
    assert by_class.max() - by_class.min() < 0.025


def test_mask_is_where_the_object_is() -> None:
    """Two classes in one scene differ inside either mask or its shadow, and nowhere else."""
    one = draw_scenes(40, seed=1, classes=[0] * 40)
    two = draw_scenes(40, seed=1, classes=[6] * 40)
    changed = (one.images != two.images).any(1)
    either = one.masks | two.masks
    near = torch.nn.functional.max_pool2d(either.float()[:, None], 25, 1, 12)[:, 0] > 0
    assert not (changed & ~near).any()
    only_one_covers = one.masks ^ two.masks
    assert changed[only_one_covers].float().mean() > 0.97


def test_forced_classes_and_backgrounds_change_nothing_else(scenes: Scenes) -> None:
    same = draw_scenes(
        60,
        seed=3,
        classes=scenes.labels[:60].tolist(),
        background=scenes.backgrounds[:60].tolist(),
    )
    assert torch.equal(same.images, scenes.images[:60])
    kinds = [i % len(BACKGROUNDS) for i in range(60)]
    moved = draw_scenes(60, seed=3, background=kinds)
    assert moved.backgrounds.tolist() == kinds
    assert torch.equal(moved.labels, scenes.labels[:60])
    assert torch.equal(moved.masks, scenes.masks[:60])
    forced = draw_scenes(10, seed=3, classes=list(range(10)))
    assert forced.labels.tolist() == list(range(10))
    assert torch.equal(forced.backgrounds, scenes.backgrounds[:10])


def test_class_and_background_are_drawn_evenly_and_independently() -> None:
    from phosphene.builtin.drawing import integers, keys_of

    keys = keys_of(f"scene/0/train/{i}" for i in range(12_000))
    labels = integers(keys, "class", below=len(CLASSES))
    kinds = integers(keys, "background", below=len(BACKGROUNDS))
    counts = torch.zeros(len(CLASSES), len(BACKGROUNDS))
    counts.index_put_((labels, kinds), torch.ones(()), accumulate=True)
    chi_squared = ((counts - 200) ** 2 / 200).sum()
    assert chi_squared < 100  # 59 degrees of freedom: one in a thousand lies above 98


def test_colour_alone_does_not_tell_the_class(scenes: Scenes) -> None:
    held_out = draw_scenes(400, seed=3, split="test")
    assert colour_only_accuracy(scenes, held_out) < 0.18


def test_no_scenes_and_bad_requests() -> None:
    assert len(draw_scenes(0)) == 0
    for message, bad in (
        ("split must be", {"split": "validation"}),
        ("not be negative", {"start": -1}),
        ("2 class indices", {"classes": [0]}),
        ("class indices must lie in 0 … 9", {"classes": [0, 10]}),
        ("background indices must lie in 0 … 5", {"background": [-1, 0]}),
    ):
        with pytest.raises(ValueError, match=message):
            draw_scenes(2, **bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TEXTURES)
def test_textures_are_rich_and_repeatable(name: str) -> None:
    picture = draw_texture(name, 96, seed=2)
    assert picture.shape == (3, 96, 96)
    assert picture.dtype == torch.float32
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert picture.isfinite().all()
    assert picture.std(dim=(1, 2)).min() > 0.05
    assert torch.equal(picture, draw_texture(name, 96, seed=2))
    assert not torch.equal(picture, draw_texture(name, 96, seed=3))


def test_unknown_texture_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="pebbles"):
        draw_texture("plaid")
