"""Lipschitz bounds: sound, exact where a closed form exists, and no attack inside a certified radius."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phosphene import Model, ModelError, load_model, methods
from phosphene.builtin.scenes import draw_scenes
from phosphene_plugins.defenses.lipschitz import lipschitz_bound, spectral_norm

lipschitz = methods["defenses.lipschitz"]


class Residual(nn.Module):
    """Sums, concatenation, overlapping windows, in-place ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
        )
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(8, 3)
        self.norm.running_var.uniform_(0.2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.norm(self.conv1(x)))
        x = F.leaky_relu(self.conv2(x), 1.5) + x
        x = torch.cat([F.max_pool2d(x, 3, 2), F.avg_pool2d(x, 3, 2)[:, :]], 1)
        return self.head(x.mean((2, 3)))


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(),
        nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip


def build_model(build: Callable[[], nn.Module], seed: int) -> Model:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        module = build().eval()
    return load_model(module, input_size=(3, 8, 8), std=[0.3, 0.2, 0.5], mean=[0.5] * 3, dtype=torch.float64)


def random_images(seed: int, count: int = 3) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unrolled_matrix(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> np.ndarray:
    """The matrix of a linear function of maps, column by column from unit images."""
    units = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return function(units).flatten(1).T.numpy()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(3, 7), st.integers(3, 7)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
)
def test_norm_bounds_that_of_the_unrolled_matrix(
    seed: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
) -> None:
    if any(dilation * (k - 1) + 1 > n + 2 * padding for k, n in zip(kernel, size, strict=True)):
        return
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 2 // groups, *kernel, generator=generator, dtype=torch.float64)
    matrix = unrolled_matrix(
        lambda x: F.conv2d(x, weight, None, stride, padding, dilation, groups), (2, *size)
    )
    exact = np.linalg.svd(matrix, compute_uv=False)[0]
    assert exact <= spectral_norm(weight, size, dilation=(dilation, dilation), groups=groups) * (1 + 1e-12)


def test_norm_on_a_large_map_is_close_to_that_of_the_unrolled_matrix() -> None:
    weight = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = np.linalg.svd(
        unrolled_matrix(lambda x: F.conv2d(x, weight, padding=1), (2, 16, 16)), compute_uv=False
    )[0]
    assert spectral_norm(weight, (16, 16)) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("build", [Residual, plain])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_logits_never_change_more_than_the_bound(build: Callable[[], nn.Module], seed: int) -> None:
    model, images = build_model(build, seed), random_images(seed, 1)
    with model.guard():
        bound = lipschitz_bound(model, images)
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x)[0], images).flatten(1)
    assert np.linalg.svd(jacobian.numpy(), compute_uv=False)[0] <= bound
    generator = torch.Generator().manual_seed(seed)
    for _ in range(30):
        a, b = torch.rand(2, *images.shape, generator=generator, dtype=torch.float64)
        assert (model(a) - model(b)).norm() <= bound * (a - b).norm()


def test_bound_of_linear_layers_is_the_product_of_their_norms() -> None:
    model = build_model(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 3)), 0)
    norms = [np.linalg.svd(model.module[n].weight.detach().numpy(), compute_uv=False)[0] for n in (1, 3)]
    assert lipschitz_bound(model, random_images(0)) == pytest.approx(norms[0] * norms[1] / 0.2)


@settings(max_examples=20, deadline=None)
@given(build=st.sampled_from([Residual, plain]), seed=st.integers(0, 10**6))
def test_pgd_fails_inside_the_certified_radius(build: Callable[[], nn.Module], seed: int) -> None:
    model, images = build_model(build, seed), random_images(seed)
    result = lipschitz(model, images)
    for n in (~result.abstained).nonzero()[:, 0].tolist():
        eps = float(result.radius[n])
        attack = methods["pgd"](
            model,
            images[n : n + 1],
            result.labels[n : n + 1],
            eps=eps,
            step_size=eps / 4,
            steps=8,
            norm="l2",
            seed=0,
        )
        assert not attack.success.any()


def test_constant_model_is_certified_up_to_the_largest_distance() -> None:
    model = build_model(plain, 0)
    nn.init.zeros_(model.module[5].weight)
    assert lipschitz(model, random_images(0)).radius.tolist() == pytest.approx([math.sqrt(192)] * 3)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (nn.GroupNorm(1, 3), "group_norm"),
        (nn.ReflectionPad2d(1), "padding by reflect"),
        (nn.Softmax(1), "softmax"),
    ],
)
def test_operation_without_a_rule_is_refused_by_name(part: nn.Module, message: str) -> None:
    module = nn.Sequential(part, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(ModelError, match=message):
        lipschitz(load_model(module, input_size=(3, 8, 8)), torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("name", ["lipschitz", "interval_bounds"])
def test_dropout_active_in_eval_mode_is_refused(name: str) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.dropout(x, 0.5).mean((2, 3)))

    with pytest.raises(ModelError, match="dropout"):
        methods[name](load_model(Dropping(), input_size=(3, 8, 8)), torch.rand(1, 3, 8, 8))


def test_defended_model_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"jpeg\(quality=75\)"):
        lipschitz(load_model("defended:jpeg()|builtin:shapes-vgg"), draw_scenes(1, seed=0).images)
