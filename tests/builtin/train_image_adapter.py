"""Trains the bundled shapes-image-adapter: image prompts for shapes-diffusion, which stays fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from averaged_training import fit_averaged
from model_cards import first_and_last_loss, parameter_count, write_card, write_file
from safetensors.torch import save
from torch import Tensor
from train_denoiser import texture_crops, textures_and_paintings

from phosphene.builtin.denoiser import ShapesDenoiser, load_denoiser
from phosphene.builtin.image_adapter import IMAGE_ADAPTER, ShapesImageAdapter
from phosphene.builtin.scenes import CLASSES, draw_scenes
from phosphene.generative import ImageAdapter
from phosphene_plugins.style.ip_adapter import add_image_attention

# data
SCENES = 2_000
TEST_SCENES = 100
# optimizer
STEPS = 3_000
BATCH = 8
DRAWN = 6  # scenes in a batch; the others are crops of textures and paintings
LEARNING_RATE = 1e-2
EMA = 0.99  # decay of the average of the weights
# Colors and layout are decided at the noisiest times, outlines a little later.
NOISY, NOISY_SHARE = 500, 0.8
BLANK_SHARE = 0.1  # of the images, whose embedding is zero, for guidance

RECIPE = (
    f"AdamW, batches of {BATCH}: {DRAWN} scenes and {BATCH - DRAWN} crops of the bundled textures and "
    f"paintings, each prompted by itself, or by none ({BLANK_SHARE:.0%}); the squared error of v, "
    f"{NOISY_SHARE:.0%} of the times above {NOISY}; the learning rate on a cosine, weights averaged "
    f"(EMA {EMA})"
)


def train(out: Path, *, seed: int) -> None:
    """Train the adapter and write its weights, in half precision, and its card to ``out``."""
    denoiser = load_denoiser().requires_grad_(False)
    trained, losses = fit_adapter(denoiser, seed=seed)
    weights = save({key: value.half().contiguous() for key, value in trained.state_dict().items()})
    test_images = draw_scenes(TEST_SCENES, seed=seed, split="test").images
    facts: dict[str, Any] = {
        "parameters": parameter_count(trained),
        "training": RECIPE,
        "training_scenes": SCENES,
        "training_steps": STEPS,
        "training_seed": seed,
        **first_and_last_loss(losses),
        "test_scenes": len(test_images),
        "test_error_of_v": squared_error(denoiser, trained.adapter(), test_images, seed),
        "test_error_without_adapter": squared_error(denoiser, None, test_images, seed),
    }
    write_file(out / f"{IMAGE_ADAPTER}.safetensors", weights)
    summary = (
        "Image prompts for shapes-diffusion, by attention to tokens of an image and of each of its 16 cells."
    )
    write_card(out / f"{IMAGE_ADAPTER}.md", summary, weights, **facts)


def fit_adapter(denoiser: ShapesDenoiser, *, seed: int) -> tuple[ShapesImageAdapter, list[float]]:
    """Train a new adapter; returns it with averaged weights in eval mode, and the losses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trained = ShapesImageAdapter()
    drawn = draw_scenes(SCENES, seed=seed)
    scenes = drawn.images
    textures = textures_and_paintings()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        adapter = trained.adapter()
        of_scenes, of_textures = (
            torch.cat([adapter.embeddings(part) for part in images.split(50)])
            for images in (scenes, texture_crops(textures, min(SCENES, 200), generator))
        )
        both = torch.cat([of_scenes[: len(of_textures)], of_textures])
        trained.mean.copy_(both.mean(0))
        trained.std.copy_(both.std(0).clamp(min=1e-3))
        centered = (of_scenes - of_scenes.mean(0)) / trained.std
        for index in range(len(CLASSES)):
            if (of_class := drawn.labels == index).any():
                trained.classes[index] = centered[of_class].mean(0)

    def loss() -> Tensor:
        batch = scenes[torch.randint(len(scenes), (DRAWN,), generator=generator)]
        batch = torch.cat([batch, texture_crops(textures, BATCH - len(batch), generator)])
        return v_loss(denoiser, adapter, batch, generator)

    losses = fit_averaged(trained, loss, steps=STEPS, lr=LEARNING_RATE, ema=EMA, title=IMAGE_ADAPTER)
    return trained, losses


def v_loss(
    denoiser: ShapesDenoiser, adapter: ImageAdapter | None, images: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of v, with a random time and noise for each image, each prompted by itself."""
    count = len(images)
    noisy = torch.rand(count, generator=generator) < NOISY_SHARE
    t = torch.randint(NOISY, (count,), generator=generator)
    t = torch.where(noisy, torch.randint(NOISY, denoiser.time_steps, (count,), generator=generator), t)
    blank = torch.rand(count, generator=generator) < BLANK_SHARE
    abar = denoiser.alphas_cumprod[t].float().view(-1, 1, 1, 1)
    noise = torch.randn(images.shape, generator=generator)
    x = denoiser.encode(images)
    v = abar.sqrt() * noise - (1 - abar).sqrt() * x
    predict: Any = denoiser
    if adapter is not None:
        with torch.no_grad():
            embeddings = adapter.embeddings(images) * ~blank[:, None]
        predict = add_image_attention(denoiser, adapter, embeddings, dict.fromkeys(range(3), 1.0))
    return F.mse_loss(predict(abar.sqrt() * x + (1 - abar).sqrt() * noise, t), v)


@torch.no_grad()
def squared_error(denoiser: ShapesDenoiser, adapter: ImageAdapter | None, images: Tensor, seed: int) -> float:
    """Mean squared error of v over images, whose number is a multiple of 50."""
    generator = torch.Generator().manual_seed(seed)
    parts = [v_loss(denoiser, adapter, batch, generator) for batch in images.split(50)]
    return torch.stack(parts).mean().item()
