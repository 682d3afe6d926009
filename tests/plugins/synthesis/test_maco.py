"""MACO: oracle, magnitudes from data, crops, opacity, batches and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from phosphene import (
    Class,
    InputError,
    Model,
    TensorDataset,
    load_model,
    load_result,
    max_batch,
    methods,
    run,
)
from phosphene.optimize import PhaseImage

maco = methods["synthesis.maco"]


def test_oracle() -> None:
    maco.spec.oracle()


def test_batch_equals_its_classes_alone(model: Model) -> None:
    options: dict[str, Any] = {"steps": 4, "crops": 3, "seed": 1}
    together = maco(model, Class((2, 0, 1)), **options)
    assert (together.scores[-1] > together.scores[0]).all()
    for n, index in enumerate((2, 0, 1)):
        alone = maco(model, index, **options)
        torch.testing.assert_close(together.images[n : n + 1], alone.images, atol=1e-9, rtol=0)
        torch.testing.assert_close(together.alpha[n : n + 1], alone.alpha, atol=1e-9, rtol=0)


def test_magnitudes_of_the_data_do_not_depend_on_its_batches(model: Model) -> None:
    images = torch.rand(7, 3, 12, 12, dtype=torch.float64)
    options: dict[str, Any] = {"steps": 1, "lr": 1e-9, "seed": 1}
    free = maco(model, 1, TensorDataset(images), **options).images
    with max_batch(2):
        limited = maco(model, 1, TensorDataset(images), **options).images
    torch.testing.assert_close(free, limited, atol=1e-12, rtol=0)
    mean = PhaseImage.spectrum(images, eps=0.02).abs().mean(0)
    magnitudes = PhaseImage.spectrum(free, eps=1e-9).abs()[0]
    torch.testing.assert_close(magnitudes.flatten(1)[:, 1:], mean.flatten(1)[:, 1:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [8, 15, 24])
def test_other_sizes_have_the_magnitudes_at_the_same_frequencies(model: Model, size: int) -> None:
    # Spectra that are linear in the vertical and the horizontal frequency are interpolated exactly.
    from phosphene_plugins.synthesis.maco import _resample

    def linear(side: int) -> torch.Tensor:
        rows = torch.fft.fftfreq(side, dtype=torch.float64).abs()[:, None]
        columns = torch.fft.rfftfreq(side, dtype=torch.float64)
        return (1 - rows + 0.5 * columns)[None]

    resampled = _resample(linear(12), (12, 12), (size, size))
    # Frequency zero is no part of the decay, nor are the entries that are interpolated from it.
    torch.testing.assert_close(resampled[..., 2:], linear(size)[..., 2:])
    assert maco(model, 0, size=size, steps=1).images.shape == (1, 3, size, size)


def test_gray_model_and_opacity_on_a_background() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    model = load_model(network, mean=[0.5], std=[0.2], input_size=(1, 6, 6))
    result = maco(model, 2, steps=2, seed=0)
    assert result.images.shape == (1, 1, 6, 6) and result.alpha.shape == (1, 6, 6)
    composed = result.on_background(0.25)
    torch.testing.assert_close(
        composed, result.alpha[:, None] * result.images + (1 - result.alpha[:, None]) * 0.25
    )


def test_refusals(model: Model) -> None:
    with pytest.raises(InputError, match="crop_min is at most crop_max, 0.5, not 0.6"):
        maco(model, 0, crop_min=0.6, crop_max=0.5)
    with pytest.raises(InputError, match="are empty"):
        maco(model, 0, TensorDataset(torch.rand(0, 3, 12, 12)))


def test_run_has_no_data_set_unless_one_is_named(tmp_path: Path) -> None:
    natural = run("maco", target="star", steps=2, seed=0, out=tmp_path / "result")
    loaded = load_result(tmp_path / "result")
    torch.testing.assert_close(loaded.alpha, natural.alpha)
    scenes = run("maco", target="star", dataset="builtin:scenes/8", steps=2, seed=0)
    assert not torch.equal(natural.images, scenes.images)
