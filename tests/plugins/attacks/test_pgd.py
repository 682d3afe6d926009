"""PGD: ball and pixel range, growth of the loss, success flags, independence of images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phosphene import Model, PhospheneError, load_model, methods
from phosphene.attacks import project
from phosphene.data import SceneDataset
from phosphene.optimize import rotate

pgd = methods["attacks.pgd"]
few = settings(max_examples=60, deadline=None)
norms = st.sampled_from(["linf", "l2"])
dtypes = st.sampled_from([torch.float32, torch.float64])


def network(seed: int = 0, dtype: torch.dtype = torch.float64, gain: float = 1.0, size: int = 6) -> Model:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * size * size, 4)
        )
    module[3].weight.data *= gain
    return load_model(module, input_size=(3, size, size), dtype=dtype)


def random_images(count: int, seed: int = 0, dtype: torch.dtype = torch.float64, size: int = 6) -> Tensor:
    """Random pixels, a fifth of them black and a fifth white, so that clipping matters."""
    pixels = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return (pixels * 1.7 - 0.35).clamp(0, 1)


def predict(model: Model, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(1)


def lp_norm(delta: Tensor, norm: str) -> float:
    flat = delta.double().flatten(1)
    return float(flat.abs().max() if norm == "linf" else flat.norm(dim=1).max())


@few
@given(
    seed=st.integers(0, 99),
    dtype=dtypes,
    norm=norms,
    eps=st.floats(1e-7, 30, exclude_min=True),
    step_size=st.floats(1e-7, 1000),
    steps=st.integers(1, 4),
    targeted=st.booleans(),
    random_start=st.booleans(),
    gain=st.sampled_from([0.0, 1.0, 1e4, 1e30]),
)
def test_result_is_in_the_ball_and_in_the_pixel_range(
    seed: int, dtype: torch.dtype, norm: str, eps: float, gain: float, **params: object
) -> None:
    model, images = network(seed, dtype, gain), random_images(3, seed, dtype)
    labels = torch.tensor([0, 1, 2])
    result = pgd(model, images, labels, eps=eps, norm=norm, seed=seed, **params)
    assert result.adversarial.dtype == dtype
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1
    # 1e-14 is the precision of a sum of squares in double precision.
    assert lp_norm(result.adversarial - result.images, norm) <= eps * (1 + 1e-14 * (norm == "l2"))
    assert all(torch.isfinite(v).all() for _, v in result.fields() if isinstance(v, Tensor))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_large_float32_images_stay_inside_the_ball(norm: str) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 32 * 32, 3))
    model, images = load_model(module), random_images(2, dtype=torch.float32, size=512)
    result = pgd(model, images, predict(model, images), norm=norm, eps=0.3, step_size=0.1, steps=5, seed=3)
    moved = result.adversarial.double() - result.images.double()
    assert 0.25 < lp_norm(moved, norm) <= 0.3


@few
@given(seed=st.integers(0, 99), norm=norms, targeted=st.booleans(), random_start=st.booleans())
def test_batch_equals_single_images(seed: int, norm: str, targeted: bool, random_start: bool) -> None:
    model, images, labels = network(seed), random_images(3, seed), torch.tensor([0, 1, 2])
    params = {"norm": norm, "targeted": targeted, "random_start": random_start, "seed": seed, "eps": 0.2}
    together = pgd(model, images, labels, **params).adversarial
    for n in range(3):
        single = pgd(model, images[n : n + 1], labels[n : n + 1], **params).adversarial
        torch.testing.assert_close(together[n : n + 1], single, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_seed_determines_the_start(norm: str) -> None:
    model, images = network(), random_images(2)
    labels = predict(model, images)
    first, second, third = (
        pgd(model, images, labels, norm=norm, steps=1, seed=s).adversarial for s in (5, 5, 6)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@few
@given(seed=st.integers(0, 99), norm=norms, targeted=st.booleans(), eps=st.floats(0.001, 0.5))
def test_success_equals_the_prediction_for_the_returned_image(
    seed: int, norm: str, targeted: bool, eps: float
) -> None:
    model, images, labels = network(seed), random_images(4, seed), torch.tensor([0, 1, 2, 3])
    result = pgd(model, images, labels, norm=norm, eps=eps, targeted=targeted, seed=0)
    probabilities = model(result.adversarial).softmax(1).detach()
    after = probabilities.argmax(1)
    assert torch.equal(result.after, after)
    assert torch.equal(result.success, after == labels if targeted else after != labels)
    torch.testing.assert_close(result.confidence_after, probabilities.amax(1))
    assert torch.equal(result.before, predict(model, images))
    assert result.names_after == tuple(f"class {i}" for i in after.tolist())


@few
@given(seed=st.integers(0, 99), norm=norms, targeted=st.booleans())
def test_image_that_is_adversarial_already_is_unchanged(seed: int, norm: str, targeted: bool) -> None:
    model, images = network(seed), random_images(4, seed)
    before = predict(model, images)
    labels = before if targeted else (before + 1) % 4
    result = pgd(model, images, labels, norm=norm, targeted=targeted, eps=0.3, seed=0)
    assert torch.equal(result.adversarial, images)
    assert result.success.all()


@few
@given(seed=st.integers(0, 99), norm=norms, shift=st.sampled_from([-100.0, 0.5, 1000.0]))
def test_constant_added_to_the_logits_does_not_matter(seed: int, norm: str, shift: float) -> None:
    model, images = network(seed), random_images(2, seed)
    labels = predict(model, images)
    plain = pgd(model, images, labels, norm=norm, eps=0.2, seed=1).adversarial
    model.module[3].bias.data += shift
    # The constant costs precision of the logits, and so of the gradient's direction.
    torch.testing.assert_close(
        pgd(model, images, labels, norm=norm, eps=0.2, seed=1).adversarial, plain, rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targeted", [False, True])
def test_loss_grows_or_targeted_falls(norm: str, targeted: bool) -> None:
    model, images = network(3), random_images(6, 3)
    before = predict(model, images)
    labels = (before + 1) % 4 if targeted else before
    result = pgd(model, images, labels, norm=norm, eps=0.1, step_size=0.02, targeted=targeted, seed=0)
    loss_before = F.cross_entropy(model(images), labels, reduction="none")
    loss_after = F.cross_entropy(model(result.adversarial), labels, reduction="none")
    assert ((loss_after < loss_before) if targeted else (loss_after > loss_before)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_zero_gradient_leaves_the_image_unchanged(norm: str) -> None:
    model = network(gain=0.0)
    model.module[3].bias.data = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    images = random_images(2)
    result = pgd(model, images, torch.tensor([0, 0]), norm=norm, random_start=False)
    assert torch.equal(result.adversarial, images)
    assert not result.success.any()
    assert result.png()


def test_gradient_that_underflows_when_squared_gives_a_full_step() -> None:
    model = network(dtype=torch.float32, gain=1e-26)
    images = torch.full((1, 3, 6, 6), 0.5)
    labels = predict(model, images)
    result = pgd(model, images, labels, norm="l2", steps=1, step_size=0.1, eps=10, random_start=False)
    assert result.distance("l2").item() == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_fill_the_ball_uniformly(norm: str) -> None:
    """A model without a gradient leaves gray images at their random start."""
    model, images = network(gain=0.0, size=2), torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64)
    model.module[3].bias.data = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    offsets = torch.cat(
        [
            pgd(model, images, torch.tensor([0]), norm=norm, eps=0.4, steps=1, seed=s).adversarial - 0.5
            for s in range(400)
        ]
    ).flatten(1)
    d = offsets.shape[1]
    assert offsets.mean().abs() < 0.02
    # The fraction of a ball within radius r is (r / eps)^d.
    fractions = (offsets / 0.8 + 0.5).flatten() if norm == "linf" else (offsets.norm(dim=1) / 0.4) ** d
    ordered = fractions.sort().values
    uniform = torch.linspace(0, 1, len(ordered), dtype=torch.float64)
    # Kolmogorov-Smirnov test at a significance of 1e-6 for this number of draws.
    assert float((ordered - uniform).abs().max()) < 2.7 / len(ordered) ** 0.5


@pytest.mark.parametrize(
    "params",
    [{"eps": 0}, {"eps": float("nan")}, {"step_size": -1}, {"steps": 0}, {"norm": "l3"}, {"epsilon": 1}],
)
def test_invalid_parameters_raise(params: dict[str, object]) -> None:
    with pytest.raises(PhospheneError):
        pgd(network(), random_images(1), torch.tensor([0]), **params)


def test_panels_are_original_adversarial_and_difference() -> None:
    model, images = network(), random_images(2)
    result = pgd(model, images, predict(model, images), eps=0.1, step_size=0.05, seed=0)
    original, adversarial, difference = result.panels()[0][:3]
    torch.testing.assert_close(original.image, images[0], check_dtype=False)
    torch.testing.assert_close(adversarial.image, result.adversarial[0], check_dtype=False)
    assert difference.title == f"difference ×5, l2 {float(result.distance('l2')[0]):.3g}"
    marker = "->" if result.success[0] else "still"
    assert adversarial.title.startswith(f"{marker} {result.names_after[0]} ")
    # Gray where nothing changed, black or white at the largest change.
    assert float((difference.image - 0.5).abs().max()) == pytest.approx(0.5, abs=1e-6)


@few
@given(seed=st.integers(0, 99), eps=st.floats(1e-3, 30), steps=st.integers(1, 4))
def test_l1_result_is_in_the_ball(seed: int, eps: float, steps: int) -> None:
    model, images = network(seed), random_images(3, seed)
    labels = torch.tensor([0, 1, 2])
    result = pgd(model, images, labels, eps=eps, step_size=eps / 2, steps=steps, norm="l1", seed=seed)
    assert (result.distance("l1") <= eps * (1 + 1e-12)).all()
    assert result.adversarial.min() >= 0 and result.adversarial.max() <= 1


@pytest.mark.parametrize("eps", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("binary", [True, False])
def test_l1_projection_is_the_nearest_point_of_ball_and_pixel_range(eps: float, binary: bool) -> None:
    generator = torch.Generator().manual_seed(int(10 * eps))
    images = torch.rand(3, 1, 3, 4, generator=generator, dtype=torch.float64)
    images = images.round() if binary else images
    points = images + torch.randn(3, 1, 3, 4, generator=generator, dtype=torch.float64)
    result = project(points, images, eps, "l1")
    up, down = slice(12), slice(12, 24)  # the positive and the negative part
    for image, point, nearest in zip(images, points, result, strict=True):
        x, way = image.flatten().numpy(), (point - image).flatten().numpy()
        best = scipy.optimize.minimize(
            lambda d, way=way: np.square(d[up] - d[down] - way).sum(), np.zeros(24), method="SLSQP",
            jac=lambda d, way=way: 2 * np.concatenate([d[up] - d[down] - way, way - d[up] + d[down]]),
            bounds=[(0, 1 - v) for v in x] + [(0, v) for v in x], options={"maxiter": 500, "ftol": 1e-14},
            constraints={"type": "ineq", "fun": lambda d: eps - d.sum(), "jac": lambda d: -np.ones(24)},
        )  # fmt: skip
        assert float((nearest - point).square().sum()) <= best.fun * (1 + 1e-6)


def test_restarts_lose_no_success() -> None:
    model, images = network(3), random_images(24, 3)
    labels = predict(model, images)
    single_start, more = (
        pgd(model, images, labels, eps=0.02, step_size=0.005, restarts=n, seed=0) for n in (1, 4)
    )
    assert (more.success | ~single_start.success).all()
    loss = [F.cross_entropy(model(r.adversarial), labels, reduction="none") for r in (single_start, more)]
    assert (loss[1] >= loss[0] - 1e-9)[~more.success].all()


def test_augmentations_make_the_example_robust_to_them() -> None:
    """Under rotations of up to 20 degrees it fools the model more often than a plain example."""
    model, images = load_model("builtin:shapes-vgg"), SceneDataset(8).read(range(8))
    labels = predict(model, images)
    params: dict[str, Any] = {"eps": 8 / 255, "steps": 8, "seed": 0}
    plain = pgd(model, images, labels, **params)
    robust = pgd(model, images, labels, eot_samples=4, augmentations=("rotate",), **params)

    def misclassified(result: Any) -> float:
        rates = []
        for seed in range(12):
            rotated = rotate(result.adversarial, torch.Generator().manual_seed(100 + seed))
            rates.append(predict(model, rotated).ne(labels)[labels == result.before].double().mean())
        return float(torch.stack(rates).mean())

    assert misclassified(robust) > misclassified(plain)


def test_eot_attacks_a_stochastic_model() -> None:
    """With noise in the network the averaged gradient reaches a higher loss than a single sample."""

    class Noisy(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x + 0.5 * torch.randn_like(x))

    clean, images = network(3), random_images(6, 3)
    labels = predict(clean, images)
    noisy = load_model(Noisy(clean.module), input_size=(3, 6, 6))
    gains = []
    for samples in (1, 30):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            result = pgd(
                noisy, images, labels, eps=0.05, step_size=0.01, steps=5, eot_samples=samples, seed=0
            )
        attacked = result.adversarial.ne(images).flatten(1).any(1)
        loss = F.cross_entropy(clean(result.adversarial), labels, reduction="none")
        gains.append(
            float((loss - F.cross_entropy(clean(images), labels, reduction="none"))[attacked].detach().mean())
        )
    assert gains[1] > gains[0]
