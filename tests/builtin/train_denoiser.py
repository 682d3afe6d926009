"""Trains the bundled shapes-diffusion: a v-prediction denoiser of drawn scenes, textures and paintings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from averaged_training import fit_averaged
from model_cards import first_and_last_loss, parameter_count, write_card, write_file
from safetensors.torch import save
from torch import Tensor

from phosphene.builtin.denoiser import DENOISER, ShapesDenoiser
from phosphene.builtin.scenes import SIZE, draw_scenes
from phosphene.builtin.textures import PAINTINGS, TEXTURES, load_painting, load_texture

# data
SCENES = 10_000
TEST_SCENES = 200
# optimizer
STEPS = 22_000
BATCH = 8
DRAWN = 6  # scenes in a batch; the others are crops of textures and paintings
LEARNING_RATE = 1.5e-3
EMA = 0.999  # decay of the average of the weights

RECIPE = (
    f"AdamW, batches of {BATCH}: {DRAWN} scenes and {BATCH - DRAWN} crops of the bundled textures and "
    f"paintings; the squared error of v at a uniformly random time, the learning rate on a cosine, weights "
    f"averaged (EMA {EMA})"
)


def train(out: Path, *, seed: int) -> None:
    """Train the denoiser and write its weights, in half precision, and its card to ``out``."""
    denoiser, losses = fit_denoiser(seed=seed)
    weights = save({key: value.half().contiguous() for key, value in denoiser.state_dict().items()})
    test_images = draw_scenes(TEST_SCENES, seed=seed, split="test").images
    facts: dict[str, Any] = {
        "parameters": parameter_count(denoiser),
        "training": RECIPE,
        "training_scenes": SCENES,
        "training_steps": STEPS,
        "training_seed": seed,
        **first_and_last_loss(losses),
        "test_scenes": len(test_images),
        "test_error_of_v": squared_error(denoiser, test_images, seed),
    }
    write_file(out / f"{DENOISER}.safetensors", weights)
    network = (type(denoiser).__doc__ or "").splitlines()[0]
    summary = f"{network} Of drawn scenes and the bundled textures and paintings."
    write_card(out / f"{DENOISER}.md", summary, weights, **facts)


def fit_denoiser(*, seed: int) -> tuple[ShapesDenoiser, list[float]]:
    """Train a new denoiser; returns it with averaged weights in eval mode, and the losses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = ShapesDenoiser()
    scenes = draw_scenes(SCENES, seed=seed).images
    textures = textures_and_paintings()
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        batch = scenes[torch.randint(len(scenes), (DRAWN,), generator=generator)]
        batch = torch.cat([batch, texture_crops(textures, BATCH - len(batch), generator)])
        return v_loss(denoiser, batch, generator)

    losses = fit_averaged(denoiser, loss, steps=STEPS, lr=LEARNING_RATE, ema=EMA, title=DENOISER)
    return denoiser, losses


def textures_and_paintings() -> Tensor:
    """The bundled textures, and the paintings at half their size: (S, 3, 128, 128)."""
    textures = torch.stack([load_texture(name) for name in TEXTURES])
    paintings = torch.stack([load_painting(name) for name in PAINTINGS])
    return torch.cat([textures, F.interpolate(paintings, scale_factor=0.5, mode="area")])


def v_loss(denoiser: ShapesDenoiser, images: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of v, with a random time and noise for each image."""
    t = torch.randint(len(denoiser.alphas_cumprod), (len(images),), generator=generator)
    abar = denoiser.alphas_cumprod[t].float().view(-1, 1, 1, 1)
    noise = torch.randn(images.shape, generator=generator)
    x = denoiser.encode(images)
    v = abar.sqrt() * noise - (1 - abar).sqrt() * x
    return F.mse_loss(denoiser(abar.sqrt() * x + (1 - abar).sqrt() * noise, t), v)


@torch.no_grad()
def squared_error(denoiser: ShapesDenoiser, images: Tensor, seed: int) -> float:
    """Mean squared error of v over images, whose number is a multiple of 50."""
    generator = torch.Generator().manual_seed(seed)
    parts = [v_loss(denoiser, batch, generator) for batch in images.split(50)]
    return torch.stack(parts).mean().item()


def texture_crops(textures: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random square crops of textures (S, 3, H, H), rotated and mirrored: (count, 3, 64, 64)."""
    crops = []
    for _ in range(count):
        draw = lambda below: int(torch.randint(below, (), generator=generator))
        texture = textures[draw(len(textures))]
        side = SIZE + draw(texture.shape[1] - SIZE + 1)
        top, left = draw(texture.shape[1] - side + 1), draw(texture.shape[2] - side + 1)
        crop = texture[None, :, top : top + side, left : left + side].rot90(draw(4), (2, 3))
        crop = F.interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True)
        crops.append(crop.flip(3) if draw(2) else crop)
    return torch.cat(crops).clamp(0, 1)
