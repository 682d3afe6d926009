"""Augmentations: range, identity at zero strength, batches, seeds, gradients, composition."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from phosphene import InputError, UnknownName
from phosphene.optimize import (
    TRANSFORMS,
    TransformName,
    affine,
    compose,
    jpeg,
    jpeg_round_trip,
    perspective,
    rotate,
    straight_through,
)

few = settings(max_examples=40, deadline=None)
names = st.sampled_from(get_args(TransformName))
#: Parameters at which a transform is the identity.
IDENTITY: dict[str, dict[str, Any]] = {
    "rotate": {"degrees": 0.0},
    "rescale": {"factor": 1.0},
    "brightness": {"change": 0.0},
    "blur": {"sigma": 0.0},
    "printed": {"noise": 0.0, "contrast": 0.0},
    "perspective": {"degrees": 0.0},
}


def random_images(count: int = 3, height: int = 9, width: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, height, width, generator=generator, dtype=torch.float64)


def seeded(seed: int = 5) -> Generator:
    return torch.Generator().manual_seed(seed)


@few
@given(name=names, seed=st.integers(0, 10**6), height=st.integers(4, 20), width=st.integers(4, 20))
def test_shape_type_and_range_are_preserved(name: TransformName, seed: int, height: int, width: int) -> None:
    images = random_images(2, height, width, seed).round(decimals=1)
    changed = TRANSFORMS[name](images, seeded(seed))
    assert changed.shape == images.shape and changed.dtype == images.dtype
    assert changed.min() >= -1e-12 and changed.max() <= 1 + 1e-12


@few
@given(name=names, seed=st.integers(0, 10**6))
def test_batch_equals_its_images_alone(name: TransformName, seed: int) -> None:
    images = random_images(3, seed=seed)
    together = TRANSFORMS[name](images, seeded(seed))
    for n in range(3):
        torch.testing.assert_close(together[n : n + 1], TRANSFORMS[name](images[n : n + 1], seeded(seed)))


@pytest.mark.parametrize("name", get_args(TransformName))
def test_seed_decides_and_inputs_are_not_modified(name: TransformName) -> None:
    images = random_images()
    original = images.clone()
    first, again, other = (TRANSFORMS[name](images, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(images, original)


@pytest.mark.parametrize("name", IDENTITY)
def test_zero_strength_is_the_identity(name: str) -> None:
    images = random_images()
    torch.testing.assert_close(TRANSFORMS[name](images, seeded(), **IDENTITY[name]), images)


@pytest.mark.parametrize("name", get_args(TransformName))
def test_gradient_reaches_the_pixels(name: TransformName) -> None:
    images = random_images().requires_grad_()
    (gradient,) = torch.autograd.grad(TRANSFORMS[name](images, seeded()).sum(), images)
    assert gradient.isfinite().all()
    assert (gradient != 0).double().mean() > 0.5


def test_rotation_by_180_degrees_flips_both_axes() -> None:
    images = random_images()
    torch.testing.assert_close(affine(images, degrees=180), images.flip(2, 3))


def test_rotation_by_90_degrees_is_anticlockwise() -> None:
    images = random_images(height=8, width=8)
    torch.testing.assert_close(affine(images, degrees=90), images.rot90(1, (2, 3)))


@few
@given(degrees=st.floats(-180, 180))
def test_rotation_of_a_non_square_image_keeps_the_aspect_ratio(degrees: float) -> None:
    """A radially symmetric spot in the center is invariant."""
    down, across = torch.arange(31.0) - 15, torch.arange(61.0) - 30
    spot = torch.exp(-(down[:, None].square() + across.square()) / 32).double()[None, None]
    # Error of the bilinear interpolation of a Gaussian of 4 pixels: at most 2 / (8 * 4^2).
    inside = down[:, None].square() + across.square() < 14**2  # beyond it the reflection padding begins
    rotated = affine(spot, degrees=degrees)[0, 0, inside]
    torch.testing.assert_close(rotated, spot[0, 0, inside], rtol=0, atol=0.016)


def test_scale_enlarges_about_the_center() -> None:
    ramp = torch.linspace(-1, 1, 21, dtype=torch.float64).expand(1, 1, 21, 21)
    torch.testing.assert_close(affine(ramp, scale=2.0), ramp / 2)


def test_perspective_is_the_projection_of_a_tilted_plane() -> None:
    """The image holds its own coordinates, so each pixel names the point of the plane that appears there."""
    down, across = torch.arange(-19.5, 20) / 30, torch.arange(-29.5, 30) / 30
    plane = torch.stack(torch.meshgrid(across, down, indexing="xy")).double()
    viewed = perspective(plane[None], seeded(3), degrees=30.0, distance=4.0)[0]
    x, y = viewed[:, 12:-12, 12:-12]  # the rest may be reflected
    tilt, turn = (torch.rand(2, generator=seeded(3)) * 60 - 30).deg2rad().tolist()
    assert min(abs(tilt), abs(turn)) > 0.1
    raised = y * math.sin(tilt)
    right = x * math.cos(turn) + raised * math.sin(turn)
    depth = 4 - x * math.sin(turn) + raised * math.cos(turn)
    appears = torch.stack([4 * right / depth, 4 * y * math.cos(tilt) / depth])
    torch.testing.assert_close(appears, plane[:, 12:-12, 12:-12], rtol=0, atol=1e-6)


def test_brightness_stays_within_its_bounds() -> None:
    gray = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    levels = [float(TRANSFORMS["brightness"](gray, seeded(seed)).mean()) for seed in range(50)]
    assert min(levels) >= 0.5 * 0.8 - 0.1 and max(levels) <= 0.5 * 1.2 + 0.1
    assert max(levels) - min(levels) > 0.1


def test_straight_through_has_the_gradient_of_the_identity() -> None:
    images = random_images().requires_grad_()
    rounded = straight_through(images, torch.round)
    assert torch.equal(rounded, images.round())
    (gradient,) = torch.autograd.grad((rounded * 3).sum(), images)
    assert torch.equal(gradient, torch.full_like(images, 3))


def test_jpeg_error_decreases_with_quality() -> None:
    smooth = torch.linspace(0.2, 0.8, 32).expand(1, 3, 32, 32)
    error = [float((jpeg_round_trip(smooth, quality) - smooth).abs().mean()) for quality in (95, 5)]
    assert error[0] < 0.005 < error[1]


def test_jpeg_refuses_two_channels() -> None:
    with pytest.raises(InputError, match="1 or 3 channels"):
        jpeg_round_trip(torch.rand(1, 2, 8, 8), 90)


def test_compose_applies_transforms_in_order() -> None:
    images, generator, same_generator = random_images(), seeded(), seeded()
    expected = TRANSFORMS["blur"](TRANSFORMS["rotate"](images, generator), generator)
    assert torch.equal(compose(("rotate", "blur"))(images, same_generator), expected)
    small_rotation = partial(rotate, degrees=3)
    assert torch.equal(compose((small_rotation, "blur", jpeg))(images, seeded()),
                       compose((small_rotation, "blur", "jpeg"))(images, seeded()))  # fmt: skip
    assert compose(())(images, seeded()) is images


def test_unknown_transform_suggests_the_nearest_name() -> None:
    with pytest.raises(UnknownName, match="rotate"):
        compose(("rotat",))  # type: ignore[arg-type]
