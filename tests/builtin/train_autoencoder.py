"""How the bundled autoencoder learns to draw scenes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from averaged_training import fit_averaged
from torch import Tensor

from phosphene.builtin.autoencoder import ShapesAutoencoder
from phosphene.builtin.networks import ShapesResNet, load_network, normalize
from phosphene.builtin.scenes import draw_scenes

BATCH = 16
RATE = 3e-3
#: How much of the average each step keeps.
EMA = 0.99
#: Weights of the pixels' squared error, and of each number's divergence from N(0, 1); the features' is one.
PIXELS, DIVERGENCE = 5.0, 2e-4
#: Whose features: they care for outlines, which squared errors of pixels blur.
JUDGE = "shapes-resnet"
RECIPE = (
    f"AdamW, batches of {BATCH}, half of them mirrored; {PIXELS:g} x the squared error of the pixels, the "
    f"relative squared error of the four stages of {JUDGE} and {DIVERGENCE:g} x the divergence of a code's "
    f"numbers from N(0, 1), codes drawn from what the encoder says; the rate on a cosine, weights averaged "
    f"(EMA {EMA})"
)


def fit_autoencoder(*, steps: int, scenes: int, seed: int) -> tuple[ShapesAutoencoder, list[float]]:
    """Train a fresh autoencoder; returns its averaged weights in eval mode, and the losses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder, judge = ShapesAutoencoder(), load_network(JUDGE)
    judge.requires_grad_(False).to(memory_format=torch.channels_last)
    assert isinstance(judge, ShapesResNet)
    images = draw_scenes(scenes, seed=seed).images
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        some = images[torch.randint(len(images), (BATCH,), generator=generator)]
        flips = torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5
        some = torch.where(flips, some.flip(3), some).contiguous(memory_format=torch.channels_last)
        return error_of_pictures(autoencoder, judge, some, generator)

    losses = fit_averaged(autoencoder, loss, steps=steps, rate=RATE, ema=EMA, name="shapes-autoencoder")
    return autoencoder, losses


def error_of_pictures(
    autoencoder: ShapesAutoencoder, judge: ShapesResNet, images: Tensor, generator: torch.Generator
) -> Tensor:
    """How far pictures are from what is drawn of their codes, and these from N(0, I)."""
    mean, log_variance = autoencoder.posterior(images)
    z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
    drawn = autoencoder.decode(z)
    with torch.no_grad():
        wanted = stages(judge, images)
    relative = [
        F.mse_loss(found, right) / right.square().mean()
        for found, right in zip(stages(judge, drawn), wanted, strict=True)
    ]
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    loss = PIXELS * F.mse_loss(drawn, images) + torch.stack(relative).mean()
    return loss + DIVERGENCE * divergence


def stages(judge: ShapesResNet, images: Tensor) -> list[Tensor]:
    """What the judge makes of pictures at the end of each stage."""
    found = [judge.relu(judge.bn1(judge.conv1(normalize(images))))]
    for layer in (judge.layer1, judge.layer2, judge.layer3):
        found.append(layer(found[-1]))
    return found


@torch.no_grad()
def squared_error(autoencoder: ShapesAutoencoder, images: Tensor) -> float:
    """The mean squared error of pixels, of pictures and what is drawn of their codes' means."""
    parts = [autoencoder.decode(autoencoder.encode(some)) - some for some in images.split(50)]
    return torch.cat(parts).square().mean().item()
