"""MACO, Fel et al. 2023: activation maximization over the phases of a spectrum of natural magnitudes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from phosphene import (
    Class,
    Fold,
    InputError,
    Reference,
    TensorDataset,
    at_least_float32,
    batch_size,
    hookimpl,
    load_model,
    method,
    scores,
    to_float64,
)
from phosphene.data import Batch, State
from phosphene.images import noise_images, resize
from phosphene.optimize import PhaseImage, fourier_frequencies, optimize_image
from phosphene.results import Synthesis
from phosphene.roles import Dataset, Frames, Model, Seed, Target
from phosphene.spec import Agrees, Cost, InvariantTo, PixelRange, ScalesWith, UnitRange, param
from phosphene.spec import size as call_size

from ._activation_maximization import ImageSide, Steps, class_count, mean_color
from ._relations import phases_by_adam

#: Exponent of the magnitudes' decay and standard deviation of each decorrelated channel before the sigmoid:
#: the means of photographs of ImageNet's classes at 224 pixels.
NATURAL_DECAY, NATURAL_DEVIATION = 1.2, 1.8

#: Pixels are clipped to [eps, 1 - eps] before their spectrum: logits of black and white would dominate it.
LOGIT_CLIP = 0.02


def magnitudes_are_those_of_the_data() -> None:
    """The magnitudes are the data's means; of a linear score the opacity is the mean absolute weight."""
    random = torch.Generator().manual_seed(0)
    images = 0.1 + 0.8 * torch.rand(5, 3, 6, 7, dtype=torch.float64, generator=random)
    linear = nn.Linear(126, 2, bias=False).double()
    model = load_model(
        nn.Sequential(nn.Flatten(), linear), mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25], input_size=(3, 6, 7)
    )
    with torch.no_grad():
        linear.weight.copy_(torch.randn(2, 126, dtype=torch.float64, generator=random))
    full_image: Any = {"crop_min": 1.0, "crop_max": 1.0, "crops": 1, "noise": 0.0, "seed": 3}
    result = maco(model, Class((0, 1)), TensorDataset(images), size=None, steps=5, lr=0.1, **full_image)
    spectra = PhaseImage.spectrum(images, eps=LOGIT_CLIP)
    spectrum = PhaseImage.spectrum(result.images, eps=1e-9)
    expected = spectra.abs().mean(0)
    expected[:, 0, 0] = spectra[:, :, 0, 0].real.mean(0).abs()
    torch.testing.assert_close(spectrum.abs(), expected.expand(2, -1, -1, -1), atol=1e-6, rtol=0)
    torch.testing.assert_close(spectrum[:, :, 0, 0].real, spectra[:, :, 0, 0].real.mean(0).expand(2, -1))
    assert result.targets == ("class 0", "class 1") and result.scores.shape == (5, 2)
    assert (result.scores[-1] > result.scores[0]).all()
    # The gradient is the same at every step.
    assert result.alpha is not None
    slope = (linear.weight.view(2, 3, 6, 7) / model.std.double().view(3, 1, 1)).abs().mean(1)
    quantile = slope.flatten(1).quantile(0.8, dim=1)[:, None, None]
    torch.testing.assert_close(result.alpha, (slope / quantile).clamp(max=1).detach())
    # A third of a cycle per pixel is row 2 of 6 and row 3 of 9. Without data, magnitudes decay from the mean
    # color.
    larger = PhaseImage.spectrum(
        maco(model, 1, TensorDataset(images), size=9, steps=1, seed=0).images, eps=1e-9
    )
    assert larger.shape == (1, 3, 9, 5)
    torch.testing.assert_close(larger[0, :, 3, 0].abs(), expected[:, 2, 0], atol=1e-6, rtol=0)
    mean = spectra[:, :, 0, 0].real.mean(0) * (81 / 42) ** 0.5
    torch.testing.assert_close(larger[0, :, 0, 0].real, mean, atol=1e-6, rtol=0)
    decay = PhaseImage.spectrum(maco(model, 1, **full_image, steps=1, lr=1e-9).images, eps=1e-9)[0]
    frequencies = torch.hypot(torch.fft.fftfreq(6)[:, None], torch.fft.rfftfreq(7)).double()
    ratio = decay.abs() * frequencies**NATURAL_DECAY
    torch.testing.assert_close(ratio.flatten(1)[:, 2:], ratio[:, :1, 1].expand(-1, 22), atol=1e-6, rtol=1e-6)
    color = PhaseImage.spectrum(model.mean.double().view(1, 3, 1, 1))[0, :, 0, 0].real * 42**0.5
    torch.testing.assert_close(decay[:, 0, 0].real, color)
    _spectra_at_other_sizes(model)
    _crops_by_hand(images)


def _spectra_at_other_sizes(model: Model) -> None:
    """Between two frequencies magnitudes are linear; the deviation is that of an image with them."""
    draw = torch.Generator().manual_seed(0)
    old = torch.rand(2, 4, 3, dtype=torch.float64, generator=draw)
    filled = old.clone()
    filled[:, 0, 0] = (old[:, 0, 1] + old[:, 1, 0]) / 2
    rows = torch.zeros(8, 4, dtype=torch.float64)  # twice as many, of 0, 1/2, ..., -1 and -1/2 old rows
    for n, parts in enumerate(((0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 0))):
        for part in parts:
            rows[n, part] += 0.5
    columns = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]).double()
    torch.testing.assert_close(_resample(old, (4, 4), (8, 8)), rows @ filled @ columns.T)
    for sides in ((6, 7), (6, 8)):
        noise = torch.randn(sides, dtype=torch.float64, generator=draw)
        spectrum = torch.fft.rfft2(noise - noise.mean(), norm="ortho")
        assert abs(_deviation(spectrum.abs(), sides) - float(noise.std(correction=0))) < 1e-9
        magnitudes = natural_magnitudes(model, sides)[1].clone()
        magnitudes[0, 0] = 0
        phases = spectrum / spectrum.abs().clamp(min=1e-9)
        image = torch.fft.irfft2(magnitudes * phases, s=sides, norm="ortho")
        torch.testing.assert_close(float(image.std(correction=0)), 1.8, rtol=1e-6, atol=0)


def _crops_by_hand(images: Tensor) -> None:
    """Sides from 50 to 90 % about a normal center, clipped to the image; then noise, clipped to [0, 1]."""
    options: dict[str, Any] = {"count": 3, "sides": (0.5, 0.9), "noise": 0.4, "size": (5, 7)}
    crops = random_crops(images, torch.Generator().manual_seed(1), **options).unflatten(0, (3, 5))
    draw = torch.Generator().manual_seed(1)
    for crop in crops:
        share = 0.5 + 0.4 * float(torch.rand((), generator=draw))
        lengths = [round(share * side) for side in (6, 7)]
        centers = (0.5 + 0.15 * torch.randn(2, generator=draw)).tolist()
        starts = [
            sorted((0, round(center * side - length / 2), side - length))[1]
            for center, side, length in zip(centers, (6, 7), lengths, strict=True)
        ]
        rows, columns = (slice(start, start + n) for start, n in zip(starts, lengths, strict=True))
        noise = torch.randn(1, 3, 5, 7, generator=draw)
        expected = (resize(images[..., rows, columns], (5, 7)) + 0.4 * noise).clamp(0, 1)
        torch.testing.assert_close(crop, expected)
    pixel = random_crops(images, draw, **options | {"sides": (0.01, 0.01), "noise": 0.0})
    torch.testing.assert_close(pixel, pixel[..., :1, :1].expand_as(pixel))


@method(
    family="synthesis",
    title="MACO",
    references=[
        Reference(
            key="fel2023maco",
            title="Unlocking Feature Visualization for Deeper Networks with MAgnitude Constrained "
            "Optimization",
            authors="Fel, Boissin, Boutin, Picard, Novello, Colin, Linsley, Rousseau, Cadene, Gardes, Serre",
            year=2023,
            url="https://arxiv.org/abs/2306.06805",
        )
    ],
    invariants=[PixelRange(), UnitRange(field="alpha")],
    needs=["gradients"],
    cost=Cost(
        forward=call_size.images * param.steps * param.crops,
        backward=call_size.images * param.steps * param.crops,
    ),
    oracle=magnitudes_are_those_of_the_data,
    relations=[
        Agrees(phases_by_adam, fields=("images",), networks=("gap",)),
        InvariantTo("logit_shift", tolerance=1e-6),
        ScalesWith("logits", power=0, fields=("images", "alpha"), tolerance=1e-4),
    ],
    quick={"steps": 4, "crops": 2},
    demo={
        "model": "builtin:parts-resnet",
        "dataset": "builtin:part-scenes/60",
        "target": ["boat", "fish", "butterfly", "cat"],
        "steps": 64,
        "crops": 2,
    },
)
def maco(
    model: Model,
    target: Target,
    dataset: Dataset | None = None,
    *,
    size: ImageSide = None,
    crops: Annotated[
        int, Field(ge=1, le=256, description="number of random crops of the image per step")
    ] = 4,
    crop_min: Annotated[
        float, Field(gt=0, le=1, description="smallest side of a crop, as a fraction of the image's")
    ] = 0.3,
    crop_max: Annotated[
        float, Field(gt=0, le=1, description="largest side of a crop, as a fraction of the image's")
    ] = 1.0,
    noise: Annotated[
        float, Field(ge=0, le=1, description="standard deviation of the noise added to every crop")
    ] = 0.05,
    steps: Steps = 128,
    lr: Annotated[
        float,
        Field(gt=0, le=math.pi, description="learning rate: turn of a phase per step of Adam, in radians"),
    ] = 0.2,
    frames: Frames = 0,
    seed: Seed = None,
) -> Synthesis:
    """MACO: activation maximization over the phases of a Fourier spectrum with natural magnitudes.

    phi* = argmax_phi E_t S(t(x)),  x = sigmoid(M F^-1(r exp(i phi))),  alpha = sum_steps |dS/dx|

    The magnitudes r are the mean magnitudes of a data set's spectra, so the image cannot concentrate its
    energy in the high frequencies that deep networks respond to; without a data set, r falls as the
    frequency to the power -1.2 about the model's mean color, as in photographs. t is a random crop, enlarged
    to the model's input size, plus noise; the mean over ``crops`` crops is maximized by Adam. The opacity
    alpha is large where the score depends on the image: the rest of it is only there to have the magnitudes.

    Returns:
        ``images`` (N, C, size, size) in [0, 1], one per class of the target, else one; ``scores``
        (steps, N), the mean S of the crops at every step; ``alpha`` (N, size, size) in [0, 1], over its 80th
        percentile and clipped. ``result.on_background()`` are the images with that opacity on white.

    Raises:
        InputError: ``crop_min`` above ``crop_max``, or the predicted class as the target.
        DivergenceError: the gradient is zero at the start; try another seed.

    Example::
        from phosphene import run

        result = run("maco", target=["star", "circle"], dataset="builtin:scenes/12", steps=5, seed=0)
        result.images.shape  # (2, 3, 64, 64)

    Source:
        Fel et al. 2023, equation 2 and section 4 (transparency).
    """
    if crop_min > crop_max:
        raise InputError(f"crop_min is at most crop_max, {crop_max:g}, not {crop_min:g}")
    channels, height, width = model.input_size
    sides = (size or height, size or width)
    count = class_count(target)
    magnitudes = (
        natural_magnitudes(model, sides) if dataset is None else dataset_magnitudes(model, dataset, sides)
    )
    noise_image = noise_images((1, channels, *sides), seed=seed).to(model.device, model.dtype)
    phases = torch.fft.rfft2(at_least_float32(noise_image) - 0.5).angle().to(model.dtype)
    # A class for each image, for every crop of it.
    crop_target = target.select(list(range(count)) * crops)

    def mean_score(inputs: Tensor) -> Tensor:
        return scores(model, inputs, crop_target).view(crops, count).mean(0)

    optimization = optimize_image(
        mean_score,
        PhaseImage(magnitudes, phases.expand(count, -1, -1, -1), sides[1]),
        steps=steps,
        lr=lr,
        transform=partial(
            random_crops, count=crops, sides=(crop_min, crop_max), noise=noise, size=(height, width)
        ),
        opacity=True,
        frames=frames,
        seed=seed,
    )
    return Synthesis(**optimization._asdict(), targets=target.names(model, count))


def random_crops(
    images: Tensor,
    generator: Generator,
    *,
    count: int,
    sides: tuple[float, float],
    noise: float,
    size: tuple[int, int],
) -> Tensor:
    """Random crops, resized and with noise, (count * N, C, *size): all images with the first crop, then all
    with the second. Side lengths are uniform, centers normal about the image's center.
    """
    height, width = images.shape[2:]
    crops = []
    for _ in range(count):
        fraction = sides[0] + (sides[1] - sides[0]) * float(torch.rand((), generator=generator))
        rows, columns = max(1, round(fraction * height)), max(1, round(fraction * width))
        y, x = (0.5 + 0.15 * torch.randn(2, generator=generator)).tolist()
        top = min(max(round(y * height - rows / 2), 0), height - rows)
        left = min(max(round(x * width - columns / 2), 0), width - columns)
        crop = resize(images[..., top : top + rows, left : left + columns], size)
        if noise:
            grain = torch.randn(1, *crop.shape[1:], generator=generator).to(crop)
            crop = (crop + noise * grain).clamp(0, 1)
        crops.append(crop)
    return torch.cat(crops)


def natural_magnitudes(model: Model, sides: tuple[int, int]) -> Tensor:
    """f^-1.2 with the standard deviation 1.8 in each decorrelated channel, about the model's mean color."""
    color = mean_color(model).cpu()
    magnitudes = (fourier_frequencies(*sides) ** -NATURAL_DECAY).double()
    magnitudes[0, 0] = 0
    magnitudes = magnitudes * NATURAL_DEVIATION / _deviation(magnitudes, sides)
    uniform = color.double()[None, :, None, None].expand(1, -1, *sides)
    magnitudes = magnitudes.repeat(len(color), 1, 1)
    magnitudes[:, 0, 0] = PhaseImage.spectrum(uniform)[0, :, 0, 0].real
    return magnitudes.to(model.device, model.dtype)


def _deviation(magnitudes: Tensor, sides: tuple[int, int]) -> float:
    """Standard deviation of the image of a spectrum without frequency zero, by Parseval's theorem."""
    twice = torch.full((magnitudes.shape[-1],), 2.0, dtype=magnitudes.dtype, device=magnitudes.device)
    twice[0] = 1  # the column that has no conjugate among those left out
    if sides[1] % 2 == 0:
        twice[-1] = 1
    return float((magnitudes.square() * twice).sum() / (sides[0] * sides[1])) ** 0.5


def dataset_magnitudes(model: Model, dataset: Dataset, sides: tuple[int, int]) -> Tensor:
    """Mean magnitudes (C, H, W//2 + 1) of a data set's spectra, and the mean coefficients of frequency zero.

    Of images of another size, at the same frequencies in cycles per pixel.
    """
    state = _MeanSpectrum().run(dataset, batch_size(model))
    magnitudes, mean = state["magnitudes"] / state["count"], state["mean"] / state["count"]
    height, width = dataset.read([0]).shape[2:]
    if (height, width) != sides:
        magnitudes = _resample(magnitudes, (height, width), sides)
        mean = mean * math.sqrt(sides[0] * sides[1] / (height * width))
    magnitudes[:, 0, 0] = mean
    return magnitudes.to(model.device, model.dtype)


@dataclass
class _MeanSpectrum(Fold[State]):
    """Sums over the images: magnitudes (C, H, W//2 + 1), coefficients of frequency zero (C,), and count."""

    title = "spectra"

    def update(self, state: State, batch: Batch) -> State:
        spectra = PhaseImage.spectrum(to_float64(batch.images), eps=LOGIT_CLIP)
        part = {
            "magnitudes": spectra.abs().sum(0).cpu(),
            "mean": spectra[:, :, 0, 0].real.sum(0).cpu(),
            "count": len(spectra),
        }
        # equivalent mutants: merged with nothing it is the part
        return self.merge(state, part) if state else part


def _resample(magnitudes: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Magnitudes (C, H, W//2 + 1) at the frequencies of another size, linearly interpolated.

    Frequency zero has the mean of its neighbors: its coefficient, the mean color, is no part of the decay.
    """
    height, width = old
    magnitudes = magnitudes.clone()
    magnitudes[:, 0, 0] = (magnitudes[:, 0, 1 % magnitudes.shape[2]] + magnitudes[:, 1 % height, 0]) / 2
    # Position of each new frequency in the rows and columns of the old spectrum; rows are periodic.
    y = torch.fft.fftfreq(new[0], dtype=torch.float64) * height
    x = (torch.fft.rfftfreq(new[1], dtype=torch.float64) * width).clamp(max=width // 2)
    low_y, low_x = y.floor(), x.floor()
    part_y, part_x = (y - low_y)[:, None], x - low_x
    high_x = (low_x + 1).clamp(max=width // 2)

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        return magnitudes[:, rows.long() % height][:, :, columns.long()]

    upper = at(low_y, low_x) * (1 - part_x) + at(low_y, high_x) * part_x
    lower = at(low_y + 1, low_x) * (1 - part_x) + at(low_y + 1, high_x) * part_x
    return upper * (1 - part_y) + lower * part_y


@hookimpl
def phosphene_methods():
    return [maco]
