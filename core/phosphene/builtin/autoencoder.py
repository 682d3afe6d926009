"""The bundled generator: a small convolutional variational autoencoder of the scenes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..generative.generators import Generator
from .networks import load_generator

AUTOENCODER = "shapes-autoencoder"
#: Dimension of a latent code.
LATENT = 64


class Residual(nn.Module):
    """Residual block of two 3x3 convolutions: x + f(x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


def _upsample(inputs: int, outputs: int) -> list[nn.Module]:
    """Twice the resolution by nearest neighbors, then a convolution and a residual block."""
    return [nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1), Residual(outputs)]


def _downsample(inputs: int, outputs: int) -> list[nn.Module]:
    """Half the resolution by a convolution of stride 2."""
    return [nn.Conv2d(inputs, outputs, 3, 2, padding=1), nn.SiLU()]


class ShapesAutoencoder(Generator):
    """A variational autoencoder: 64 x 64 pixels to 4 x 4 positions, to one code, and back.

    Latent codes z (N, 64), approximately N(0, I); images (N, 3, 64, 64) in [0, 1].
    """

    def __init__(self) -> None:
        encoder = nn.Sequential(
            *(nn.PixelUnshuffle(4), nn.Conv2d(48, 48, 3, padding=1), nn.SiLU()),
            *(*_downsample(48, 64), *_downsample(64, 96)),
            *(nn.Conv2d(96, 48, 1), nn.SiLU(), nn.Flatten(), nn.Linear(48 * 16, 2 * LATENT)),
        )
        decoder = nn.Sequential(
            *(nn.Linear(LATENT, 64 * 16), nn.Unflatten(1, (64, 4, 4)), Residual(64)),
            *(*_upsample(64, 64), *_upsample(64, 48), *_upsample(48, 32)),
            *(nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 16, 3, padding=1), nn.SiLU()),
            *(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(16, 3, 3, padding=1), nn.Sigmoid()),
        )
        super().__init__((LATENT,), decoder, encoder)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent codes of images, each (N, 64)."""
        mean, log_variance = super().encode(2 * images - 1).chunk(2, 1)
        return mean, log_variance.clamp(-10, 10)

    def encode(self, images: Tensor) -> Tensor:
        return self.posterior(images)[0]


def load_autoencoder() -> ShapesAutoencoder:
    """The bundled autoencoder, trained, in eval mode, on the CPU."""
    autoencoder = load_generator(ShapesAutoencoder, AUTOENCODER)
    autoencoder.uri = f"builtin:{AUTOENCODER}"
    return autoencoder
