"""Image optimization against closed forms, SciPy, NumPy and torch.optim."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, optimize
from torch import Tensor, nn

from phosphene.errors import DivergenceError, InputError, UnknownName
from phosphene.images import gaussian_blur, noise_images
from phosphene.optimize import (
    CppnImage,
    FourierImage,
    LatentImage,
    Optimization,
    Parametrization,
    PhaseImage,
    PixelImage,
    clip_smallest,
    concatenate_stages,
    gram_matrix,
    jitter,
    l2_penalty,
    optimize_image,
    total_variation,
)

OPTIMIZERS = ["adam", "sgd", "normalized-sgd", "lbfgs"]
few = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 13)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2), nn.Tanh(), nn.Flatten(1)
    ).double()


# ------------------------------------------------------------------ parametrizations


@given(n=st.integers(1, 2), c=st.integers(1, 4), h=sizes, w=sizes, seed=st.integers(0, 99))
@few
def test_fourier_image_equals_numpy_irfft2(n: int, c: int, h: int, w: int, seed: int) -> None:
    image = FourierImage(rand(n, c, h, w))
    image.mix = torch.eye(c).double()
    image.parameter = randn(n, c, h, w // 2 + 1, 2, seed=seed)
    spectrum = torch.view_as_complex(image.parameter).numpy()
    f = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w))
    scale = 1 / np.maximum(f, 1 / max(h, w))
    signal = np.fft.irfft2(scale * spectrum, s=(h, w), norm="ortho") / 4
    assert image.image().shape == (n, c, h, w)
    np.testing.assert_allclose(image.image().detach(), 1 / (1 + np.exp(-signal)), atol=1e-12)


@given(c=st.integers(1, 4), h=sizes, w=sizes, decay=st.sampled_from([0.0, 1.0, 1.5]))
@few
def test_fourier_represents_its_initial_images(c: int, h: int, w: int, decay: float) -> None:
    images = rand(2, c, h, w) * 0.9997 + 0.00015
    result = FourierImage(images, decay=decay)
    torch.testing.assert_close(result.image().detach(), images, atol=1e-12, rtol=0)


@given(c=st.integers(1, 4), h=sizes, w=sizes, seed=st.integers(0, 99))
@few
def test_phase_image_keeps_every_magnitude_whatever_its_phases(c: int, h: int, w: int, seed: int) -> None:
    images = 0.1 + 0.8 * rand(2, c, h, w, seed=seed)
    spectra = PhaseImage.spectrum(images)
    magnitudes = spectra[0].abs()
    magnitudes[:, 0, 0] = spectra[0, :, 0, 0].real
    image = PhaseImage(magnitudes, spectra.angle(), w)
    torch.testing.assert_close(image.image()[0].detach(), images[0], atol=1e-9, rtol=0)
    with torch.no_grad():
        image.parameter.add_(randn(2, c, h, w // 2 + 1, seed=seed))
    changed = PhaseImage.spectrum(image.image().detach(), eps=1e-12)
    torch.testing.assert_close(changed.abs(), magnitudes.abs().expand_as(changed), atol=1e-6, rtol=0)
    torch.testing.assert_close(changed[:, :, 0, 0].real, spectra[:1, :, 0, 0].real.expand(2, -1))


def test_phase_image_refuses_shapes_and_magnitudes() -> None:
    magnitudes, phases = rand(3, 4, 3), randn(2, 3, 4, 3)
    for wrong in ((magnitudes[0], phases, 5), (magnitudes, phases[0], 5), (magnitudes, phases, 7)):
        with pytest.raises(InputError, match="phases"):
            PhaseImage(*wrong)
    for bad in (-1.0, math.nan, math.inf):
        wrong_magnitudes = magnitudes.clone()
        wrong_magnitudes[0, 1, 1] = bad
        with pytest.raises(InputError, match="finite and nonnegative"):
            PhaseImage(wrong_magnitudes, phases, 5)
    with pytest.raises(InputError, match="PhaseImage cannot be set from pixels"):
        PhaseImage(magnitudes, phases, 5).assign(rand(2, 3, 4, 5))


def test_opacity_is_the_sum_of_absolute_gradients_over_its_80th_percentile() -> None:
    weight = randn(2, 3, 4, 5)
    weight[1, :, :2] = 0
    score = lambda images: (weight * images).sum((1, 2, 3))
    result = optimize_image(score, PixelImage(rand(2, 3, 4, 5)), steps=3, lr=0.01, opacity=True)
    mean = weight.abs().mean(1)
    percentile = mean.flatten(1).quantile(0.8, dim=1)[:, None, None]
    torch.testing.assert_close(result.alpha, (mean / percentile).clamp(max=1))
    assert optimize_image(score, PixelImage(rand(2, 3, 4, 5)), steps=1, lr=0.01).alpha is None
    weight = torch.zeros(1, 1, 4, 5).double()
    weight[..., 0, 0] = 1
    single = optimize_image(score, PixelImage(rand(1, 1, 4, 5)), steps=1, lr=0.01, opacity=True)
    weight = weight[0]
    torch.testing.assert_close(single.alpha, weight)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_cppn_image_is_the_network_of_its_formula(channels: int) -> None:
    opacity, (h, w) = channels == 4, (5, 8)
    color = torch.tensor([0.3, 0.6, 0.4, 0.5][:channels]).double()
    draw = lambda seed, sd=0.1: CppnImage.initial_weights(color, deviation=sd, opacity=opacity, seed=seed)
    weights = torch.stack([draw(0), draw(1)])
    image = CppnImage(weights, (h, w), channels, opacity=opacity)
    with torch.no_grad():
        image.parameter.add_(randn(*image.parameter.shape))
    mix = FourierImage(rand(1, channels, 4, 4), opacity=opacity).mix
    y, x = ((2 * np.arange(n) + 1 - n) / w * np.sqrt(3) for n in (h, w))
    for row, actual in zip(image.parameter.detach().numpy() / 25, image.image().detach(), strict=True):
        z, start = np.stack(np.meshgrid(x, y), -1), 0
        for n, outputs in enumerate([24] * 8 + [channels]):
            if n:
                z = np.concatenate([np.arctan(z) / 0.671, (np.arctan(z) ** 2 - 0.45) / 0.396], -1)
            inputs = z.shape[-1]
            matrix = row[start : start + inputs * outputs].reshape(inputs, outputs)
            start += inputs * outputs + outputs
            z = z @ matrix + row[start - outputs : start]
        expected = 1 / (1 + np.exp(-z @ mix.numpy().T))
        np.testing.assert_allclose(actual, expected.transpose(2, 0, 1), atol=1e-10)
        assert start == len(row)
    # About the color and of the standard deviation at the start; of a larger size the same function.
    first = CppnImage(torch.stack([draw(n, 0.02) for n in range(20)]), (16, 16), channels, opacity=opacity)
    assert (first.image().mean((0, 2, 3)) - color).abs().max() < 0.03
    difference = first.image().detach() - color[:, None, None]
    assert float(difference.square().mean().sqrt()) == pytest.approx(0.02, rel=0.4)
    assert (draw(0, 0.0).reshape(1, -1) == draw(0, 0.0)).all()
    uniform = CppnImage(draw(0, 0.0)[None], (3, 3), channels, opacity=opacity).image()
    torch.testing.assert_close(uniform[0], color[:, None, None].expand(-1, 3, 3))
    torch.testing.assert_close(first.render(48, 48)[..., 1::3, 1::3], first.image())


def test_cppn_image_refuses_weights_of_another_shape_and_pixels() -> None:
    weights = CppnImage.initial_weights(torch.full((3,), 0.5), deviation=0.1, seed=0)
    for wrong in (weights, weights[None, 1:], weights[None].long()):
        with pytest.raises(InputError, match="an image of 3 channels needs floats"):
            CppnImage(wrong, (4, 4), 3)
    with pytest.raises(InputError, match="CppnImage cannot be set from pixels"):
        CppnImage(weights[None], (4, 4), 3).assign(rand(1, 3, 4, 4))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bound", [10.0, 0.3])
def test_latent_image_of_a_linear_decoder_reaches_the_closed_form(optimizer: Any, bound: float) -> None:
    """max w.(D z + 1/2) - l2 ||z||^2 is attained at z = D^T w / (2 l2), clipped to the bound."""
    decoder, weight = 0.1 * randn(12, 5, seed=1), randn(3, 12, seed=2)
    decode = lambda z: (0.5 + z @ decoder.T).view(-1, 3, 2, 2)
    image = LatentImage(0.5 * randn(3, 5, seed=3), decode, l2=0.5, bound=bound)
    assert image.parameter.abs().max() <= bound
    result = optimize_image(
        lambda images: (images.flatten(1) * weight).sum(1),
        image,
        steps=40 if optimizer in ("sgd", "lbfgs") else 800,
        lr={"sgd": 0.3, "lbfgs": 1.0, "adam": 1e-2}.get(optimizer, 2e-3),
        optimizer=optimizer,
    )
    expected = (weight @ decoder).clamp(-bound, bound)
    torch.testing.assert_close(image.parameter.detach(), expected, atol=5e-3, rtol=0)
    torch.testing.assert_close(result.images, decode(image.parameter.detach()), atol=1e-12, rtol=0)


def test_latent_image_clips_pixels_and_refuses_invalid_codes() -> None:
    image = LatentImage(randn(2, 12), lambda z: (9 * z).view(-1, 3, 2, 2)).image()
    assert image.min() == 0 and image.max() == 1
    for bad in (torch.zeros(3), torch.zeros(2, 0), torch.zeros(2, 3, dtype=torch.int64)):
        with pytest.raises(InputError, match="codes must be floats"):
            LatentImage(bad, lambda z: z)
    with pytest.raises(InputError, match="LatentImage cannot be set from pixels"):
        LatentImage(randn(2, 3), lambda z: z).assign(rand(2, 1, 1, 3))


def test_fourier_columns_all_have_gradients_at_odd_widths() -> None:
    for width in (4, 5, 7):
        image = FourierImage(rand(1, 1, 6, width))
        score = (image.image() * randn(1, 1, 6, width)).sum()
        (gradient,) = torch.autograd.grad(score, image.parameter)
        assert (gradient.abs().sum((0, 1, 2, 4)) > 0).all()


def test_fourier_gradient_and_color_matrix() -> None:
    image = FourierImage(rand(1, 3, 4, 5))
    mix = torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]]).double()
    torch.testing.assert_close(image.mix, mix / mix.norm(dim=0).max())

    def image_of(spectrum: Tensor) -> Tensor:
        image.parameter = spectrum
        return image.image()

    assert torch.autograd.gradcheck(image_of, image.parameter)


def test_noise_is_equal_for_all_images_of_a_batch() -> None:
    many, one = noise_images((3, 3, 5, 6), seed=4), noise_images((1, 3, 5, 6), seed=4)
    assert torch.equal(many, one.expand(3, -1, -1, -1))
    assert not torch.equal(one, noise_images((1, 3, 5, 6), seed=5))
    color = torch.tensor([0.2, 0.5, 0.7])
    flat = noise_images((1, 3, 5, 6), seed=4, mean=color, sd=0)
    assert torch.equal(flat[0, :, 2, 3], color)
    assert noise_images((1, 3, 5, 6), seed=4, mean=color.double()).dtype == torch.float64


def test_pixel_image_copies_clips_and_checks_its_input() -> None:
    init = rand(2, 3, 4, 4)
    image = PixelImage(init)
    image.assign(init * 4 - 2)
    assert image.image().min() == 0 and image.image().max() == 1
    assert torch.equal(init, rand(2, 3, 4, 4))
    bad = [rand(3, 4, 4), rand(1, 3, 4, 4) + 0.5, rand(0, 3, 4, 4)]
    bad += [torch.full((1, 3, 2, 2), torch.nan), torch.zeros(1, 3, 2, 2, dtype=torch.uint8)]
    for images in bad:
        for kind in (PixelImage, FourierImage):
            with pytest.raises(InputError):
                kind(images)


# ------------------------------------------------------------------ regularizers


@pytest.mark.parametrize("beta", [1, 2, 3])
@given(a=st.floats(-2, 2), b=st.floats(-2, 2), h=st.integers(1, 7), w=st.integers(1, 7))
@few
def test_total_variation_of_a_ramp(beta: int, a: float, b: float, h: int, w: int) -> None:
    ramp = a * torch.arange(w).double() + b * torch.arange(h).double()[:, None]
    images = torch.stack([ramp, torch.zeros_like(ramp)])[:, None]
    expected = (h - 1) * (w - 1) * (a**2 + b**2) ** (beta / 2)
    result = total_variation(images, beta)
    assert result[0].item() == pytest.approx(expected, abs=1e-9) and result[1] == 0


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_total_variation_is_differentiable_everywhere(beta: float) -> None:
    flat = torch.full((1, 3, 5, 5), 0.5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(total_variation(flat, beta).sum(), flat)
    assert (gradient == 0).all()
    leaf = rand(2, 2, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(partial(total_variation, beta=beta), leaf)


def test_l2_penalty_is_measured_from_the_center() -> None:
    images, color = rand(2, 3, 4, 5), torch.tensor([0.1, 0.5, 0.9])
    expected = ((images.numpy() - color.double().numpy()[:, None, None]) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(l2_penalty(images, color.double()), expected)
    np.testing.assert_allclose(l2_penalty(images, 0.0), (images.numpy() ** 2).sum((1, 2, 3)))


@given(h=st.integers(1, 9), w=st.integers(1, 12), sigma=st.floats(0, 4))
@few
def test_blur_equals_scipy(h: int, w: int, sigma: float) -> None:
    images = rand(2, 3, h, w)
    widths = (0, 0, sigma, sigma)
    expected = ndimage.gaussian_filter(images.numpy(), widths, truncate=4, mode="reflect")
    np.testing.assert_allclose(gaussian_blur(images, sigma), expected, atol=1e-12)


def test_clip_smallest_clips_below_the_percentile() -> None:
    images, gradient = rand(2, 3, 6, 5), randn(2, 3, 6, 5, seed=1)
    center = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64)
    x, g, c = images.numpy(), gradient.numpy(), center.numpy()[:, None, None]
    for result, importance in [
        (clip_smallest(images, 30, center), np.sqrt(((x - c) ** 2).sum(1))),
        (clip_smallest(images, 30, center, gradient=gradient), np.abs(((x - c) * g).sum(1))),
    ]:
        for i in range(2):
            clipped = importance[i] < np.percentile(importance[i], 30)
            assert clipped.sum() == 9
            np.testing.assert_array_equal(result[i], np.where(clipped, c, x[i]))
    assert torch.equal(clip_smallest(images, 0), images)


# ------------------------------------------------------------------ transforms, Gram matrices


def test_jitter_rolls_all_images_by_one_shift() -> None:
    image = rand(1, 3, 9, 14)
    generator = torch.Generator().manual_seed(0)
    out = jitter(image.expand(2, -1, -1, -1), generator, pixels=3)
    assert torch.equal(out[0], out[1])
    assert not torch.equal(jitter(image, generator, pixels=3)[0], out[0])
    assert torch.equal(jitter(image, torch.Generator().manual_seed(0), pixels=3)[0], out[0])
    shifts = [image.roll((y, x), (2, 3))[0] for y in range(-3, 4) for x in range(-3, 4)]
    assert any(torch.equal(out[0], shift) for shift in shifts)


def test_gram_matrix_is_divided_by_the_number_of_positions() -> None:
    features = randn(2, 3, 4, 5)
    raw = np.einsum("nchw,ndhw->ncd", features.numpy(), features.numpy())
    np.testing.assert_allclose(gram_matrix(features), raw / 20)


# ------------------------------------------------------------------ the loop


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.2), ("adam", 0.02), ("lbfgs", 1.0)])
@pytest.mark.parametrize("maximize", [True, False])
def test_linear_unit_with_l2_reaches_w_over_lambda(optimizer, lr, maximize) -> None:
    # two images with different units: maximum of w.x - (lambda/2)|x|^2 in the box: clip(w/lambda)
    w, decay = rand(2, 3, 4, 4) * 3 - 0.5, 2.0
    sign = 1 if maximize else -1
    result = optimize_image(
        lambda x: sign * (w * x).sum((1, 2, 3)),
        PixelImage(torch.full_like(w, 0.5)),
        steps=400,
        lr=lr,
        optimizer=optimizer,
        maximize=maximize,
        regularizer=lambda x: decay / 2 * l2_penalty(x, 0.0),
    )
    torch.testing.assert_close(result.images, (w / decay).clamp(0, 1), atol=1e-6, rtol=0)
    assert result.scores.shape == (400, 2)
    torch.testing.assert_close(result.scores[0], sign * (w * 0.5).sum((1, 2, 3)))


def test_sgd_is_the_plain_update_and_adam_equals_torch() -> None:
    w, start = randn(1, 3, 3, 3) * 0.1, torch.full((1, 3, 3, 3), 0.5, dtype=torch.float64)

    def objective(x: Tensor) -> Tensor:
        return (w * x.exp()).sum((1, 2, 3))

    one = optimize_image(objective, PixelImage(start), steps=1, lr=0.3, optimizer="sgd")
    gradient = w * start.exp()
    torch.testing.assert_close(one.images, start + 0.3 * gradient, atol=1e-15, rtol=0)
    one = optimize_image(objective, PixelImage(start), steps=1, lr=0.1, optimizer="normalized-sgd")
    torch.testing.assert_close(one.images, start + 0.1 * gradient / gradient.square().mean().sqrt())

    expected = start.clone().requires_grad_()
    adam = torch.optim.Adam([expected], lr=0.01, maximize=True)
    for _ in range(20):
        adam.zero_grad()
        objective(expected).sum().backward()
        adam.step()
    result = optimize_image(objective, PixelImage(start), steps=20, lr=0.01, optimizer="adam")
    torch.testing.assert_close(result.images, expected.detach(), atol=1e-12, rtol=0)


def test_lbfgs_reaches_the_minimum_of_scipys_lbfgsb() -> None:
    # An ill-conditioned quadratic whose minimum is partly on the bounds.
    a = randn(27, 27)
    matrix = a @ a.T + 0.1 * torch.eye(27)
    target = rand(2, 27) * 1.6 - 0.3

    def loss(x: Tensor) -> Tensor:
        off = x.flatten(1) - target
        return 0.5 * ((off @ matrix) * off).sum(1)

    start = torch.full((2, 3, 3, 3), 0.5, dtype=torch.float64)
    result = optimize_image(loss, PixelImage(start), steps=400, lr=1, optimizer="lbfgs", maximize=False)
    for i in range(2):
        q, t = matrix.numpy(), target[i].numpy()
        best = optimize.minimize(
            lambda x, q=q, t=t: (0.5 * (x - t) @ q @ (x - t), q @ (x - t)),
            np.full(27, 0.5),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, 1)] * 27,
            options={"ftol": 1e-15, "gtol": 1e-10},
        )
        assert loss(result.images)[i].item() <= best.fun * 1.001 + 1e-9
    assert (result.scores.diff(dim=0) <= 1e-12).all()


def test_lbfgs_converges_fast_on_smooth_problems() -> None:
    x0 = 0.3 + 0.4 * rand(1, 2, 3, 3)
    a = randn(18, 18, seed=5) / 4 + torch.eye(18)

    def loss(x: Tensor) -> Tensor:
        return ((x - x0).flatten(1) @ a).square().sum(1) + (x - x0).pow(4).sum((1, 2, 3))

    start = PixelImage(torch.full_like(x0, 0.5))
    result = optimize_image(loss, start, steps=60, lr=1, optimizer="lbfgs", maximize=False)
    assert result.scores[-1] < 1e-12


def test_lbfgs_stops_when_converged_and_evaluates_edited_images() -> None:
    target, evaluated = rand(2, 3, 3, 3), []

    def loss(x: Tensor) -> Tensor:
        evaluated.append(x.detach().clone())
        return (x - target).square().sum((1, 2, 3))

    def run(steps: int, after=None) -> Tensor:
        start = PixelImage(torch.full_like(target, 0.5))
        settings = {"lr": 1, "optimizer": "lbfgs", "maximize": False, "after_step": after}
        return optimize_image(loss, start, steps=steps, **settings).scores

    run(200)
    assert len(evaluated) < 300
    edited = run(4, lambda images, gradient, step: torch.full_like(images, 0.1 * (step + 1)))
    for step in range(3):
        expected = (0.1 * (step + 1) - target).square().sum((1, 2, 3))
        torch.testing.assert_close(edited[step + 1], expected)


def make_fourier(shape: tuple[int, int, int, int]) -> Parametrization:
    return FourierImage(noise_images(shape, seed=1).double())


def make_pixels(shape: tuple[int, int, int, int]) -> Parametrization:
    return PixelImage(noise_images(shape, seed=1).double())


@pytest.mark.parametrize("make", [make_pixels, make_fourier])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_batch_equals_its_images_alone_and_is_repeatable(make, optimizer: str) -> None:
    net, units = small_net(), torch.tensor([0, 7, 11])

    def run(rows: Tensor):
        def after(images: Tensor, gradient: Tensor, step: int) -> Tensor:
            return gaussian_blur(clip_smallest(images, 5), 0.3) if step % 3 == 2 else images

        return optimize_image(
            lambda x: net(x)[torch.arange(len(rows)), rows],
            make((len(rows), 3, 11, 11)),
            steps=8,
            lr=0.05 if optimizer != "lbfgs" else 1.0,
            optimizer=optimizer,
            regularizer=lambda x: 1e-3 * total_variation(x, 1.5),
            transform=None if optimizer == "lbfgs" else partial(jitter, pixels=2),
            after_step=after,
            seed=2,
        )

    batch = run(units)
    assert torch.equal(batch.images, run(units).images)
    for i in range(3):
        alone = run(units[i : i + 1])
        torch.testing.assert_close(batch.images[i], alone.images[0], atol=1e-9, rtol=0)
        torch.testing.assert_close(batch.scores[:, i], alone.scores[:, 0])
    assert batch.images.min() >= 0 and batch.images.max() <= 1
    assert not batch.images.requires_grad and batch.scores.shape == (8, 3)
    assert all(parameter.grad is None for parameter in net.parameters())


@given(seed=st.integers(0, 1000), lr=st.floats(1e-3, 1e3), optimizer=st.sampled_from(OPTIMIZERS))
@few
def test_pixels_stay_in_range(seed: int, lr: float, optimizer: str) -> None:
    w = randn(2, 3, 4, 4, seed=seed)
    image = PixelImage(rand(2, 3, 4, 4, seed=seed))

    def objective(x: Tensor) -> Tensor:
        return (w * x.sin()).sum((1, 2, 3))

    result = optimize_image(objective, image, steps=5, lr=lr, optimizer=optimizer)
    assert result.images.min() >= 0 and result.images.max() <= 1


def test_scores_rise_under_no_grad_and_equal_starts_stay_equal() -> None:
    net = small_net()
    start = noise_images((2, 3, 11, 11), seed=0).double()
    with torch.no_grad():
        result = optimize_image(lambda x: net(x)[:, 0], PixelImage(start), steps=15, lr=0.01)
    assert (result.scores[-1] > result.scores[0]).all()
    assert torch.equal(result.images[0], result.images[1])


def test_transform_draws_depend_on_the_seed() -> None:
    w = randn(1, 3, 6, 6)

    def run(seed: int | None) -> Tensor:
        shift = partial(jitter, pixels=3)
        start = PixelImage(torch.full((1, 3, 6, 6), 0.5, dtype=torch.float64))
        return optimize_image(
            lambda x: (w * x).sum((1, 2, 3)), start, steps=3, lr=0.01, transform=shift, seed=seed
        ).images

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert run(None).shape == (1, 3, 6, 6)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zero_gradient_at_the_start_names_the_images(optimizer: str) -> None:
    starts = torch.stack([torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), 0.9)])
    with pytest.raises(DivergenceError, match=r"\[0\] cannot start.*seed"):
        optimize_image(
            lambda x: (x - 0.6).relu().sum((1, 2, 3)),
            PixelImage(starts),
            steps=3,
            lr=0.1,
            optimizer=optimizer,
            regularizer=lambda x: l2_penalty(x, 0.0),  # its gradient must not hide the zero
        )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_flat_objective_is_an_error_after_ten_steps(optimizer: str) -> None:
    calls = []

    def saturated(x: Tensor) -> Tensor:
        calls.append(1)
        return torch.stack([1e-12 * x[0].sum() + 5, x[1].sum()])  # the first is 5 for every x

    settings: dict[str, Any] = {"lr": 0.01, "optimizer": optimizer}
    half = torch.full((2, 3, 4, 4), 0.5)
    with pytest.raises(DivergenceError, match=r"images \[0\] is flat: 10 steps"):
        optimize_image(saturated, PixelImage(half), steps=50, **settings)
    assert len(calls) <= 21
    assert (optimize_image(saturated, PixelImage(half), steps=9, **settings).scores[:, 0] == 5).all()
    # A loss of 0 is at its minimum, not flat.
    loss = lambda x: (x - 0.5).square().sum((1, 2, 3))
    assert not optimize_image(loss, PixelImage(half), steps=12, maximize=False, **settings).scores.any()


def test_gradient_that_a_random_transform_sets_to_zero_is_not_an_error() -> None:
    start = torch.full((1, 3, 4, 4), 0.5)
    start[..., 0, 0] = 0.9
    corner = lambda x: (x[..., 0, 0] - 0.6).relu().sum(1)
    settings: dict[str, Any] = {"steps": 12, "lr": 1e-3, "optimizer": "sgd", "seed": 1}
    result = optimize_image(corner, PixelImage(start), transform=partial(jitter, pixels=1), **settings)
    assert result.scores[0] == 0 and result.scores.max() > 0.8
    away = lambda images, generator: images.roll(1, -1)
    with pytest.raises(DivergenceError, match="cannot start"):
        optimize_image(corner, PixelImage(start), transform=away, **settings)


def test_concatenate_stages_joins_scores_and_frames() -> None:
    def stage(size: int, steps: int) -> Optimization:
        start = PixelImage(noise_images((2, 3, size, size), seed=1))
        return optimize_image(lambda x: x.sum((1, 2, 3)), start, steps=steps, lr=0.01, frames=2)

    small, large = stage(4, 3), stage(8, 5)
    both = concatenate_stages([small, large])
    assert torch.equal(both.images, large.images)
    assert torch.equal(both.scores, torch.cat([small.scores, large.scores]))
    assert torch.equal(both.frames[2:], large.frames)
    assert torch.equal(both.frames[:2, ..., ::2, ::2], small.frames)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_divergence_error_names_step_images_and_lr(optimizer: str) -> None:
    calls = []

    def objective(x: Tensor) -> Tensor:
        calls.append(1)
        bad = torch.tensor([1.0, torch.nan if len(calls) > 2 else 1.0])
        return x.sum((1, 2, 3)) * bad

    image = PixelImage(torch.full((2, 3, 4, 4), 0.5))
    with pytest.raises(DivergenceError, match=r"step 2.*\[1\].*lower lr \(now 0\.001"):
        optimize_image(objective, image, steps=9, lr=0.001, optimizer=optimizer)


def test_infinite_gradient_is_a_divergence_error() -> None:
    black = PixelImage(torch.zeros(1, 3, 2, 2))
    with pytest.raises(DivergenceError, match="step 0"):
        optimize_image(lambda x: x.sqrt().sum((1, 2, 3)), black, steps=1, lr=1)


def test_invalid_arguments_are_refused() -> None:
    image = PixelImage(rand(2, 3, 4, 4))

    def total(x: Tensor) -> Tensor:
        return x.sum((1, 2, 3))

    unrelated = torch.ones(2, requires_grad=True)
    for objective in (lambda x: x.sum(), lambda x: torch.ones(2), lambda x: unrelated * 1):
        with pytest.raises(InputError):
            optimize_image(objective, image, steps=1, lr=0.1)
    for steps, lr in [(0, 0.1), (1, 0), (1, float("nan"))]:
        with pytest.raises(InputError):
            optimize_image(total, image, steps=steps, lr=lr)
    with pytest.raises(InputError, match="transform"):
        optimize_image(total, image, steps=1, lr=1, optimizer="lbfgs", transform=partial(jitter, pixels=1))
    with pytest.raises(UnknownName):
        optimize_image(total, image, steps=1, lr=1, optimizer="rmsprop")  # type: ignore[arg-type]


def test_custom_parametrization_and_interrupt() -> None:
    class Tint(Parametrization):
        """One color per image: a parametrization without project and assign."""

        def __init__(self) -> None:
            self.parameter = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)

        def image(self) -> Tensor:
            return self.parameter.sigmoid()[:, :, None, None].expand(-1, -1, 4, 4)

    target = torch.tensor([[0.2, 0.5, 0.8], [0.6, 0.1, 0.3]], dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return (x - target[:, :, None, None]).square().mean((1, 2, 3))

    result = optimize_image(loss, Tint(), steps=80, lr=1, optimizer="lbfgs", maximize=False)
    torch.testing.assert_close(result.images[:, :, 0, 0], target, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="Tint"):
        optimize_image(loss, Tint(), steps=1, lr=1, after_step=lambda images, gradient, step: images)

    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimize_image(interrupted, Tint(), steps=1, lr=1)


def test_first_steps_pass_closed_relus_and_use_the_plain_gradient_where_none_passes() -> None:
    """Images of one pixel: relu(x - 1) - relu(x) rises by its first ReLU, -relu(x) by its plain gradient."""
    pixels = torch.full((2, 1, 1, 1), 0.5, dtype=torch.float64)

    def objective(x: Tensor) -> Tensor:
        first, second = x.flatten()
        return torch.stack([(first - 1).relu() - first.relu(), -second.relu()])

    for deconvnet_steps, maximize, expected in (
        (2, True, (0.6, 0.2)),
        (0, True, (0.2, 0.2)),
        (9, True, (0.8, 0.2)),
        (9, False, (0.8, 0.8)),
    ):
        result = optimize_image(
            objective,
            PixelImage(pixels),
            steps=3,
            lr=0.1,
            optimizer="sgd",
            maximize=maximize,
            deconvnet_steps=deconvnet_steps,
        )
        torch.testing.assert_close(result.images.flatten(), torch.tensor(expected).double())
        torch.testing.assert_close(result.scores[0], objective(pixels))
