"""Closed forms of activation maximization: starts, restarts, edits, penalties, steps of parametrizations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Permute

from phosphene import Class, InputError, Model, load_model, scores
from phosphene.images import gaussian_blur
from phosphene.optimize import CppnImage, FourierImage, Parametrization, PixelImage, l2_penalty
from phosphene.results import Synthesis

from ._activation_maximization import start_images
from ._batch_norm_prior import BatchNormPrior
from ._direction_tiles import START_NOISE, TileParams, direction_score, draw_directions, tile_size
from ._image_priors import diversity_penalty, transparent_score, with_background
from ._relations import ALL_TERMS, PLAIN, gradient_ascent

Visualize = Callable[..., Synthesis]
Score = Callable[[Tensor], Tensor]

_SIDES = (10, 13)

_STEP: dict[str, Any] = {"parametrization": "pixels", "optimizer": "sgd", "steps": 1, "lr": 20.0, "seed": 3}
_STEP |= {"start_noise": 0, **PLAIN}

#: The result is the start.
_START = _STEP | {"lr": 1e-9}


def ascent_has_its_closed_forms(visualize: Visualize) -> None:
    """Every option of ``maximize_activation``, by ``class_visualization``, on images of 10x13 pixels."""
    model = _smooth_model()
    _starts_have_their_closed_forms(visualize, model)
    _closed_units_start_from_coarse_noise(visualize)
    _single_options_agree_with_gradient_ascent(visualize, model)
    _penalties_have_their_gradients(visualize, model)
    _parametrizations_follow_their_gradients(visualize, model)
    _terms_have_their_values()
    _distances_of_statistics_by_hand()


def _starts_have_their_closed_forms(visualize: Visualize, model: Model) -> None:
    """Mean color plus white, 1/f or coarse gray noise; variants of the next seeds."""
    center, both = model.mean.double().view(3, 1, 1), Class((0, 1))
    white = torch.cat([center + 0.3 * _normal(3, seed) for seed in (3, 4)] * 2).clamp(0, 1)
    variants = visualize(model, both, **_START | {"start_noise": 0.3, "variants": 2}).images
    torch.testing.assert_close(variants, white, rtol=0, atol=1e-6)

    y, x = (torch.fft.fftfreq(side, dtype=torch.float64) for side in _SIDES)
    gain = 1 / torch.hypot(y[:, None], x).clamp(min=1 / max(_SIDES))
    gain[0, 0] = 0
    noise = torch.fft.ifft2(torch.fft.fft2(_normal(3, 3)) * gain).real
    pink = (center + 0.4 * noise / noise.std()).clamp(1e-4, 1 - 1e-4)
    fourier = visualize(model, 1, **_START | {"parametrization": "fourier", "start_noise": 0.4}).images
    torch.testing.assert_close(fourier, pink, rtol=0, atol=1e-6)

    contrast = visualize(model, both, **_START | {"start_contrast": 0.2, "seed": 5}).images
    gray = (center + _coarse(5) - 0.5).clamp(0, 1).expand(2, -1, -1, -1)
    torch.testing.assert_close(contrast, gray, rtol=0, atol=1e-6)

    # An image of one pixel has no frequency but zero, so no noise; all images have the same noise.
    pixels = start_images(model, (2, 3, 1, 1), "fourier", 0.4, 3)
    torch.testing.assert_close(pixels, center.expand(2, -1, -1, -1), rtol=0, atol=1e-6)


def _closed_units_start_from_coarse_noise(visualize: Visualize) -> None:
    """Without gradient at the start: noise of the next seeds, until one opens the ReLUs."""
    conv = nn.Conv2d(3, 2, 1)
    model = _pooled(conv, nn.ReLU())
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight.fill_(1 / 3)
        # Half of the pixels of white noise exceed the first threshold, few of coarse noise the second one.
        conv.bias.copy_(torch.tensor([-0.5, -0.92]))
    white = [0.5 + 0.01 * _normal(3, seed) for seed in (3, 4)]
    expected = torch.cat([*white, _coarse(3 + 2), _coarse(3 + 8 + 1)])
    options = {"start_noise": 0.01, "variants": 2}
    images = visualize(model, Class((0, 1)), **_START | options).images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)

    conv.bias.data[1] = -0.71
    color, cppn = torch.full((3,), 0.5), {"parametrization": "cppn", "start_noise": 0.01, "seed": 0}
    weights = [CppnImage.initial_weights(color, deviation=d, seed=s) for d, s in ((0.01, 0), (0.2, 1))]
    drawn = CppnImage(torch.stack(weights), _SIDES, 3).image().detach()
    images = visualize(model, Class((0, 1)), **_START | cppn).images
    torch.testing.assert_close(images, drawn, rtol=0, atol=1e-6)


def _single_options_agree_with_gradient_ascent(visualize: Visualize, model: Model) -> None:
    start, off = _start_image(), dict.fromkeys(ALL_TERMS, 0)
    edits: list[dict[str, Any]] = [
        {"blur_every": 3, "blur_sigma": 0.7, "steps": 4},
        {"clip_norm": 30},
        {"clip_contribution": 30},
        {"clip_gradient": 30},
        {"clip_gradient": 30, "jitter": 3},
        {"rotate": 15},
        {"rescale": 1.5},
        {"total_variation": 0.002},
    ]
    for edit in edits:
        images = visualize(model, Class((0, 1)), start, **_STEP | edit).images
        both = start.expand(2, -1, -1, -1)
        expected = gradient_ascent(_score(model, (0, 1)), both, model.mean, off | _STEP | edit)
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-9, msg=f"other images with {edit}")


def _penalties_have_their_gradients(visualize: Visualize, model: Model) -> None:
    start, score = _start_image(), _score(model, (1,))
    prior = BatchNormPrior(model)
    images = visualize(model, 1, start, **_STEP | {"batch_norm": 0.02}).images
    expected = _after_step(PixelImage(start), lambda x: score(x) - 0.02 * prior(x))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-9)

    images = visualize(model, 1, start, **_STEP | {"minimize": True}).images
    torch.testing.assert_close(images, _after_step(PixelImage(start), lambda x: -score(x)))

    similarity = diversity_penalty(model, model.last_map, 2)
    starts = torch.cat([model.mean.view(3, 1, 1) + 0.1 * _normal(3, seed) for seed in (3, 4)]).clamp(0, 1)
    options = {"diversity": 0.5, "variants": 2, "start_noise": 0.1}
    images = visualize(model, Class((0, 1)), **_STEP | options).images
    both = _score(model, (0, 0, 1, 1))
    expected = _after_step(PixelImage(starts.repeat(2, 1, 1, 1)), lambda x: both(x) - 0.5 * similarity(x))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


def _terms_have_their_values() -> None:
    """Cosines of variants, of maps, tokens and vectors; a background of natural amplitudes; opacity."""
    draw = torch.Generator().manual_seed(0)
    pixels = nn.Sequential(nn.Identity(), nn.Flatten(2), _Transpose(), nn.Flatten())
    model = load_model(pixels, input_size=(3, 4, 5), mean=[0.0] * 3, std=[1.0] * 3)
    images = torch.rand(6, 3, 4, 5, generator=draw).double()
    gram = torch.einsum("nchw,ndhw->ncd", images, images)
    vectors = images.movedim(1, 3).flatten(1)
    for layer, grams in (
        ("0", gram),
        ("2", gram),  # tokens of a grid
        ("3", torch.einsum("nc,nd->ncd", vectors, vectors)),
    ):
        cosines = F.cosine_similarity(grams.flatten(1)[:, None], grams.flatten(1)[None], dim=2)
        # Two units of three variants each.
        pairs = ((1, 2), (0, 2), (0, 1), (4, 5), (3, 5), (3, 4))
        expected = torch.stack([(cosines[n, a] + cosines[n, b]) / 2 for n, (a, b) in enumerate(pairs)])
        penalty = diversity_penalty(model, layer, 3)(images.float())
        torch.testing.assert_close(penalty.double(), expected, rtol=1e-4, atol=1e-4)

    # Of two layouts of one shape, the layer's name says which a map has.
    both = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), Permute([0, 2, 3, 1]))
    square = load_model(both, input_size=(3, 3, 3))
    first, last = (diversity_penalty(square, layer, 2)(images[:2, :, :3, :3].float()) for layer in "01")
    torch.testing.assert_close(first, last)

    transform = with_background(lambda values, _: 2 * values)
    opaque = torch.rand(2, 4, 10, 13, generator=draw)
    seed = lambda: torch.Generator().manual_seed(7)
    augmented = transform(opaque, seed())
    assert torch.equal(augmented[:, :4], 2 * opaque) and augmented.shape == (2, 7, 10, 13)
    assert torch.equal(with_background(None)(opaque, seed())[:, :4], opaque)
    assert torch.equal(augmented[0, 4:], augmented[1, 4:]), "the backgrounds of images differ"
    noise = augmented[0, 4:].double().logit()
    assert abs(float(noise.std()) - 1) < 1e-4
    # Its spectrum is white noise over the frequency, of which 1 / 13 is the lowest.
    rows, columns = torch.fft.fftfreq(10), torch.fft.rfftfreq(13)
    frequencies = (rows[:, None] ** 2 + columns**2).sqrt().clamp(min=1 / 13)
    white = torch.randn(1, 3, 10, 13, generator=seed(), dtype=torch.float64)[0]
    ratio = torch.fft.rfft2(noise) * frequencies / torch.fft.rfft2(white)
    assert (ratio - ratio.mean()).abs().max() < 1e-3 * ratio.mean().abs()

    # 0.25 of 0.8 over 0.4 is 0.5: (0.5^2 - 0.4^2) (1 - 0.25); the background alone scores 0.4^2.
    parts = [torch.full((1, count, 2, 2), value) for count, value in ((3, 0.8), (1, 0.25), (3, 0.4))]
    inputs = torch.cat(parts, 1).requires_grad_()
    score = transparent_score(lambda images: images.square().mean((1, 2, 3)))(inputs)
    assert abs(score.item() - 0.0675) < 1e-6
    (gradient,) = torch.autograd.grad(score.sum(), inputs)
    # Of the background's own score there is no gradient: 2 * 0.5 * (1 - 0.25) * (1 - 0.25) in all.
    assert abs(float(gradient[:, 4:].sum()) - 0.5625) < 1e-6


class _Transpose(nn.Module):
    """(N, C, T) -> (N, T, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT


def _distances_of_statistics_by_hand() -> None:
    """Of maps and of vectors, of single images and of the batch; norms without stored statistics."""
    norms = nn.BatchNorm2d(3), nn.BatchNorm1d(60), nn.InstanceNorm2d(3, track_running_stats=True)
    for seed, norm in enumerate(norms):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(_normal(1, seed).flatten()[: norm.num_features])
        norm.running_var.copy_(1 + _normal(1, 9 + seed).flatten()[: norm.num_features].square())
    network = nn.Sequential(norms[2], norms[0], nn.Flatten(), norms[1]).double().eval()
    model = load_model(network, input_size=(3, 4, 5), mean=[0.0] * 3, std=[1.0] * 3)
    images = torch.rand(4, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prior = BatchNormPrior(model)
    assert list(prior.layers) == ["1", "3"], "not the batch norms alone"
    with torch.no_grad():
        first = network[0](images)
        inputs = [first.flatten(2).movedim(1, 2), network[1](first).flatten(1)[:, None]]  # (N, positions, C)
    expected = []
    for together in (False, True):
        distances = torch.zeros(4, dtype=torch.float64)
        for values, norm in zip(inputs, norms[:2], strict=True):
            assert norm.running_mean is not None and norm.running_var is not None
            sets = [values.flatten(0, 1)] * 4 if together else list(values)
            for n, rows in enumerate(sets):
                variance = (rows - rows.mean(0)).square().mean(0)
                both = (rows.mean(0) - norm.running_mean).norm() + (variance - norm.running_var).norm()
                distances[n] += both / 4 if together else both
        expected.append(distances)
        torch.testing.assert_close(prior(images, together=together), distances)
    with prior.record() as tap:
        model(images)
    for together, distances in zip((False, True), expected, strict=True):
        torch.testing.assert_close(prior.distances(tap, together=together), distances)


def _parametrizations_follow_their_gradients(visualize: Visualize, model: Model) -> None:
    start, score = _start_image(), _score(model, (1,))
    images = visualize(model, 1, start, **_STEP | {"parametrization": "fourier"}).images
    torch.testing.assert_close(images, _after_step(FourierImage(start), score))

    def opaque(images: Tensor) -> Tensor:
        inputs = with_background(None)(images, torch.Generator().manual_seed(3))
        return transparent_score(score)(inputs) - 0.001 * l2_penalty(images[:, :3], model.mean)

    options: dict[str, Any] = {"parametrization": "fourier", "transparent": True, "l2": 0.001, "frames": 1}
    result = visualize(model, 1, start, **_STEP | options)
    half = torch.full_like(start[:, :1], 0.5)
    expected = _after_step(FourierImage(torch.cat([start, half], 1), opacity=True), opaque)
    _check_transparent(result, expected)
    assert result.frames is not None
    torch.testing.assert_close(result.frames[0], (255 * expected[:, :3]).round().byte())

    color = torch.cat([model.mean, torch.tensor([0.5])])
    weights = CppnImage.initial_weights(color, deviation=0.2, opacity=True, seed=3)
    network = CppnImage(weights[None], (12, 12), 4, opacity=True)
    _after_step(network, opaque)
    options |= {"parametrization": "cppn", "start_noise": 0.2, "size": 12, "render_size": 16}
    _check_transparent(visualize(model, 1, **_STEP | options), network.render(16, 16).detach())

    refused = False
    try:
        visualize(model, 1, **_STEP | {"transparent": True})
    except InputError:
        refused = True
    assert refused, "pixels have no opacity"


def directions_have_their_closed_forms() -> None:
    """Score, side and start of the tiles of ``draw_directions``."""
    conv = nn.Conv2d(3, 2, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([0.9, -0.4, 0.3, -0.2, 0.8, 0.6]).view_as(conv.weight))
    model = _pooled(conv, mean=[0.4, 0.5, 0.6], std=[0.5, 0.25, 0.4])
    images = _start_image()
    images[..., :2, :] = model.mean.double().view(3, 1, 1)  # there the activations are 0
    images.requires_grad_()
    units = torch.tensor([[0.6, -0.8]], dtype=torch.float64)
    score = direction_score(images, model=model, layer="0", units=units, power=2.0)
    maps = torch.einsum("kc,nchw->nkhw", conv.weight[..., 0, 0], model.normalize(images))[0].flatten(1)
    values = [float(units[0] @ a) for a in maps.detach().T]
    cosines = [value / max(float(a.norm()), 1e-9) for value, a in zip(values, maps.detach().T, strict=True)]
    expected = sum(value * max(c, 0.1) ** 2 for value, c in zip(values, cosines, strict=True)) / len(values)
    torch.testing.assert_close(score, images.new_tensor([expected]))
    assert min(cosines) < 0 < 0.5 < max(cosines)
    assert torch.autograd.grad(score, images)[0].isfinite().all()

    for height, width in ((10, 70), (70, 10)):
        long = load_model(model.module, input_size=(3, height, width))
        assert tile_size(long, None) == (min(height, 64), min(width, 64))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 70 * 66, 2))
    assert tile_size(load_model(flat, input_size=(3, 70, 66)), None) == (70, 66)
    assert tile_size(model, 8) == (8, 8)
    _tiles_start_and_follow_their_gradients(model)


def _tiles_start_and_follow_their_gradients(model: Model) -> None:
    plain: dict[str, Any] = {"parametrization": "pixels", "optimizer": "sgd", "steps": 1, **PLAIN}
    conv = nn.Conv2d(3, 2, 1)
    closed = _pooled(conv, nn.ReLU())
    with torch.no_grad():
        conv.weight.fill_(1 / 3)
        conv.bias = nn.Parameter(torch.tensor([-0.5, -0.92], dtype=torch.float64))
    directions = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    params = TileParams(**plain | {"lr": 1e-9})
    tiles, values = draw_directions(closed, "1", directions, _SIDES, params, 0)
    white = (0.5 + START_NOISE * _normal(3, 0)).clamp(0, 1)
    expected = torch.cat([white, torch.full_like(white, 0.5), _coarse(0 + 1)])
    torch.testing.assert_close(tiles, expected, rtol=0, atol=1e-6)
    units = torch.eye(2, dtype=torch.float64)
    score = direction_score(expected[[0, 2]], model=closed, layer="1", units=units, power=params.power)
    torch.testing.assert_close(values, torch.stack([score[0], score[0] * 0, score[1]]), rtol=0, atol=1e-6)

    options = {**plain, "steps": 2, "lr": 20.0, "jitter": 2, "rotate": 10.0, "rescale": 1.2}
    tiles, _ = draw_directions(model, "0", directions[:1], _SIDES, TileParams(**options), 3)
    start = start_images(model, (1, 3, *_SIDES), "pixels", START_NOISE, 3)
    score_of = partial(direction_score, model=model, layer="0", units=units[:1], power=2.0)
    loop = dict.fromkeys(ALL_TERMS, 0) | options | {"seed": 3}
    torch.testing.assert_close(tiles, gradient_ascent(score_of, start, model.mean, loop), rtol=0, atol=1e-6)


def _check_transparent(result: Synthesis, expected: Tensor) -> None:
    assert result.alpha is not None and not result.images.requires_grad
    torch.testing.assert_close(result.images, expected[:, :3], rtol=0, atol=1e-9)
    torch.testing.assert_close(result.alpha, expected[:, 3], rtol=0, atol=1e-9)


def _after_step(image: Parametrization, objective: Score) -> Tensor:
    """The images after one step of gradient ascent."""
    (gradient,) = torch.autograd.grad(objective(image.image()).sum(), image.parameter)
    image.parameter.data += _STEP["lr"] * gradient
    image.project()
    return image.image().detach()


def _score(model: Model, classes: Sequence[int]) -> Score:
    return lambda images: scores(model, images, Class(tuple(classes)))


def _normal(channels: int, seed: int) -> Tensor:
    noise = torch.randn(1, channels, *_SIDES, generator=torch.Generator().manual_seed(seed))
    return noise.double()


def _coarse(seed: int) -> Tensor:
    """Gray noise (1, 3, H, W) of deviation 0.2 about 1/2, blurred by a tenth of the shorter side."""
    noise = gaussian_blur(_normal(1, seed), min(_SIDES) / 10)
    return (0.5 + 0.2 * noise / noise.std()).clamp(0, 1).expand(-1, 3, -1, -1)


def _start_image() -> Tensor:
    return 0.5 + 0.3 * torch.linspace(0, 99, 3 * _SIDES[0] * _SIDES[1]).double().sin().view(1, 3, *_SIDES)


def _pooled(*layers: nn.Module, **options: Any) -> Model:
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return load_model(network.double().eval(), input_size=(3, *_SIDES), **options)


def _smooth_model() -> Model:
    """Two smooth logits of a batch-normalized convolution, for pixels of the mean (0.4, 0.5, 0.6)."""
    conv, norm = nn.Conv2d(3, 2, 3, bias=False), nn.BatchNorm2d(2)
    with torch.no_grad():
        conv.weight.copy_(torch.linspace(-3, 4, 54).sin().view_as(conv.weight))
    norm.running_mean, norm.running_var = torch.tensor([0.3, -0.2]), torch.tensor([2.0, 1.5])
    return _pooled(conv, norm, nn.Tanh(), mean=[0.4, 0.5, 0.6], std=[0.5, 0.25, 0.4])
