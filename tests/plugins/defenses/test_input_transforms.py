"""Input transforms give what their oracles give, and attacks go through them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from phosphene import InputError, Model, UnknownName, load_model, load_result, methods
from phosphene.builtin.scenes import draw_scenes
from phosphene.optimize import straight_through

few = settings(max_examples=25, deadline=None)
TRANSFORMS: dict[str, dict[str, Any]] = {
    "jpeg": {"quality": 50},
    "median": {"size": 3},
    "bit_depth": {"bits": 2},
    "total_variation": {"weight": 0.1, "steps": 5},
}


def pictures(seed: int = 0, count: int = 2, height: int = 9, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, height, width, generator=generator, dtype=torch.float64)


def change(name: str, **params: Any) -> Any:
    return methods[name].defense(**methods[name].validate(params))  # type: ignore[misc]


def network(size: int = 8) -> Model:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * size * size, 4)
        )
    return load_model(module, input_size=(3, size, size), dtype=torch.float64)


# --- oracles ---


@few
@given(seed=st.integers(0, 10**6), quality=st.integers(1, 100))
def test_jpeg_is_pillows_round_trip_within_a_level(seed: int, quality: int) -> None:
    picture = pictures(seed, 1)
    levels = (picture[0] * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=quality)
    want = np.array(Image.open(file), dtype=np.float64).transpose(2, 0, 1) / 255
    assert np.abs(change("jpeg", quality=quality)(picture)[0].numpy() - want).max() <= 1 / 255


@few
@given(
    seed=st.integers(0, 10**6), size=st.integers(1, 9), height=st.integers(1, 14), width=st.integers(1, 14)
)
def test_median_is_scipys(seed: int, size: int, height: int, width: int) -> None:
    images = pictures(seed, 2, height, width)
    want = [[scipy.ndimage.median_filter(c, size=size, mode="reflect") for c in i] for i in images.numpy()]
    assert np.array_equal(change("median", size=size)(images).numpy(), np.array(want))


@few
@given(seed=st.integers(0, 10**6), bits=st.integers(1, 16))
def test_bit_depth_is_the_nearest_of_its_levels(seed: int, bits: int) -> None:
    images = pictures(seed)
    want = np.round(images.numpy() * (2**bits - 1)) / (2**bits - 1)
    np.testing.assert_allclose(change("bit_depth", bits=bits)(images).numpy(), want, atol=1e-15)


@few
@given(seed=st.integers(0, 10**6), weight=st.floats(0.01, 0.5))
def test_no_small_change_improves_on_total_variations_minimum(seed: int, weight: float) -> None:
    images = pictures(seed, 1, 6, 7)
    found = change("total_variation", weight=weight, steps=1000)(images)

    def energy(z: Tensor) -> Tensor:
        down = nn.functional.pad(z[..., 1:, :] - z[..., :-1, :], (0, 0, 0, 1))
        right = nn.functional.pad(z[..., 1:] - z[..., :-1], (0, 1))
        return ((z - images).square() / 2).sum() + weight * (down.square() + right.square()).sqrt().sum()

    for shift in 0.05 * (pictures(seed + 1, 30, 6, 7) - 0.5):
        assert energy(found) <= energy(found + shift) + 1e-3


# --- gradients ---


@pytest.mark.parametrize("name", ["median", "total_variation"])
def test_gradient_is_the_transforms_own_where_it_has_one(name: str) -> None:
    images = (0.2 + 0.6 * pictures(3, 1, 4, 5)).requires_grad_()
    assert torch.autograd.gradcheck(change(name, **TRANSFORMS[name]), images)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_flat_pictures_have_finite_gradients(name: str, value: float) -> None:
    images = torch.full((1, 3, 9, 9), value, requires_grad=True)
    out = change(name, **TRANSFORMS[name])(images)
    assert torch.autograd.grad(out.sum(), images)[0].isfinite().all()


@few
@given(seed=st.integers(0, 10**6))
def test_straight_through_the_true_gradient_pgd_is_plain_pgd(seed: int) -> None:
    def smooth(x: Tensor) -> Tensor:
        return x.square() * (1.5 - x / 2)

    bare, images = network(), pictures(seed, 2, 8, 8)
    plain = bare.defended(smooth, "smooth")
    bpda = bare.defended(lambda x: straight_through(x, smooth, smooth), "bpda")
    labels = plain(images).argmax(1)
    attack = {"eps": 0.1, "steps": 5, "seed": seed}
    results = [methods["pgd"](model, images, labels, **attack).adversarial for model in (plain, bpda)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_attack_that_knows_of_the_jpeg_succeeds_more_than_one_that_does_not() -> None:
    plain = load_model("builtin:shapes-resnet")
    images = draw_scenes(12, seed=11).images
    labels = plain(images).argmax(1)
    model = methods["jpeg"].defend(plain, quality=75)
    attack = {"eps": 5 / 255, "step_size": 1 / 255, "steps": 12, "seed": 0}
    unaware = methods["pgd"](plain, images, labels, **attack)
    adaptive = methods["pgd"](model, images, labels, **attack)
    got_through = model(unaware.adversarial).argmax(1) != labels
    assert unaware.success.float().mean() > got_through.float().mean()
    assert adaptive.success.float().mean() > got_through.float().mean()


# --- a defended model ---


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_every_pass_of_a_defended_model_goes_through_the_defence(name: str) -> None:
    plain = load_model("builtin:shapes-resnet")
    model, images = methods[name].defend(plain, **TRANSFORMS[name]), draw_scenes(2, seed=1).images
    seen = change(name, **TRANSFORMS[name])(images)
    assert model.module is plain.module
    torch.testing.assert_close(model(images), plain(seen))
    torch.testing.assert_close(model.embed(images), plain.embed(seen))
    torch.testing.assert_close(model.features(images, "layer1"), plain.features(seen, "layer1"))
    assert model.digest != plain.digest
    assert not plain.defenses


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_defended_model_is_loaded_again_by_its_source(name: str) -> None:
    model = methods[name].defend(load_model("builtin:shapes-vgg"), **TRANSFORMS[name])
    assert model.source is not None
    source = dict(model.source)
    again = load_model(source.pop("uri"), **source)
    images = draw_scenes(2, seed=1).images
    assert again.digest == model.digest and again.name == model.name
    assert torch.equal(again(images), model(images))
    assert again.source == model.source


def test_outer_defence_goes_first() -> None:
    model = load_model("defended:median(size=3)|defended:bit_depth(bits=1)|builtin:shapes-vgg")
    images = draw_scenes(2, seed=1).images
    inner = change("bit_depth", bits=1)(change("median", size=3)(images))
    torch.testing.assert_close(model(images), load_model("builtin:shapes-vgg")(inner))
    assert model.name == "median(size=3) | bit_depth(bits=1) | builtin:shapes-vgg"
    assert model.classes == load_model("builtin:shapes-vgg").classes


def test_results_on_a_defended_model_are_replayed_from_their_folder(tmp_path: Any) -> None:
    model = load_model("defended:bit_depth(bits=3)|builtin:shapes-vgg")
    images = draw_scenes(2, seed=1).images
    found = methods["fgsm"](model, images, model(images).argmax(1))
    was = load_result(found.save(tmp_path / "found")).provenance
    assert was is not None and was.model is not None
    assert was.model["source"]["uri"] == "defended:bit_depth(bits=3)|builtin:shapes-vgg"


def test_copy_of_a_defended_model_is_defended() -> None:
    model = load_model("defended:bit_depth(bits=1)|builtin:shapes-vgg")
    images = draw_scenes(1, seed=1).images
    assert torch.equal(model.copy()(images), model(images))


def test_model_given_as_an_object_has_no_source() -> None:
    assert methods["median"].defend(network()).source is None


@pytest.mark.parametrize(
    ("uri", "error", "told"),
    [
        ("defended:jpeg(quality=75)", InputError, "defended:jpeg\\(quality=75\\)\\|scheme:name"),
        ("defended:jpg()|builtin:shapes-vgg", UnknownName, "did you mean 'jpeg'"),
        ("defended:pgd()|builtin:shapes-vgg", InputError, "these are: .*jpeg"),
        ("defended:jpeg(size=3)|builtin:shapes-vgg", UnknownName, "jpeg has quality"),
        ("defended:jpeg(50)|builtin:shapes-vgg", InputError, "must be named, one of quality"),
        ("defended:jpeg(quality=500)|builtin:shapes-vgg", InputError, "less than or equal to 100"),
        ("defended:jpeg()|builtin:shapes-vg", UnknownName, "shapes-vgg"),
    ],
)
def test_wrong_names_are_told_in_a_sentence(uri: str, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        load_model(uri)


def test_method_that_is_no_transform_cannot_defend() -> None:
    with pytest.raises(InputError, match="pgd is no defence"):
        methods["pgd"].defend(network())


def test_random_defence_draws_alike_for_one_seed_whatever_ran_before() -> None:
    def noisy(images: Tensor) -> Tensor:
        return images + 0.05 * torch.randn(1, *images.shape[1:])

    model = load_model("builtin:shapes-resnet").defended(noisy, "noise")
    images = draw_scenes(2, seed=1).images
    labels = load_model("builtin:shapes-resnet")(images).argmax(1)
    first, again = (methods["pgd"](model, images, labels, steps=4, seed=3) for _ in range(2))
    assert torch.equal(first.adversarial, again.adversarial)
