"""Terms of activation maximisation that read the network: diversity, batch-norm statistics; and opacity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from phosphene import Model, ModelError, at_least_float32
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


def batch_norm_penalty(model: Model) -> Callable[[Tensor], Tensor]:
    """Distance of each image's statistics from those of batch normalisation: images -> (N,).

    sum_l ||mean_l(x) - m_l|| + ||var_l(x) - v_l||, over the positions of the input of each layer l, with the
    running mean m_l and variance v_l. Raises ModelError for a network without running statistics.

    Source:
        Yin et al. 2020, "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", equation 4,
        for each image instead of a batch.
    """
    modules = {
        name: cast("Any", module)
        for name, module in model.layers.items()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    ran = model.structure.layers
    layers = [name for name in modules if name in ran]
    if not layers:
        raise ModelError(
            f"{model.name} has no batch normalisation with running statistics: batch_norm needs some, set it "
            "to 0"
        )

    def penalty(images: Tensor) -> Tensor:
        total = images.new_zeros(len(images), dtype=at_least_float32(images).dtype)
        for name, values in zip(layers, model.features_of(images, layers, inputs=True), strict=True):
            flat = at_least_float32(values.flatten(2) if values.ndim > 2 else values[..., None])
            mean, variance = flat.mean(2), flat.var(2, correction=0)
            for value, expected in (
                (mean, modules[name].running_mean),
                (variance, modules[name].running_var),
            ):
                # The norm has no gradient at 0, where the statistics agree.
                total = total + (value - expected.to(value)).square().sum(1).clamp(min=1e-30).sqrt()
        return total

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
    """S of an image over its background times 1 - its mean opacity, of ``with_background``'s output: (N,)."""

    def objective(inputs: Tensor) -> Tensor:
        channels = inputs.shape[1] // 2
        colors, alpha, background = inputs.split([channels, 1, channels], 1)
        return score(alpha * colors + (1 - alpha) * background) * (1 - alpha.mean((1, 2, 3)))

    return objective
