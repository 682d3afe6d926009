"""Random changes of pictures: in range, the identity at no strength, alike for a batch, gradients pass."""

from __future__ import annotations

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
    rotate,
    straight_through,
)

few = settings(max_examples=40, deadline=None)
names = st.sampled_from(get_args(TransformName))
#: The parameters at which a change changes nothing.
NOTHING: dict[str, dict[str, Any]] = {
    "rotate": {"degrees": 0.0},
    "rescale": {"factor": 1.0},
    "brightness": {"change": 0.0},
    "blur": {"sigma": 0.0},
    "printed": {"noise": 0.0, "contrast": 0.0},
}


def pictures(count: int = 3, height: int = 9, width: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, height, width, generator=generator, dtype=torch.float64)


def drawn(seed: int = 5) -> Generator:
    return torch.Generator().manual_seed(seed)


@few
@given(name=names, seed=st.integers(0, 10**6), height=st.integers(4, 20), width=st.integers(4, 20))
def test_pictures_stay_pictures(name: TransformName, seed: int, height: int, width: int) -> None:
    images = pictures(2, height, width, seed).round(decimals=1)
    changed = TRANSFORMS[name](images, drawn(seed))
    assert changed.shape == images.shape and changed.dtype == images.dtype
    assert changed.min() >= -1e-12 and changed.max() <= 1 + 1e-12


@few
@given(name=names, seed=st.integers(0, 10**6))
def test_batch_is_changed_as_its_images_are_alone(name: TransformName, seed: int) -> None:
    images = pictures(3, seed=seed)
    together = TRANSFORMS[name](images, drawn(seed))
    for n in range(3):
        torch.testing.assert_close(together[n : n + 1], TRANSFORMS[name](images[n : n + 1], drawn(seed)))


@pytest.mark.parametrize("name", get_args(TransformName))
def test_seed_decides_and_inputs_stay(name: TransformName) -> None:
    images = pictures()
    kept = images.clone()
    first, again, other = (TRANSFORMS[name](images, drawn(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(images, kept)


@pytest.mark.parametrize("name", NOTHING)
def test_no_strength_changes_nothing(name: str) -> None:
    images = pictures()
    torch.testing.assert_close(TRANSFORMS[name](images, drawn(), **NOTHING[name]), images)


@pytest.mark.parametrize("name", get_args(TransformName))
def test_gradient_passes_to_the_pixels(name: TransformName) -> None:
    images = pictures().requires_grad_()
    (gradient,) = torch.autograd.grad(TRANSFORMS[name](images, drawn()).sum(), images)
    assert gradient.isfinite().all()
    assert (gradient != 0).double().mean() > 0.5


def test_half_a_turn_flips_both_axes() -> None:
    images = pictures()
    torch.testing.assert_close(affine(images, degrees=180), images.flip(2, 3))


def test_quarter_turn_of_a_square_goes_anticlockwise() -> None:
    images = pictures(height=8, width=8)
    torch.testing.assert_close(affine(images, degrees=90), images.rot90(1, (2, 3)))


@few
@given(degrees=st.floats(-180, 180))
def test_turn_keeps_shapes_on_pictures_that_are_not_square(degrees: float) -> None:
    """A round spot about the centre stays where it is: lengths along both sides are the same."""
    down, across = torch.arange(31.0) - 15, torch.arange(61.0) - 30
    spot = torch.exp(-(down[:, None].square() + across.square()) / 32).double()[None, None]
    # Bilinear interpolation of a Gaussian of 4 pixels is wrong by up to 2 / (8 * 4^2).
    inside = down[:, None].square() + across.square() < 14**2  # beyond it mirrors itself
    turned = affine(spot, degrees=degrees)[0, 0, inside]
    torch.testing.assert_close(turned, spot[0, 0, inside], rtol=0, atol=0.016)


def test_doubling_enlarges_about_the_centre() -> None:
    ramp = torch.linspace(-1, 1, 21, dtype=torch.float64).expand(1, 1, 21, 21)
    torch.testing.assert_close(affine(ramp, scale=2.0), ramp / 2)


def test_brightness_multiplies_and_shifts() -> None:
    grey = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    levels = [float(TRANSFORMS["brightness"](grey, drawn(seed)).mean()) for seed in range(50)]
    assert min(levels) >= 0.5 * 0.8 - 0.1 and max(levels) <= 0.5 * 1.2 + 0.1
    assert max(levels) - min(levels) > 0.1


def test_straight_through_gives_the_change_and_the_gradient_of_none() -> None:
    images = pictures().requires_grad_()
    changed = straight_through(images, torch.round)
    assert torch.equal(changed, images.round())
    (gradient,) = torch.autograd.grad((changed * 3).sum(), images)
    assert torch.equal(gradient, torch.full_like(images, 3))


def test_jpeg_of_high_quality_is_near_and_of_low_quality_further() -> None:
    smooth = torch.linspace(0.2, 0.8, 32).expand(1, 3, 32, 32)
    error = [float((jpeg_round_trip(smooth, quality) - smooth).abs().mean()) for quality in (95, 5)]
    assert error[0] < 0.005 < error[1]


def test_jpeg_of_two_channels_is_refused() -> None:
    with pytest.raises(InputError, match="1 or 3 channels"):
        jpeg_round_trip(torch.rand(1, 2, 8, 8), 90)


def test_changes_are_chained_in_order() -> None:
    images, one, other = pictures(), drawn(), drawn()
    by_hand = TRANSFORMS["blur"](TRANSFORMS["rotate"](images, one), one)
    assert torch.equal(compose(("rotate", "blur"))(images, other), by_hand)
    gentle = partial(rotate, degrees=3)
    assert torch.equal(compose((gentle, "blur", jpeg))(images, drawn()),
                       compose((gentle, "blur", "jpeg"))(images, drawn()))  # fmt: skip
    assert compose(())(images, drawn()) is images


def test_unknown_change_is_refused_by_the_nearest_name() -> None:
    with pytest.raises(UnknownName, match="rotate"):
        compose(("rotat",))  # type: ignore[arg-type]
