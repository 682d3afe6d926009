"""Options of class and neuron visualization: negative side, variants, pairs, batch-norm prior, opacity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phosphene import Class, InputError, Model, ModelError, load_model, max_batch, methods
from phosphene.optimize import FourierImage
from phosphene_plugins.synthesis._batch_norm_prior import BatchNormPrior
from phosphene_plugins.synthesis._image_priors import diversity_penalty

visualize_class = methods["synthesis.class_visualization"]
visualize_neuron = methods["synthesis.neuron_visualization"]

FEW: dict[str, Any] = {"steps": 10, "seed": 0, "jitter": 1}


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 4),
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for norm in (network[1], network[7]):
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.5, 1.5)
    return load_model(network, mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.2], input_size=(3, 12, 12))


def test_minimize_lowers_the_score(model: Model) -> None:
    for deconvnet_steps in (0, 4):
        options = FEW | {"deconvnet_steps": deconvnet_steps, "steps": 60 if deconvnet_steps else 10}
        low = visualize_class(model, Class((0, 1)), minimize=True, **options)
        assert (low.scores[-1] < low.scores[0]).all()
        # Of the negated unit it is the maximum.
        negated = visualize_class(model, lambda logits: -logits[:, 0], **options)
        torch.testing.assert_close(low.images[:1], negated.images, atol=1e-9, rtol=0)


@pytest.mark.parametrize("layer", ["3", "6"])
def test_diversity_penalty_is_half_the_cosine_of_the_others(model: Model, layer: str) -> None:
    images = rand(6, 3, 12, 12)
    features = model.features(images, layer)
    flat = features.flatten(2) if features.ndim > 2 else features[..., None]
    grams = torch.einsum("ncp,ndp->ncd", flat, flat).flatten(1)
    expected = [
        sum(
            torch.cosine_similarity(grams[a], grams[b], dim=0)
            for b in range(6)
            if b != a and b // 3 == a // 3
        ) / 2
        for a in range(6)
    ]  # fmt: skip
    actual = diversity_penalty(model, layer, 3)(images)
    torch.testing.assert_close(actual, torch.stack(expected))


def test_diversity_makes_the_variants_of_a_unit_differ(model: Model) -> None:
    options = FEW | {"layer": "3", "channels": (1, 4), "variants": 3, "steps": 25}
    similar, diverse = (visualize_neuron(model, diversity=w, **options) for w in (0.0, 3.0))
    assert similar.targets == ("3[1]",) * 3 + ("3[4]",) * 3
    penalty = diversity_penalty(model, "3", 3)
    assert penalty(diverse.images).sum() < penalty(similar.images).sum()
    # The first variant starts as an image without variants; batches hold all variants of a unit.
    single = visualize_neuron(model, **options | {"variants": 1})
    torch.testing.assert_close(similar.images[::3], single.images, atol=1e-9, rtol=0)
    with max_batch(2):
        parts = visualize_neuron(model, diversity=3.0, **options)
    torch.testing.assert_close(parts.images, diverse.images, atol=1e-9, rtol=0)
    classes = visualize_class(model, Class((2, 0)), variants=2, **FEW)
    assert classes.targets == ("class 2", "class 2", "class 0", "class 0")
    torch.testing.assert_close(
        classes.images[2:3], visualize_class(model, 0, **FEW).images, atol=1e-9, rtol=0
    )


def test_pairs_are_joint_objectives(model: Model) -> None:
    options = FEW | {"layer": "3", "channels": (1, 4, 6)}
    pairs = visualize_neuron(model, unit="pair", **options)
    assert pairs.targets == ("3[1]", "3[1] + 3[4]", "3[1] + 3[6]", "3[4]", "3[4] + 3[6]", "3[6]")
    channels = visualize_neuron(model, **options)
    torch.testing.assert_close(pairs.images[[0, 3, 5]], channels.images, atol=1e-9, rtol=0)
    direction = visualize_neuron(
        model, unit="direction", direction=[0.5, 0.5], **options | {"channels": (1, 6)}
    )
    torch.testing.assert_close(pairs.images[2:3], direction.images, atol=1e-9, rtol=0)


def test_batch_norm_penalty_is_the_distance_of_the_statistics(model: Model) -> None:
    images = rand(2, 3, 12, 12)
    first, second = model.module[1], model.module[7]
    maps, vectors = model.input_of(images, "1"), model.input_of(images, "7")
    expected = (
        (maps.mean((2, 3)) - first.running_mean).norm(dim=1)
        + (maps.var((2, 3), correction=0) - first.running_var).norm(dim=1)
        + (vectors - second.running_mean).norm(dim=1)
        + second.running_var.norm()
    )
    torch.testing.assert_close(BatchNormPrior(model)(images), expected)
    free, near = (visualize_class(model, 1, batch_norm=w, **FEW | {"steps": 30}).images for w in (0.0, 5.0))
    assert BatchNormPrior(model)(near) < BatchNormPrior(model)(free)


def test_transparent_image_is_opaque_where_the_unit_needs_it() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(2 * 144, 2)).double()
    with torch.no_grad():  # class 1 reads the left half alone
        weight = torch.zeros(2, 2, 12, 12).double()
        weight[1, 0, :, :6] = 1
        network[2].weight.copy_(weight.flatten(1))
        network[0].weight.copy_(torch.tensor([[1.0, 1, 1], [0, 0, 0]])[..., None, None])
    model = load_model(network, mean=[0.5] * 3, input_size=(3, 12, 12))
    options = {"steps": 80, "seed": 0, "jitter": 0, "rotate": 0, "rescale": 1, "frames": 2}
    result = visualize_class(model, Class((1,)), transparent=True, **options)
    assert result.images.shape == (1, 3, 12, 12) and result.alpha.shape == (1, 12, 12)
    assert result.frames.shape == (2, 1, 3, 12, 12)
    assert result.alpha[..., :5].mean() > result.alpha[..., 7:].mean() + 0.3
    assert result.images[..., :6].mean() > 0.65 > result.images[..., 6:].mean()
    again = visualize_class(model, Class((1,)), transparent=True, **options)
    assert torch.equal(again.alpha, result.alpha)


def test_fourier_image_with_opacity_does_not_mix_it() -> None:
    images = 0.1 + 0.8 * rand(1, 4, 5, 6)
    image, colors = FourierImage(images, opacity=True), FourierImage(images[:, :3])
    torch.testing.assert_close(image.image().detach(), images, atol=1e-12, rtol=0)
    torch.testing.assert_close(image.parameter[:, :3], colors.parameter)
    assert torch.equal(image.mix[3], torch.tensor([0, 0, 0, 1]).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transparent": True, "parametrization": "pixels"}, "transparent needs"),
        ({"transparent": True, "clip_norm": 5}, "no mean color to clip to"),
        ({"transparent": True, "minimize": True}, "minimize would reward"),
        ({"diversity": 1.0}, "set variants to 2 or more"),
        ({"parametrization": "cppn", "start": torch.full((1, 3, 12, 12), 0.5)}, "has no start"),
        ({"parametrization": "cppn", "blur_every": 2}, "set blur_every"),
        ({"parametrization": "cppn", "clip_norm": 2}, "set blur_every"),
        ({"render_size": 24}, 'render_size needs parametrization="cppn"'),
        ({"variants": 2, "start_noise": 0.0}, "start_noise above 0"),
    ],
)
def test_options_that_exclude_each_other_are_refused(
    model: Model, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        visualize_class(model, 0, **FEW | options)


def test_network_of_coordinates_raises_the_score_and_is_rendered_at_any_size(model: Model) -> None:
    options = FEW | {"parametrization": "cppn", "layer": "3", "channels": (1, 4)}
    result = visualize_neuron(model, **options, frames=2)
    assert (result.scores[-1] > result.scores[0]).all() and result.alpha is None
    assert result.frames.shape == (2, 2, 3, 12, 12)
    large = visualize_neuron(model, **options, render_size=36)
    assert large.images.shape == (2, 3, 36, 36)
    torch.testing.assert_close(large.images[..., 1::3, 1::3], result.images, atol=1e-6, rtol=0)
    alone = visualize_neuron(model, **options | {"channels": (4,)})
    torch.testing.assert_close(result.images[1:], alone.images, atol=1e-6, rtol=0)
    variants = visualize_neuron(model, variants=2, diversity=1.0, **options)
    assert variants.images.shape == (4, 3, 12, 12)
    assert (variants.images[0] - variants.images[1]).abs().max() > 0.01
    transparent = visualize_neuron(model, transparent=True, **options | {"size": 10, "render_size": 20})
    assert transparent.images.shape == (2, 3, 20, 20) and transparent.alpha.shape == (2, 20, 20)


def test_network_of_coordinates_restarts_where_a_unit_has_no_gradient(model: Model) -> None:
    """A unit that the mean color and faint noise do not activate is reached by more contrast."""
    network = nn.Sequential(nn.Conv2d(3, 1, 1), nn.ReLU()).double()
    with torch.no_grad():
        network[0].weight.fill_(1)
        network[0].bias.fill_(-0.3)
    dark = load_model(network, mean=[0.5] * 3, input_size=(3, 12, 12))
    options = FEW | {"layer": "1", "channels": (0,), "parametrization": "cppn", "start_noise": 1e-3}
    result = visualize_neuron(dark, unit="channel", **options, variants=2)
    assert (result.scores[-1] > result.scores[0]).all() and (result.scores[0] > 0).all()


def test_network_without_batch_norm_is_refused() -> None:
    model = load_model(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), input_size=(3, 4, 4))
    with pytest.raises(ModelError, match="no batch norm with running statistics"):
        visualize_class(model, 0, batch_norm=1.0)


def test_pairs_form_the_grid_of_interactions(model: Model) -> None:
    options = FEW | {"layer": "3", "channels": (1, 4, 6)}
    pairs = visualize_neuron(model, unit="pair", **options)
    assert pairs.layout.tolist() == [[0, 1, 2], [1, 3, 4], [2, 4, 5]]
    titles = [[panel.title for panel in row] for row in pairs.rows()]
    assert titles[2] == ["3[1] + 3[6]", "3[4] + 3[6]", "3[6]"]
    assert pairs.select([1, 2]).layout is None and len(pairs.select([1, 2]).rows()) == 1
    # Another weight: all cells differ, and (c, d) is the direction w F_c + (1 - w) F_d.
    leaning = visualize_neuron(model, unit="pair", pair_weight=0.75, **options, variants=2, transparent=True)
    assert leaning.layout.tolist()[1] == [6, 7, 8, 9, 10, 11] and leaning.images.shape[0] == 18
    assert leaning.targets[6] == "0.75 3[4] + 0.25 3[1]"
    assert [len(row) for row in leaning.rows()] == [12, 12, 12]
    one = visualize_neuron(model, unit="pair", pair_weight=0.75, **options)
    direction = visualize_neuron(
        model, unit="direction", direction=[0.25, 0.75], **options | {"channels": (1, 6)}
    )
    torch.testing.assert_close(one.images[6:7], direction.images, atol=1e-9, rtol=0)
    assert visualize_neuron(model, **options).layout is None
