"""The bundled textures: rich, and the pictures that the script beside this file draws."""

from __future__ import annotations

import pytest
import torch
from draw_textures import draw_texture

from phosphene.builtin.textures import TEXTURE_FOLDER, TEXTURES, load_texture


@pytest.mark.parametrize("name", TEXTURES)
def test_textures_have_varied_colors(name: str) -> None:
    picture = load_texture(name)
    assert picture.shape == (3, 128, 128)
    assert picture.dtype == torch.float32
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert picture.std(dim=(1, 2)).min() > 0.05


@pytest.mark.parametrize("name", TEXTURES)
def test_stored_texture_equals_the_drawn_one(name: str) -> None:
    away = (draw_texture(name) - load_texture(name)).abs()
    assert away.max() <= 1 / 255 + 1e-6
    assert (away > 0).double().mean() < 1e-3  # a last bit's rounding on another machine, no more


def test_drawing_is_repeatable_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    picture = draw_texture("swirls", 32, seed=2)
    assert torch.equal(picture, draw_texture("swirls", 32, seed=2))
    assert not torch.equal(picture, draw_texture("swirls", 32, seed=3))
    assert torch.equal(before, torch.get_rng_state())


def test_no_other_file_is_stored() -> None:
    assert sorted(path.name for path in TEXTURE_FOLDER.iterdir()) == sorted(
        f"{name}.png" for name in TEXTURES
    )
