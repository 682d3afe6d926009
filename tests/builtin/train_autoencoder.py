"""Trains the bundled shapes-autoencoder: a variational autoencoder of drawn scenes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from averaged_training import fit_averaged
from model_cards import accuracy, first_and_last_loss, parameter_count, write_card, write_file
from safetensors.torch import save
from torch import Tensor

from phosphene.builtin.autoencoder import AUTOENCODER, ShapesAutoencoder
from phosphene.builtin.networks import ShapesResNet, load_network, normalize
from phosphene.builtin.scenes import draw_scenes

# data
SCENES = 5_000
TEST_SCENES = 200
# optimizer
STEPS = 1_200
BATCH = 16
LEARNING_RATE = 3e-3
EMA = 0.99  # decay of the average of the weights
# loss
PIXEL_WEIGHT = 5.0
DIVERGENCE_WEIGHT = 2e-4  # of the Kullback-Leibler divergence from N(0, I), per dimension of the code
LOSS_NETWORK = "shapes-resnet"  # its features preserve outlines, which the squared error of pixels blurs
# evaluation
TEST_NETWORK = "shapes-vgg"  # a classifier that is not part of the loss

RECIPE = (
    f"AdamW, batches of {BATCH}, half of them mirrored; {PIXEL_WEIGHT:g} x the squared error of the pixels, "
    f"the relative squared error of the four stages of {LOSS_NETWORK} and {DIVERGENCE_WEIGHT:g} x the "
    "Kullback-Leibler divergence of the posterior from N(0, I), codes sampled from the posterior; the "
    f"learning rate on a cosine, weights averaged (EMA {EMA})"
)


def train(out: Path, *, seed: int) -> None:
    """Train the autoencoder and write its weights, in half precision, and its card to ``out``."""
    autoencoder, losses = fit_autoencoder(seed=seed)
    weights = save({key: value.half().contiguous() for key, value in autoencoder.state_dict().items()})
    test_set = draw_scenes(TEST_SCENES, seed=seed, split="test")
    with torch.no_grad():
        reconstructions = autoencoder.decode(autoencoder.encode(test_set.images))
    with torch.random.fork_rng(devices=[]):
        classifier = load_network(TEST_NETWORK)
    facts: dict[str, Any] = {
        "parameters": parameter_count(autoencoder),
        "training": RECIPE,
        "training_scenes": SCENES,
        "training_steps": STEPS,
        "training_seed": seed,
        **first_and_last_loss(losses),
        "test_scenes": len(test_set),
        "test_error_of_pixels": squared_error(autoencoder, test_set.images),
        f"accuracy of {TEST_NETWORK} on reconstructions": accuracy(
            classifier, replace(test_set, images=reconstructions)
        ),
    }
    write_file(out / f"{AUTOENCODER}.safetensors", weights)
    summary = f"{(type(autoencoder).__doc__ or '').splitlines()[0]} Of drawn scenes."
    write_card(out / f"{AUTOENCODER}.md", summary, weights, **facts)


def fit_autoencoder(*, seed: int) -> tuple[ShapesAutoencoder, list[float]]:
    """Train a new autoencoder; returns it with averaged weights in eval mode, and the losses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder, loss_network = ShapesAutoencoder(), load_network(LOSS_NETWORK)
    loss_network.requires_grad_(False).to(memory_format=torch.channels_last)
    assert isinstance(loss_network, ShapesResNet)
    images = draw_scenes(SCENES, seed=seed).images
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        batch = images[torch.randint(len(images), (BATCH,), generator=generator)]
        flips = torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5
        batch = torch.where(flips, batch.flip(3), batch).contiguous(memory_format=torch.channels_last)
        return autoencoder_loss(autoencoder, loss_network, batch, generator)

    losses = fit_averaged(autoencoder, loss, steps=STEPS, lr=LEARNING_RATE, ema=EMA, title=AUTOENCODER)
    return autoencoder, losses


def autoencoder_loss(
    autoencoder: ShapesAutoencoder, loss_network: ShapesResNet, images: Tensor, generator: torch.Generator
) -> Tensor:
    """Pixel error and relative feature error of the reconstructions, and divergence of the codes."""
    mean, log_variance = autoencoder.posterior(images)
    z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
    reconstructions = autoencoder.decode(z)
    with torch.no_grad():
        expected = stage_features(loss_network, images)
    relative = [
        F.mse_loss(features, target) / target.square().mean()
        for features, target in zip(stage_features(loss_network, reconstructions), expected, strict=True)
    ]
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    loss = PIXEL_WEIGHT * F.mse_loss(reconstructions, images) + torch.stack(relative).mean()
    return loss + DIVERGENCE_WEIGHT * divergence


def stage_features(network: ShapesResNet, images: Tensor) -> list[Tensor]:
    """The output of each of the four stages."""
    features = [network.relu(network.bn1(network.conv1(normalize(images))))]
    for layer in (network.layer1, network.layer2, network.layer3):
        features.append(layer(features[-1]))
    return features


@torch.no_grad()
def squared_error(autoencoder: ShapesAutoencoder, images: Tensor) -> float:
    """Mean squared error of the pixels of reconstructions from the codes' means."""
    parts = [autoencoder.decode(autoencoder.encode(batch)) - batch for batch in images.split(50)]
    return torch.cat(parts).square().mean().item()
