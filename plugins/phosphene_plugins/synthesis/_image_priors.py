"""Terms of activation maximization: diversity of the variants of a unit, and opacity."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from phosphene import Model, at_least_float32
from phosphene.optimize import Transform, fourier_frequencies, gram_matrix


def diversity_penalty(model: Model, layer: str, variants: int) -> Callable[[Tensor], Tensor]:
    """Similarity of each image to the others of its unit: images (U * V, C, H, W) -> (U * V,).

    1/2 sum_{b != a} cos(G_a, G_b), with the Gram matrices G of a layer's maps; consecutive images are the V
    variants of a unit. Half, since each pair counts for both of its images.

    Source:
        Olah et al. 2017, "Diversity".
    """

    def penalty(images: Tensor) -> Tensor:
        features = at_least_float32(model.features(images, layer))
        maps = model.maps(features, images, layer) if features.ndim > 2 else features[..., None, None]
        grams = F.normalize(gram_matrix(maps).flatten(1), dim=1).unflatten(0, (-1, variants))
        cosines = grams @ grams.mT
        return (cosines.sum(2) - cosines.diagonal(dim1=1, dim2=2)).flatten() / 2

    return penalty


def with_background(geometric: Transform | None) -> Transform:
    """Images with opacity (N, C + 1, H, W) -> augmented ones and a random background, (N, 2 C + 1, H, W).

    The background is drawn anew at every step: noise with the amplitudes of natural images, the same for all
    images. Where an image is transparent, only what does not depend on the background raises the score.
    """

    def transform(images: Tensor, generator: Generator) -> Tensor:
        augmented = images if geometric is None else geometric(images, generator)
        _, channels, height, width = augmented.shape
        white = torch.randn(1, channels - 1, height, width, generator=generator, dtype=torch.float64)
        decay = 1 / fourier_frequencies(height, width)
        noise = torch.fft.irfft2(torch.fft.rfft2(white) * decay, s=(height, width))
        noise = (noise / noise.std().clamp(min=1e-12)).sigmoid().to(augmented)
        return torch.cat([augmented, noise.expand(len(augmented), -1, -1, -1)], 1)

    return transform


def transparent_score(score: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """(S(image over background) - S(background)) (1 - mean opacity) of ``with_background``'s output: (N,).

    Relative to the background: else a unit that the noise itself activates would be best left to it, with an
    opacity of zero.
    """

    def objective(inputs: Tensor) -> Tensor:
        channels = inputs.shape[1] // 2
        colors, alpha, background = inputs.split([channels, 1, channels], 1)
        with torch.no_grad():
            ground = score(background)
        difference = score(alpha * colors + (1 - alpha) * background) - ground
        return difference * (1 - alpha.mean((1, 2, 3)))

    return objective
