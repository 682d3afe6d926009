"""How the bundled diffusion model learns to draw scenes and textures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from averaged_training import fit_averaged
from torch import Tensor

from phosphene.builtin.denoiser import ShapesDenoiser
from phosphene.builtin.scenes import SIZE, draw_scenes
from phosphene.builtin.textures import TEXTURES, load_texture

BATCH = 8
RATE = 1.5e-3
#: How much of the average each step keeps.
EMA = 0.995
RECIPE = (
    f"AdamW, batches of {BATCH}, half of them scenes and half squares cut out of the bundled textures; the "
    f"squared error of v at a time drawn evenly, the rate on a cosine, weights averaged (EMA {EMA})"
)


def fit_denoiser(*, steps: int, scenes: int, seed: int) -> tuple[ShapesDenoiser, list[float]]:
    """Train a fresh denoiser; returns its averaged weights in eval mode, and the losses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = ShapesDenoiser()
    images = draw_scenes(scenes, seed=seed).images
    textures = torch.stack([load_texture(name) for name in TEXTURES])
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        some = images[torch.randint(len(images), (BATCH // 2,), generator=generator)]
        drawn = torch.cat([some, pieces(textures, BATCH - len(some), generator)])
        return error_of_v(denoiser, drawn, generator)

    return denoiser, fit_averaged(denoiser, loss, steps=steps, rate=RATE, ema=EMA, name="shapes-diffusion")


def error_of_v(denoiser: ShapesDenoiser, images: Tensor, generator: torch.Generator) -> Tensor:
    """The mean squared error of v, each picture at a time and under a noise of its own."""
    t = torch.randint(len(denoiser.alphas), (len(images),), generator=generator)
    abar = denoiser.alphas[t].float().view(-1, 1, 1, 1)
    noise = torch.randn(images.shape, generator=generator)
    x = denoiser.encode(images)
    v = abar.sqrt() * noise - (1 - abar).sqrt() * x
    return F.mse_loss(denoiser(abar.sqrt() * x + (1 - abar).sqrt() * noise, t), v)


@torch.no_grad()
def squared_error(denoiser: ShapesDenoiser, images: Tensor, seed: int) -> float:
    """The error of v over many pictures, a multiple of 50."""
    generator = torch.Generator().manual_seed(seed)
    parts = [error_of_v(denoiser, some, generator) for some in images.split(50)]
    return torch.stack(parts).mean().item()


def pieces(textures: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Squares of textures (S, 3, H, H), turned and mirrored, at 64 pixels: (count, 3, 64, 64)."""
    found = []
    for _ in range(count):
        draw = lambda below: int(torch.randint(below, (), generator=generator))
        texture = textures[draw(len(textures))]
        side = SIZE + draw(texture.shape[1] - SIZE + 1)
        top, left = draw(texture.shape[1] - side + 1), draw(texture.shape[2] - side + 1)
        piece = texture[None, :, top : top + side, left : left + side].rot90(draw(4), (2, 3))
        piece = F.interpolate(piece, (SIZE, SIZE), mode="bilinear", antialias=True)
        found.append(piece.flip(3) if draw(2) else piece)
    return torch.cat(found).clamp(0, 1)
