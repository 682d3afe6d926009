"""The bundled texture images and paintings, drawn by tests/builtin/draw_textures.py and draw_paintings.py."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..images.decode import read_image

TEXTURE_FOLDER = Path(__file__).parent / "pictures"
TEXTURES = ("bricks", "pebbles", "waves", "swirls", "mosaic")

PAINTING_FOLDER = Path(__file__).parent / "paintings"
PAINTINGS = ("night", "sea", "meadow", "glass", "circles", "marbling")


def load_texture(name: str) -> Tensor:
    """Load the texture ``name`` of ``TEXTURES``: (3, 128, 128) float32 RGB in [0, 1]."""
    return read_image(TEXTURE_FOLDER / f"{name}.png")


def load_painting(name: str) -> Tensor:
    """Load the painting ``name`` of ``PAINTINGS``: (3, 256, 256) float32 RGB in [0, 1]."""
    return read_image(PAINTING_FOLDER / f"{name}.png")
