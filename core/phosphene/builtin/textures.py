"""Style and texture pictures, rich in colour and structure; tests/builtin/draw_textures.py has drawn them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..images.io import read_image

PICTURES = Path(__file__).parent / "pictures"
TEXTURES = ("bricks", "pebbles", "waves", "swirls", "mosaic")


def load_texture(name: str) -> Tensor:
    """The texture ``name`` of ``TEXTURES``: (3, 128, 128) float32 RGB in [0, 1]."""
    return read_image(PICTURES / f"{name}.png")
