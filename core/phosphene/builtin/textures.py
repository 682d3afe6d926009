"""The bundled texture images, drawn by tests/builtin/draw_textures.py."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..images.decode import read_image

TEXTURE_FOLDER = Path(__file__).parent / "pictures"
TEXTURES = ("bricks", "pebbles", "waves", "swirls", "mosaic")


def load_texture(name: str) -> Tensor:
    """Load the texture ``name`` of ``TEXTURES``: (3, 128, 128) float32 RGB in [0, 1]."""
    return read_image(TEXTURE_FOLDER / f"{name}.png")
