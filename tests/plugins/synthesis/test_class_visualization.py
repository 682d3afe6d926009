"""Class visualization: closed form, every regularizer, every kind of target, and batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phosphene import (
    Class,
    Direction,
    DivergenceError,
    InputError,
    Model,
    UnknownName,
    load_model,
    max_batch,
    methods,
    replay,
    run,
)
from phosphene.images import gaussian_blur, noise_images
from phosphene.optimize import clip_smallest, l2_penalty, total_variation

visualize = methods["synthesis.class_visualization"]

PLAIN: dict[str, Any] = {
    "l2": 0.0, "blur_every": 0, "jitter": 0, "rotate": 0, "rescale": 1, "seed": 3, "steps": 20,
    "parametrization": "pixels", "start_noise": 0.05, "start_contrast": 0, "deconvnet_steps": 0,
}  # fmt: skip


def percent_at_mean(model: Model, images: Tensor) -> Tensor:
    """Percentage of pixels of the mean color, (N,)."""
    is_mean = (images - model.mean.to(images)[:, None, None]).abs().amax(1) < 1e-9
    return 100 * is_mean.flatten(1).double().mean(1)


def test_oracle() -> None:
    visualize.spec.oracle()


@pytest.mark.parametrize("parametrization", ["pixels", "fourier"])
def test_score_rises_and_pixels_stay_in_range(model: Model, parametrization: str) -> None:
    result = visualize(model, Class((0, 1, 2, 3)), steps=25, seed=0, parametrization=parametrization)
    assert result.images.shape == (4, 3, 12, 12)
    assert result.scores.shape == (25, 4)
    assert (result.scores[-1] > result.scores[0]).all()
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    assert result.targets == ("class 0", "class 1", "class 2", "class 3")


def test_batch_equals_its_classes_alone(model: Model) -> None:
    options = {"seed": 5, "steps": 8, "start_noise": 0.02, "clip_contribution": 10}
    together = visualize(model, Class((2, 0, 1)), **options)
    for n, index in enumerate((2, 0, 1)):
        alone = visualize(model, Class(index), **options)
        torch.testing.assert_close(together.images[n : n + 1], alone.images, atol=1e-9, rtol=0)
        torch.testing.assert_close(together.scores[:, n : n + 1], alone.scores, atol=1e-9, rtol=0)


def test_batch_size_does_not_change_the_images(model: Model) -> None:
    free = visualize(model, Class((0, 1, 2)), seed=1, steps=5)
    with max_batch(2):
        limited = visualize(model, Class((0, 1, 2)), seed=1, steps=5)
    torch.testing.assert_close(free.images, limited.images, atol=1e-9, rtol=0)
    assert limited.scores.shape == free.scores.shape


def test_images_depend_on_the_seed_alone(model: Model) -> None:
    first, second, other = (visualize(model, Class(1), seed=s, steps=5, start_noise=0.1) for s in (1, 1, 2))
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.images, other.images)


def test_start_is_the_mean_color_plus_noise(model: Model) -> None:
    for noise_sd in (0.0, 0.05):
        result = visualize(model, Class((0, 1)), **PLAIN | {"steps": 1, "start_noise": noise_sd})
        start = noise_images((1, 3, 12, 12), seed=3, mean=model.mean, sd=noise_sd).double()
        torch.testing.assert_close(result.scores[0], model(start)[0, :2].detach())


def test_jitter_rolls_the_input(model: Model) -> None:
    result = visualize(model, "2[3,1,1]", **PLAIN | {"steps": 1, "jitter": 2})
    start = noise_images((1, 3, 12, 12), seed=3, mean=model.mean, sd=0.05).double()
    shifts = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
    rolled = torch.cat([start.roll(shift, (2, 3)) for shift in shifts])
    activations = model.features(rolled, "2")[:, 3, 1, 1].tolist()
    score = result.scores[0].item()
    assert score in [pytest.approx(s, abs=1e-7) for s in activations]
    assert score != pytest.approx(activations[12], abs=1e-7)


def test_contributions_use_the_gradient_of_the_score(model: Model) -> None:
    start = noise_images((1, 3, 12, 12), seed=3, mean=model.mean, sd=0.05).double().requires_grad_()
    (gradient,) = torch.autograd.grad(model(start)[0, 1], start)
    plain, clipped = (
        visualize(model, 1, **PLAIN | {"steps": 1, "clip_contribution": c}).images for c in (0, 30)
    )
    expected = clip_smallest(plain, 30, model.mean, gradient=gradient)
    torch.testing.assert_close(clipped, expected, rtol=0, atol=1e-6)


def test_pixels_with_the_smallest_gradients_do_not_change(model: Model) -> None:
    options = PLAIN | {"steps": 1, "optimizer": "sgd", "lr": 1.0, "start_noise": 0.05}
    start = noise_images((1, 3, 12, 12), seed=options["seed"], mean=model.mean, sd=0.05).double()
    start.requires_grad_()
    (gradient,) = torch.autograd.grad(model(start)[0, 1], start)
    plain, clipped = (visualize(model, 1, **options | {"clip_gradient": c}).images for c in (0, 40))
    norms = gradient.norm(dim=1, keepdim=True)
    large = norms >= norms.quantile(0.4)
    torch.testing.assert_close(clipped, torch.where(large, plain, start.detach()), rtol=0, atol=1e-12)
    assert 0.55 < large.double().mean() < 0.65


def test_l2_reduces_the_distance_to_the_mean_color(model: Model) -> None:
    distances = [
        l2_penalty(visualize(model, Class(1), **PLAIN | {"l2": w}).images, model.mean) for w in (0.0, 0.1)
    ]
    assert distances[1] < 0.9 * distances[0]


def test_total_variation_and_blur_reduce_variation(model: Model) -> None:
    rough = total_variation(visualize(model, Class(1), **PLAIN).images)
    for smoother in ({"total_variation": 0.1}, {"blur_every": 2, "blur_sigma": 1.0}):
        assert total_variation(visualize(model, Class(1), **PLAIN | smoother).images) < 0.9 * rough


def test_blur_follows_every_nth_step(model: Model) -> None:
    plain, blurred = (visualize(model, 1, **PLAIN | {"steps": 3, "blur_every": n}).images for n in (0, 3))
    torch.testing.assert_close(blurred, gaussian_blur(plain, 0.8), rtol=0, atol=1e-12)


@pytest.mark.parametrize("clipping", ["clip_norm", "clip_contribution"])
def test_clipping_sets_its_percentage_of_pixels_to_the_mean(model: Model, clipping: str) -> None:
    assert percent_at_mean(model, visualize(model, Class((0, 1)), **PLAIN).images).max() < 5
    clipped = visualize(model, Class((0, 1)), **PLAIN | {clipping: 30.0}).images
    assert percent_at_mean(model, clipped).min() >= 29


def test_all_regularisers_work_together(model: Model) -> None:
    everything = PLAIN | {
        "l2": 0.01, "total_variation": 0.02, "blur_every": 3, "blur_sigma": 0.5, "clip_norm": 10.0,
        "clip_contribution": 20.0, "clip_gradient": 10.0, "jitter": 2,
    }  # fmt: skip
    plain, regular = (visualize(model, Class(1), **options) for options in (PLAIN, everything))
    assert l2_penalty(regular.images, model.mean) < l2_penalty(plain.images, model.mean)
    assert total_variation(regular.images) < total_variation(plain.images)
    assert percent_at_mean(model, regular.images) >= 19
    assert regular.scores[-1] > regular.scores[0]


@pytest.mark.parametrize(
    "target",
    [
        "2[3]",
        "2[3,1,1]",
        "layer:2",
        Direction("2", torch.linspace(-1, 1, 8)),
        lambda logits: logits[:, 1] - logits[:, 2],
    ],
    ids=["channel", "neuron", "layer", "direction", "callable"],
)
def test_every_kind_of_target_can_be_maximised(model: Model, target: Any) -> None:
    result = visualize(model, target, **PLAIN)
    assert result.images.shape == (1, 3, 12, 12)
    assert result.scores[-1] > result.scores[0]


def test_any_image_size(model: Model) -> None:
    for parametrization in ("pixels", "fourier"):
        result = visualize(model, Class(0), size=17, steps=2, seed=0, parametrization=parametrization)
        assert result.images.shape == (1, 3, 17, 17)


def test_unit_without_gradient_is_a_divergence_error(model: Model) -> None:
    with torch.no_grad():
        model.module[0].bias.fill_(-100.0)
    for deconvnet_steps, reason in ((0, "cannot start"), (16, "is flat")):
        with pytest.raises(DivergenceError, match=reason):
            visualize(model, "1[0]", seed=0, deconvnet_steps=deconvnet_steps)


def test_invalid_inputs_are_refused(model: Model) -> None:
    with pytest.raises(InputError, match="class 9"):
        visualize(model, 9)
    with pytest.raises(UnknownName):
        visualize(model, "nowhere[3]")
    with pytest.raises(InputError, match="clip_norm"):
        visualize(model, 0, clip_norm=101.0)


def test_bundled_model_predicts_the_visualised_classes(tmp_path: Path) -> None:
    bundled = load_model("builtin:shapes-vgg")
    result = visualize(bundled, Class((0, 4, 6, 9)), steps=24, seed=0)
    assert bundled(result.images).argmax(1).tolist() == [0, 4, 6, 9]
    result.save(tmp_path / "result")
    assert replay(tmp_path / "result").same


def test_ascent_from_an_even_gray_that_closes_all_relus_is_avoided() -> None:
    """By plain gradients from an even gray this logit rises to the head's bias, and stays there."""
    options: dict[str, Any] = {"model": "builtin:parts-resnet", "target": "bear", "seed": 2}
    options |= {"steps": 30, "progress": False}
    assert run("class_visualization", **options, deconvnet_steps=0).scores[-1] < 0
    assert run("class_visualization", **options, deconvnet_steps=0, start_contrast=0.2).scores[-1] > 2
    assert run("class_visualization", **options).scores[-1] > 2


def test_contrast_is_smooth_gray_noise_about_the_mean_color(model: Model) -> None:
    even, contrast = (
        visualize(model, 1, **PLAIN | {"steps": 1, "lr": 1e-9, "start_noise": 0, "start_contrast": c}).images
        for c in (0.0, 0.04)
    )
    noise = contrast - even
    torch.testing.assert_close(noise[:, 0], noise[:, 1])
    assert float(noise.std()) == pytest.approx(0.04, rel=0.1)
    wide = visualize(model, 1, **PLAIN | {"steps": 1, "lr": 1e-9, "start_noise": 0, "start_contrast": 0.08})
    torch.testing.assert_close(wide.images - even, 2 * noise, atol=1e-6, rtol=0)
