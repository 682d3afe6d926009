"""The bundled textures and paintings: varied colors, and equality with the images that the scripts draw."""

from __future__ import annotations

import pytest
import torch
from draw_paintings import draw_painting
from draw_textures import draw_texture

from phosphene.builtin.textures import (
    PAINTING_FOLDER,
    PAINTINGS,
    TEXTURE_FOLDER,
    TEXTURES,
    load_painting,
    load_texture,
)
from phosphene.errors import UnknownName
from phosphene.roles.texture import read_textures


@pytest.mark.parametrize("name", TEXTURES)
def test_textures_have_varied_colors(name: str) -> None:
    texture = load_texture(name)
    assert texture.shape == (3, 128, 128)
    assert texture.dtype == torch.float32
    assert texture.min() >= 0
    assert texture.max() <= 1
    assert texture.std(dim=(1, 2)).min() > 0.05


@pytest.mark.parametrize("name", TEXTURES)
def test_stored_texture_equals_the_drawn_one(name: str) -> None:
    difference = (draw_texture(name) - load_texture(name)).abs()
    assert difference.max() <= 1 / 255 + 1e-6
    assert (difference > 0).double().mean() < 1e-3  # a last bit's rounding on another machine, no more


def test_drawing_is_repeatable_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    texture = draw_texture("swirls", 32, seed=2)
    assert torch.equal(texture, draw_texture("swirls", 32, seed=2))
    assert not torch.equal(texture, draw_texture("swirls", 32, seed=3))
    assert torch.equal(before, torch.get_rng_state())


def test_no_other_file_is_stored() -> None:
    assert sorted(path.name for path in TEXTURE_FOLDER.iterdir()) == sorted(
        f"{name}.png" for name in TEXTURES
    )


def test_paintings_are_small_files_of_varied_colors() -> None:
    files = sorted(PAINTING_FOLDER.iterdir())
    assert [file.name for file in files] == sorted(f"{name}.png" for name in PAINTINGS)
    assert sum(file.stat().st_size for file in files) < 600_000
    for name in PAINTINGS:
        painting = load_painting(name)
        assert painting.shape == (3, 256, 256) and painting.std(dim=(1, 2)).min() > 0.08


def test_paintings_are_textures_by_name() -> None:
    (night,) = read_textures("builtin:night")
    assert torch.equal(night, load_painting("night"))
    with pytest.raises(UnknownName, match="marbling"):
        read_textures("builtin:marble")


@pytest.mark.nightly
@pytest.mark.parametrize("name", PAINTINGS)
def test_stored_painting_is_the_drawn_one_in_fewer_colors(name: str) -> None:
    assert (draw_painting(name) - load_painting(name)).abs().mean() < 0.03
