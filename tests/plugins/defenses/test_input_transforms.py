"""Input transforms equal reference implementations, and attacks differentiate through them."""

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

few_examples = settings(max_examples=25, deadline=None)
TRANSFORMS: dict[str, dict[str, Any]] = {
    "jpeg": {"quality": 50},
    "median": {"size": 3},
    "bit_depth": {"bits": 2},
    "total_variation": {"weight": 0.1, "steps": 5},
}


def random_images(seed: int = 0, count: int = 2, height: int = 9, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, height, width, generator=generator, dtype=torch.float64)


def transform(name: str, **params: Any) -> Any:
    return methods[name].defense(**methods[name].validate(params))  # type: ignore[misc]


def network(size: int = 8) -> Model:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * size * size, 4)
        )
    return load_model(module, input_size=(3, size, size), dtype=torch.float64)


# --- oracles ---


@few_examples
@given(seed=st.integers(0, 10**6), quality=st.integers(1, 100))
def test_jpeg_equals_pillow_within_one_level(seed: int, quality: int) -> None:
    image = random_images(seed, 1)
    levels = (image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=quality)
    expected = np.array(Image.open(file), dtype=np.float64).transpose(2, 0, 1) / 255
    assert np.abs(transform("jpeg", quality=quality)(image)[0].numpy() - expected).max() <= 1 / 255


@few_examples
@given(
    seed=st.integers(0, 10**6), size=st.integers(1, 9), height=st.integers(1, 14), width=st.integers(1, 14)
)
def test_median_equals_scipy(seed: int, size: int, height: int, width: int) -> None:
    images = random_images(seed, 2, height, width)
    expected = [
        [scipy.ndimage.median_filter(c, size=size, mode="reflect") for c in i] for i in images.numpy()
    ]
    assert np.array_equal(transform("median", size=size)(images).numpy(), np.array(expected))


@few_examples
@given(seed=st.integers(0, 10**6), bits=st.integers(1, 16))
def test_bit_depth_rounds_to_the_nearest_level(seed: int, bits: int) -> None:
    images = random_images(seed)
    expected = np.round(images.numpy() * (2**bits - 1)) / (2**bits - 1)
    np.testing.assert_allclose(transform("bit_depth", bits=bits)(images).numpy(), expected, atol=1e-15)


@few_examples
@given(seed=st.integers(0, 10**6), weight=st.floats(0.01, 0.5))
def test_total_variation_returns_a_minimum(seed: int, weight: float) -> None:
    images = random_images(seed, 1, 6, 7)
    result = transform("total_variation", weight=weight, steps=1000)(images)

    def energy(z: Tensor) -> Tensor:
        down = nn.functional.pad(z[..., 1:, :] - z[..., :-1, :], (0, 0, 0, 1))
        right = nn.functional.pad(z[..., 1:] - z[..., :-1], (0, 1))
        return ((z - images).square() / 2).sum() + weight * (down.square() + right.square()).sqrt().sum()

    for shift in 0.05 * (random_images(seed + 1, 30, 6, 7) - 0.5):
        assert energy(result) <= energy(result + shift) + 1e-3


# --- gradients ---


@pytest.mark.parametrize("name", ["median", "total_variation"])
def test_differentiable_transforms_have_their_true_gradient(name: str) -> None:
    images = (0.2 + 0.6 * random_images(3, 1, 4, 5)).requires_grad_()
    assert torch.autograd.gradcheck(transform(name, **TRANSFORMS[name]), images)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_flat_images_have_finite_gradients(name: str, value: float) -> None:
    images = torch.full((1, 3, 9, 9), value, requires_grad=True)
    out = transform(name, **TRANSFORMS[name])(images)
    assert torch.autograd.grad(out.sum(), images)[0].isfinite().all()


@few_examples
@given(seed=st.integers(0, 10**6))
def test_straight_through_the_true_gradient_equals_plain_pgd(seed: int) -> None:
    def smooth(x: Tensor) -> Tensor:
        return x.square() * (1.5 - x / 2)

    bare, images = network(), random_images(seed, 2, 8, 8)
    plain = bare.defended(smooth, "smooth")
    bpda = bare.defended(lambda x: straight_through(x, smooth, smooth), "bpda")
    labels = plain(images).argmax(1)
    attack = {"eps": 0.1, "steps": 5, "seed": seed}
    results = [methods["pgd"](model, images, labels, **attack).adversarial for model in (plain, bpda)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_adaptive_attack_on_jpeg_succeeds_more_often_than_an_unaware_one() -> None:
    plain = load_model("builtin:shapes-resnet")
    images = draw_scenes(12, seed=11).images
    labels = plain(images).argmax(1)
    model = methods["jpeg"].defend(plain, quality=75)
    attack = {"eps": 5 / 255, "step_size": 1 / 255, "steps": 12, "seed": 0}
    unaware = methods["pgd"](plain, images, labels, **attack)
    adaptive = methods["pgd"](model, images, labels, **attack)
    transferred = model(unaware.adversarial).argmax(1) != labels
    assert unaware.success.float().mean() > transferred.float().mean()
    assert adaptive.success.float().mean() > transferred.float().mean()


# --- a defended model ---


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_every_pass_of_a_defended_model_applies_the_defense(name: str) -> None:
    plain = load_model("builtin:shapes-resnet")
    model, images = methods[name].defend(plain, **TRANSFORMS[name]), draw_scenes(2, seed=1).images
    transformed = transform(name, **TRANSFORMS[name])(images)
    assert model.module is plain.module
    torch.testing.assert_close(model(images), plain(transformed))
    torch.testing.assert_close(model.embed(images), plain.embed(transformed))
    torch.testing.assert_close(model.features(images, "layer1"), plain.features(transformed, "layer1"))
    assert model.digest != plain.digest
    assert not plain.defenses


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_defended_model_loads_from_its_source(name: str) -> None:
    model = methods[name].defend(load_model("builtin:shapes-vgg"), **TRANSFORMS[name])
    assert model.source is not None
    source = dict(model.source)
    loaded = load_model(source.pop("uri"), **source)
    images = draw_scenes(2, seed=1).images
    assert loaded.digest == model.digest and loaded.name == model.name
    assert torch.equal(loaded(images), model(images))
    assert loaded.source == model.source


def test_outer_defense_is_applied_first() -> None:
    model = load_model("defended:median(size=3)|defended:bit_depth(bits=1)|builtin:shapes-vgg")
    images = draw_scenes(2, seed=1).images
    inner = transform("bit_depth", bits=1)(transform("median", size=3)(images))
    torch.testing.assert_close(model(images), load_model("builtin:shapes-vgg")(inner))
    assert model.name == "median(size=3) | bit_depth(bits=1) | builtin:shapes-vgg"
    assert model.classes == load_model("builtin:shapes-vgg").classes


def test_results_on_a_defended_model_record_its_source(tmp_path: Any) -> None:
    model = load_model("defended:bit_depth(bits=3)|builtin:shapes-vgg")
    images = draw_scenes(2, seed=1).images
    result = methods["fgsm"](model, images, model(images).argmax(1))
    provenance = load_result(result.save(tmp_path / "result")).provenance
    assert provenance is not None and provenance.model is not None
    assert provenance.model["source"]["uri"] == "defended:bit_depth(bits=3)|builtin:shapes-vgg"


def test_copy_of_a_defended_model_is_defended() -> None:
    model = load_model("defended:bit_depth(bits=1)|builtin:shapes-vgg")
    images = draw_scenes(1, seed=1).images
    assert torch.equal(model.copy()(images), model(images))


def test_model_passed_as_an_object_has_no_source() -> None:
    assert methods["median"].defend(network()).source is None


@pytest.mark.parametrize(
    ("uri", "error", "message"),
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
def test_invalid_uris_are_refused_with_a_reason(uri: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_model(uri)


def test_method_that_is_no_transform_cannot_defend() -> None:
    with pytest.raises(InputError, match="pgd is no defense"):
        methods["pgd"].defend(network())


def test_random_defense_depends_on_the_seed_alone() -> None:
    def noisy(images: Tensor) -> Tensor:
        return images + 0.05 * torch.randn(1, *images.shape[1:])

    model = load_model("builtin:shapes-resnet").defended(noisy, "noise")
    images = draw_scenes(2, seed=1).images
    labels = load_model("builtin:shapes-resnet")(images).argmax(1)
    first, second = (methods["pgd"](model, images, labels, steps=4, seed=3) for _ in range(2))
    assert torch.equal(first.adversarial, second.adversarial)
