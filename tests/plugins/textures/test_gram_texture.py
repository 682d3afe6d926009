"""Gram textures: closed forms, layers and weights, sizes, batches and headless networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phosphene import InputError, Model, UnknownName, batch_size, load_model, max_batch, methods
from phosphene.builtin.textures import load_texture
from phosphene.images import noise_images, read_image, resize
from phosphene.optimize import gram_matrix
from phosphene_plugins.textures.gram_texture import gram_energy

gram_texture = methods["textures.gram_texture"]


@pytest.fixture
def model() -> Model:
    """A network without a head: its output is a feature map."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
    return load_model(network.double())


@pytest.fixture
def samples() -> Tensor:
    return torch.rand(2, 3, 16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def identity(channels: int) -> Model:
    network = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.ReLU()).double()
    nn.init.dirac_(network[0].weight)
    return load_model(network, input_size=(channels, 8, 8))


def test_oracle() -> None:
    gram_texture.spec.oracle()


def test_a_two_by_two_gram_matrix_computed_by_hand() -> None:
    """Constant images: features (a, b) at each of the M positions, so G = M [[aa, ab], [ab, bb]]."""
    sample = torch.tensor([0.8, 0.4], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 8, 8).clone()
    result = gram_texture(
        identity(2), sample, layers=["1"], weights=[3.0], normalization="gatys", steps=1, seed=0
    )
    # The noise of a constant sample is that constant, so the loss is zero.
    assert result.scores.item() == pytest.approx(0, abs=1e-20)
    torch.testing.assert_close(result.images, sample)
    sample[:, :, :4] = 0
    result = gram_texture(
        identity(2), sample, layers=["1"], weights=[3.0], normalization="gatys", steps=1, seed=0
    )
    start = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    start = (start * sample.std((2, 3), keepdim=True) + sample.mean((2, 3), keepdim=True)).clamp(0, 1)
    expected = torch.tensor([[0.64, 0.32], [0.32, 0.16]], dtype=torch.float64) * 32
    rows = start.flatten(2)[0]
    by_hand = 3.0 / (4 * 2**2 * 64**2) * (expected - rows @ rows.T).square().sum()
    assert result.scores[0, 0] == pytest.approx(float(by_hand), rel=1e-9)


@pytest.mark.parametrize("weights", [None, [2.0, 5.0]])
def test_relative_losses_are_the_papers_divided_by_those_of_zero_gram_matrices(
    model: Model, samples: Tensor, weights: list[float] | None
) -> None:
    sample, how = samples[:1], {"layers": ["1", "4"], "steps": 2, "seed": 0}
    grams = [gram_matrix(model.features(sample, layer).detach()) for layer in ("1", "4")]
    zero_energies = [float(gram_energy(torch.zeros_like(g), g)) for g in grams]
    by_hand = [w / e for w, e in zip(weights or [1, 1 / 3], zero_energies, strict=True)]
    relative = gram_texture(model, sample, weights=weights, **how)
    papers = gram_texture(model, sample, weights=by_hand, normalization="gatys", **how)
    torch.testing.assert_close(relative.scores, papers.scores)
    one_each = gram_texture(model, sample, weights=[1.0, 1.0], normalization="gatys", **how)
    assert torch.equal(gram_texture(model, sample, normalization="gatys", **how).scores, one_each.scores)


def test_the_published_scales_of_gram_matrices_and_losses() -> None:
    """Gatys: F F^T / HW, a quarter of the squares' sum over C^2. Johnson: F F^T / CHW, their sum or mean."""
    features, target_features = torch.rand(
        2, 1, 5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    rows, others = (f[0].flatten(1).numpy() for f in (features, target_features))
    raw = rows @ rows.T - others @ others.T
    energy = float(gram_energy(gram_matrix(features), gram_matrix(target_features)))
    assert energy == pytest.approx(((raw / 24) ** 2).sum() / 4 / 5**2, rel=1e-9)
    assert 4 * energy == pytest.approx(((raw / (5 * 24)) ** 2).sum(), rel=1e-9)
    assert 4 * energy / 5**2 == pytest.approx(((raw / (5 * 24)) ** 2).mean(), rel=1e-9)


def test_the_number_of_statistics_is_that_of_the_paper() -> None:
    """Gram matrices are symmetric, so the paper counts one triangle of each, with the diagonal."""
    vgg = pytest.importorskip("torchvision").models.vgg
    model = load_model(vgg.make_layers(vgg.cfgs["E"])[:28], input_size=(3, 16, 16))
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    relus, pools = [1, 3, 6, 8, 11, 13, 15, 17, 20, 22, 24, 26], [4, 9, 18, 27]
    for layers, count in (([1, *pools], 176_640), ([*relus, *pools], 852_128)):
        with torch.no_grad():
            grams = [gram_matrix(f) for f in model.features_of(images, [str(layer) for layer in layers])]
        assert all(torch.allclose(g, g.mT) for g in grams)
        assert sum(torch.triu_indices(*g.shape[1:]).shape[1] for g in grams) == count


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_a_gram_matrix_is_invariant_to_the_order_of_pixels(
    seed: int, channels: int, height: int, width: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(2, channels, height, width, dtype=torch.float64, generator=draw)
    shuffled = features.flatten(2)[:, :, torch.randperm(height * width, generator=draw)].view_as(features)
    torch.testing.assert_close(gram_matrix(shuffled), gram_matrix(features), rtol=0, atol=1e-12)


def test_the_loss_of_the_sample_itself_is_zero(model: Model, samples: Tensor) -> None:
    grams = gram_matrix(model.features(samples, "1"))
    assert gram_energy(grams, grams).abs().max() == 0


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_the_loss_falls_and_the_sample_is_returned(model: Model, samples: Tensor, optimizer: str) -> None:
    result = gram_texture(model, samples, steps=20, seed=0, optimizer=optimizer)
    assert result.images.shape == samples.shape
    assert (result.scores[-1] < 0.5 * result.scores[0]).all()
    assert torch.equal(result.sources, samples)


def test_each_layers_weight_is_a_third_of_the_finer_ones(model: Model, samples: Tensor) -> None:
    sample = samples[:1]
    result = gram_texture(model, sample, steps=1, seed=0)
    spread = {"mean": sample.mean((0, 2, 3)), "sd": sample[0].std((1, 2))}
    start = noise_images((1, 3, 16, 20), seed=0, **spread)
    expected = 0.0
    for depth, layer in enumerate(("1", "4")):
        gram, target = (gram_matrix(model.features(images, layer).detach()) for images in (start, sample))
        expected += 3.0**-depth * float((gram - target).square().sum() / target.square().sum())
    assert result.scores[0].item() == pytest.approx(expected, rel=1e-9)


def test_the_step_length_is_used(model: Model, samples: Tensor) -> None:
    default, same, shorter = (
        gram_texture(model, samples, steps=3, seed=0, optimizer="adam", lr=lr).images
        for lr in (None, 0.02, 0.01)
    )
    assert torch.equal(default, same)
    assert not torch.equal(default, shorter)


def test_lbfgs_reaches_a_lower_loss_than_adam() -> None:
    vgg, sample = load_model("builtin:shapes-vgg"), load_texture("pebbles")[None, :, 40:72, 40:72]
    losses = [gram_texture(vgg, sample, steps=40, seed=0, optimizer=o).scores[-1] for o in ("lbfgs", "adam")]
    assert losses[0] < losses[1] / 2


@pytest.mark.parametrize("statistics", ["gram", "sliced_wasserstein"])
def test_the_loss_of_a_periodic_image_does_not_change_when_it_is_shifted(
    model: Model, samples: Tensor, statistics: str
) -> None:
    """By multiples of the stride, around the edges; without the option it does."""
    start = torch.rand(2, 3, 16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    options = {"statistics": statistics, "steps": 3, "seed": 0}
    for periodic in (True, False):
        first = gram_texture(model, samples, start, periodic=periodic, **options)
        shifted = gram_texture(model, samples, start.roll((6, -4), (2, 3)), periodic=periodic, **options)
        same = torch.allclose(first.scores, shifted.scores, rtol=1e-9)
        assert same == periodic
        assert torch.allclose(first.images.roll((6, -4), (2, 3)), shifted.images, atol=1e-6) == periodic


def test_a_periodic_image_of_odd_sides(model: Model, samples: Tensor) -> None:
    result = gram_texture(model, samples, size=(13, 18), periodic=True, steps=10, seed=0)
    assert result.images.shape == (2, 3, 13, 18)
    assert (result.scores[-1] < result.scores[0]).all()


def test_the_sliced_loss_falls_for_any_size(model: Model, samples: Tensor) -> None:
    for size in (None, (24, 13)):
        result = gram_texture(
            model, samples, size=size, statistics="sliced_wasserstein", steps=25, frames=5, seed=0
        )
        assert (result.scores[-1] < 0.3 * result.scores[0]).all()
        assert result.scores.shape == (25, 2) and len(result.frames) == 5
    same = gram_texture(model, samples, samples, statistics="sliced_wasserstein", steps=1, seed=0)
    assert same.scores.abs().max() < 1e-20


def test_the_output_can_have_any_size(model: Model, samples: Tensor) -> None:
    assert gram_texture(model, samples, size=27, steps=1, seed=0).images.shape == (2, 3, 27, 27)
    result = gram_texture(model, samples, size=(27, 22), steps=15, seed=0)
    assert result.images.shape == (2, 3, 27, 22)
    assert (result.scores[-1] < result.scores[0]).all()
    assert len(result.rows()) == 1


def test_samples_of_a_batch_are_independent(model: Model, samples: Tensor) -> None:
    together = gram_texture(model, samples, steps=6, seed=0)
    with max_batch(1):
        limited = gram_texture(model, samples, steps=6, seed=0)
    for n in range(2):
        alone = gram_texture(model, samples[n : n + 1], steps=6, seed=0)
        torch.testing.assert_close(together.images[n : n + 1], alone.images, atol=1e-8, rtol=0)
        torch.testing.assert_close(limited.images[n : n + 1], alone.images, atol=1e-8, rtol=0)


def test_the_same_seed_gives_the_same_bits(model: Model, samples: Tensor) -> None:
    first, second, other = (gram_texture(model, samples, steps=3, seed=s) for s in (4, 4, 5))
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.images, other.images)


def test_a_weight_of_zero_removes_a_layer(model: Model, samples: Tensor) -> None:
    one = gram_texture(model, samples, layers=["1"], weights=[2.0], steps=4, seed=0)
    two = gram_texture(model, samples, layers=["1", "4"], weights=[2.0, 0.0], steps=4, seed=0)
    torch.testing.assert_close(one.images, two.images)


def test_nothing_above_the_highest_layer_runs(model: Model, samples: Tensor) -> None:
    gram_texture(model, samples, layers=["1"], steps=1, seed=0)
    calls: list[int] = []
    handle = model.module[3].register_forward_hook(lambda *_: calls.append(1))
    gram_texture(model, samples, layers=["1"], steps=3, seed=0)
    handle.remove()
    assert not calls


def test_a_network_without_a_head_has_stages_but_no_classes(model: Model, samples: Tensor) -> None:
    model = model.for_images(samples)
    assert model.stages == ("1", "4")
    assert model.class_count == 0
    assert batch_size(model) >= 1


def test_bad_input_is_refused(model: Model, samples: Tensor) -> None:
    with pytest.raises(InputError, match="one weight per layer"):
        gram_texture(model, samples, layers=["1", "4"], weights=[1.0])
    with pytest.raises(InputError, match="one weight per layer"):
        gram_texture(model, samples, layers=[])
    with pytest.raises(UnknownName):
        gram_texture(model, samples, layers=["relu9"])
    with pytest.raises(InputError, match="channels"):
        gram_texture(model, samples[:, :1])


def test_real_vgg19_matches_pebbles(assets: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    from safetensors.torch import load_file

    saved = load_file(assets / "weights" / "vgg19_relu3_1.normalised.torchvision.safetensors")
    state = {name.removeprefix("features."): value for name, value in saved.items()}
    vgg = load_model(torchvision.models.vgg19().features[:12], weights=state)
    sample = resize(read_image(assets / "images" / "texture" / "pebbles.jpg"), (64, 64))[None]
    result = gram_texture(vgg, sample, steps=15, seed=0)
    assert vgg.stages == ("1", "6", "11")
    assert result.scores[-1] < 0.05 * result.scores[0]
