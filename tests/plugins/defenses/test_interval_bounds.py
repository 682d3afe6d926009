"""Interval bounds: exact on linear models, sound on others, refused for operations without a rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phosphene import Model, ModelError, load_model, methods
from phosphene.builtin.scenes import draw_scenes
from phosphene_plugins.defenses.interval_bounds import pixel_box, worst_case_margins

bounds = methods["defenses.interval_bounds"]


class Residual(nn.Module):
    """In-place and functional ReLUs, sums in place, concatenation, pooling by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(12, 4)
        self.norm.running_mean.uniform_(-0.5, 0.5)
        self.norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(self.norm.weight, -1.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(x)), inplace=True)
        y = self.conv2(x)
        y += x
        x = y
        y = F.leaky_relu(-1.5 * F.max_pool2d(x, 2) + 0.3)
        z = torch.cat([y, F.avg_pool2d(x, 2) / 2 - y], 1).relu_()
        return self.head(z.mean((2, 3)))


def deep() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, 2), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.Dropout(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 4),
    )  # fmt: skip


def with_sigmoid_output() -> nn.Module:
    """No linear layer last."""
    return nn.Sequential(deep(), nn.Sigmoid())


def build_model(build: Callable[[], nn.Module], seed: int, dtype: torch.dtype = torch.float64) -> Model:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return load_model(
            build().eval(), input_size=(3, 8, 8), mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4], dtype=dtype
        )


def random_images(seed: int, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64)


networks = st.sampled_from([Residual, deep, with_sigmoid_output])


@settings(max_examples=40, deadline=None)
@given(build=networks, seed=st.integers(0, 10**6), eps=st.floats(1e-6, 0.3))
def test_margins_inside_the_box_are_never_smaller(
    build: Callable[[], nn.Module], seed: int, eps: float
) -> None:
    model, images = build_model(build, seed), random_images(seed)
    labels = model(images).argmax(1)
    with torch.no_grad(), model.guard():
        bound = worst_case_margins(model, images, labels, eps)
        lower, upper = pixel_box(images, eps)
        generator = torch.Generator().manual_seed(seed)
        for n in range(20):
            share = torch.rand(images.shape, generator=generator, dtype=torch.float64)
            points = lower + (upper - lower) * (share.round() if n % 2 else share)
            logits = model(points)
            margins = logits.gather(1, labels[:, None]) - logits
            assert (margins >= bound.where(bound.isfinite(), torch.zeros_like(bound)) - 1e-9).all()


@settings(max_examples=20, deadline=None)
@given(build=networks, seed=st.integers(0, 10**6))
def test_pgd_fails_inside_the_certified_radius(build: Callable[[], nn.Module], seed: int) -> None:
    model, images = build_model(build, seed), random_images(seed)
    result = bounds(model, images, eps=0.2)
    for n in (~result.abstained).nonzero()[:, 0].tolist():
        eps = float(result.radius[n])
        attack = methods["pgd"](
            model,
            images[n : n + 1],
            result.labels[n : n + 1],
            eps=eps,
            step_size=eps / 4,
            steps=10,
            seed=seed,
        )
        assert not attack.success.any()


@pytest.mark.parametrize("build", [Residual, deep, with_sigmoid_output])
def test_margins_of_an_empty_box_are_those_of_the_model(build: Callable[[], nn.Module]) -> None:
    model, images = build_model(build, 1), random_images(1)
    with torch.no_grad(), model.guard():
        logits = model(images)
        labels = logits.argmax(1)
        margins = (logits.gather(1, labels[:, None]) - logits).scatter(1, labels[:, None], torch.inf)
        torch.testing.assert_close(worst_case_margins(model, images, labels, 0.0), margins)


def test_single_precision_model_certifies_no_more_than_double() -> None:
    images = draw_scenes(3, seed=2).images
    single, double = (load_model("builtin:shapes-vgg", dtype=d) for d in (torch.float32, torch.float64))
    radii = [bounds(m, images, eps=1e-6, halvings=24).radius.double() for m in (single, double)]
    torch.testing.assert_close(*radii, rtol=1e-4, atol=0)
    assert radii[0].min() > 0


def test_radius_is_eps_where_eps_is_proven() -> None:
    model, images = build_model(deep, 0), random_images(0)
    wide = bounds(model, images, eps=0.5, halvings=40).radius
    result = bounds(model, images, eps=float(wide.min()) / 2, halvings=0)
    assert not result.abstained.any()
    assert result.radius.tolist() == [float(wide.min()) / 2] * 3


def test_box_is_clipped_to_the_pixel_range() -> None:
    lower, upper = pixel_box(torch.tensor([0.0, 0.05, 1.0]).double(), 0.1)
    torch.testing.assert_close(lower, torch.tensor([0.0, 0.0, 0.9]).double())
    torch.testing.assert_close(upper, torch.tensor([0.1, 0.15, 1.0]).double())


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (nn.GELU(), "gelu"),
        (nn.GroupNorm(1, 3), "group_norm"),
        (nn.LeakyReLU(-0.1), "negative slope"),
        (nn.Softmax(1), "softmax"),
    ],
)
def test_operation_without_a_rule_is_refused_by_name(part: nn.Module, message: str) -> None:
    model = load_model(nn.Sequential(part, nn.Flatten(), nn.Linear(192, 2)), input_size=(3, 8, 8))
    with pytest.raises(ModelError, match=message):
        bounds(model, torch.rand(1, 3, 8, 8))


def test_products_of_activations_are_refused() -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x * x).mean((2, 3)))

    with pytest.raises(ModelError, match="mul of two values"):
        bounds(load_model(Squared(), input_size=(3, 8, 8)), torch.rand(1, 3, 8, 8))


def test_defended_model_is_refused_by_name() -> None:
    model = load_model("defended:jpeg()|builtin:shapes-vgg")
    with pytest.raises(ModelError, match=r"jpeg\(quality=75\)"):
        bounds(model, draw_scenes(1, seed=0).images)
