"""Set distance: closed form for Gaussians, zero between equal sets, larger for less similar sets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phosphene import InputError, Model, TensorDataset, load_model, methods, run
from phosphene.builtin.scenes import draw_scenes

set_distance = methods["embeddings.set_distance"]


def identity(size: int = 2) -> Model:
    """A model whose features are the pixels."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * size**2, 2)).double()
    return load_model(network, input_size=(3, size, size))


def random_images(count: int, seed: int = 0, size: int = 2) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).double()


def test_closed_form_for_gaussians_with_shift_and_scale():
    images = 0.25 + 0.5 * random_images(50)
    middle = images.mean(0)
    shifted = set_distance(identity(), images, images + 0.1)
    assert abs(float(shifted.frechet) - 12 * 0.1**2) < 1e-10
    half = set_distance(identity(), images, middle + 0.5 * (images - middle))
    # (s - s / 2)^2 for every direction.
    variance = images.flatten(1).var(0).sum()
    assert torch.allclose(half.frechet, variance / 4, atol=1e-10)


@pytest.mark.parametrize("counts", [(30, 40), (5, 8), (5, 40)])
def test_distance_equals_the_formula_with_the_matrix_square_root(counts):
    first, second = random_images(counts[0], 1), random_images(counts[1], 2) ** 2
    result = set_distance(identity(), first, second)
    x, y = first.flatten(1), second.flatten(1)
    a, b = x.T.cov(), y.T.cov()
    root = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root
    assert torch.allclose(result.frechet, expected, atol=1e-6)

    def kernel(p: Tensor, q: Tensor) -> float:
        return float((p @ q / 12 + 1) ** 3)

    within = [
        sum(kernel(p, q) for i, p in enumerate(z) for j, q in enumerate(z) if i != j) / len(z) / (len(z) - 1)
        for z in (x, y)
    ]
    between = sum(kernel(p, q) for p in x for q in y) / len(x) / len(y)
    assert abs(float(result.kernel) - (sum(within) - 2 * between)) < 1e-10


def test_distance_of_a_set_to_itself_is_zero():
    images = random_images(6, size=4)
    assert float(set_distance(identity(4), images, images).frechet) < 1e-12


def test_scenes_are_nearer_to_scenes_than_noise_is():
    scenes, others = (TensorDataset(draw_scenes(64, split="test", start=n).images) for n in (0, 64))
    noise = torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    near, far = (
        run("set_distance", dataset=scenes, other=others),
        run("set_distance", dataset=scenes, other=noise),
    )
    assert far.frechet > 3 * near.frechet and far.kernel > 10 * near.kernel.abs()


def test_set_of_one_image_is_refused():
    with pytest.raises(InputError, match="needs at least 2 images, the data set has 1"):
        set_distance(identity(), random_images(3), random_images(1))


@pytest.mark.parametrize("counts", [(7, 11), (40, 23)])
def test_distances_do_not_depend_on_the_blocks(counts, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.rand(n, 1, 2, 4, generator=draw) for n in counts)
    model = load_model(nn.Sequential(nn.Flatten(), nn.Linear(8, 2)), input_size=(1, 2, 4))
    complete = run("set_distance", model=model, dataset=first, other=second)
    monkeypatch.setattr("phosphene_plugins.embeddings.set_distance.ROWS", 3)
    in_blocks = run("set_distance", model=model, dataset=first, other=second)
    for name in ("frechet", "kernel"):
        torch.testing.assert_close(getattr(in_blocks, name), getattr(complete, name), rtol=1e-5, atol=1e-7)
