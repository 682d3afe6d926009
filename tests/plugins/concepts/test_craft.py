"""Concept factorization of crops, and Sobol indices as the importance of concepts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phosphene import InputError, load_model, run


def test_what_crops_and_designs_cannot_be_is_refused() -> None:
    for options, words in [
        ({"crop": 0.5, "algorithm": "pca"}, "factorized by NMF"),
        ({"designs": 12}, "a power of two: 16, not 12|a power of two: 8, not 12"),
        ({"crop": 1.0, "concepts": 3}, "2 crops and 128 channels has at most 2"),
    ]:
        with pytest.raises(InputError, match=words):
            run("concept_factorization", images="builtin:scenes/2", **{"concepts": 2, "seed": 0} | options)


def test_concepts_that_matter_only_together_have_large_sobol_indices() -> None:
    """The score is the product of two channels' means: each total index is 4/7, whatever the images."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.ReLU()

        def forward(self, images: Tensor) -> Tensor:
            means = self.features(images).mean((2, 3))
            return torch.stack([means[:, 0] * means[:, 1], means[:, 2]], 1)

    model = load_model(Product(), mean=[0.0] * 3, std=[1.0] * 3, input_size=(3, 4, 4))
    images = torch.zeros(2, 3, 4, 4)
    images[:, 0, :2], images[:, 1, 2:] = 0.8, 0.6
    images[1] *= 0.5
    options: dict[str, Any] = {"layer": "features", "concepts": 2, "designs": 512, "seed": 0}
    result: Any = run("concept_factorization", model=model, images=images, target=0, **options)
    torch.testing.assert_close(result.sobol, torch.full((2, 2), 4 / 7), rtol=0, atol=0.02)
    batched: Any = run("concept_factorization", model=model, images=images, target=0, batch_size=3, **options)
    torch.testing.assert_close(batched.sobol, result.sobol)


def test_tokens_other_than_patches_stay_as_they_are() -> None:
    """Of a transformer, the concepts scale the patches; with none of them the class token alone is left."""
    options: dict[str, Any] = {"model": "builtin:shapes-vit", "images": "builtin:scenes/1", "concepts": 2}
    result: Any = run("concept_factorization", **options, algorithm="semi_nmf", designs=4, seed=0)
    assert result.sobol.shape == (1, 2) and result.sobol.isfinite().all()
