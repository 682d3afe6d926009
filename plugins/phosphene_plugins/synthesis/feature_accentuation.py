"""Feature accentuation, Hamblin et al. 2024: an image changed to raise a unit, near it in a layer."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, at_least_float32, hookimpl, load_model, method, scores
from phosphene.optimize import FourierImage, PixelImage, optimize_image
from phosphene.results import Synthesis
from phosphene.roles import Frames, Images, LayerName, Model, Seed, Target
from phosphene.spec import Agrees, Cost, InvariantTo, Monotone, PixelRange, UnitRange, param, size

from ._activation_maximization import (
    ImageParametrization,
    Jitter,
    LearningRate,
    Rescale,
    Rotate,
    Steps,
    UpdateRule,
    random_transform,
)
from ._relations import PLAIN, accentuation_by_hand

#: Every term and augmentation, with plain steps on the pixels.
ALL_ON: dict[str, Any] = {
    **{"parametrization": "pixels", "optimizer": "sgd", "lr": 0.5, "steps": 4, "weight": 3.0},
    **{"jitter": 2, "rotate": 10, "rescale": 1.2},
}


def linear_unit_and_layer_have_their_closed_form() -> None:
    """max w.x - lambda ||A (x - x0)||^2 / ||A x0||^2 is at x0 + ||A x0||^2 / (2 lambda) (A'A)^-1 w."""
    torch.manual_seed(0)
    first, second = nn.Linear(12, 12, bias=False).double(), nn.Linear(12, 3, bias=False).double()
    with torch.no_grad():  # well conditioned, so that plain steps converge
        first.weight.copy_(torch.eye(12).double() + 0.1 * first.weight)
        second.weight.mul_(0.2)
    mean, std = [0.4, 0.5, 0.6], [0.5, 0.6, 0.8]
    model = load_model(nn.Sequential(nn.Flatten(), first, second), mean=mean, std=std, input_size=(3, 2, 2))
    images = 0.3 + 0.4 * torch.rand(2, 3, 2, 2, dtype=torch.float64)
    scale = model.std.double().repeat_interleave(4)
    matrix = first.weight.detach() / scale
    features = (images.flatten(1) - model.mean.double().repeat_interleave(4)) @ matrix.T
    weights = (second.weight.detach() @ matrix)[[1, 2]]
    plain: Any = {"parametrization": "pixels", "optimizer": "sgd", **PLAIN}
    weight = 4.0
    result = feature_accentuation(
        model, images, (1, 2), layer="1", weight=weight, steps=300, lr=0.01, **plain
    )
    step = torch.linalg.solve(matrix.T @ matrix, weights.T).T
    expected = images.flatten(1) + features.square().sum(1, keepdim=True) / (2 * weight) * step
    assert (expected > 0).all() and (expected < 1).all(), "the oracle's optimum lies inside"
    torch.testing.assert_close(result.images.flatten(1), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        result.scores[0], torch.einsum("nc,nc->n", features, second.weight.detach()[[1, 2]])
    )
    assert (
        result.targets == ("class 1", "class 2")
        and result.sources is not None
        and torch.equal(result.sources, images)
    )
    assert result.alpha is not None
    slope = weights.view(2, 3, 2, 2).abs().mean(1)
    quantile = slope.flatten(1).quantile(0.8, dim=1)[:, None, None]
    torch.testing.assert_close(result.alpha, (slope / quantile).clamp(max=1))
    _options_change_the_image()


def _options_change_the_image() -> None:
    """The middle stage and the predicted class by default; shifts, their seed, optimizer, parametrization."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)]
    model = load_model(nn.Sequential(*layers).double(), input_size=(3, 8, 10))
    images = torch.rand(2, 3, 8, 10, dtype=torch.float64)
    predicted = tuple(model(images).argmax(1).tolist())
    plain: Any = {"parametrization": "pixels", "optimizer": "sgd", **PLAIN, "steps": 3, "lr": 2.0, "seed": 0}
    middle = model.stages[len(model.stages) // 2]
    variants: list[dict[str, Any]] = [
        {},
        {"lr": 0.01},
        {"layer": "0"},
        *({"jitter": 2, "seed": seed} for seed in (0, 1)),
        {"optimizer": "adam", "lr": 0.01},
        {"parametrization": "fourier"},
    ]
    default = feature_accentuation(model, images, **plain)
    named = feature_accentuation(model, images, predicted, layer=middle, **plain)
    torch.testing.assert_close(default.images, named.images)
    results = [feature_accentuation(model, images, frames=2, **plain | variant) for variant in variants]
    for n, result in enumerate(results):
        assert result.targets == tuple(f"class {index}" for index in predicted)
        assert result.frames is not None and len(result.frames) == 2
        assert all((result.images - other.images).abs().max() > 1e-6 for other in results[:n])
    # The predicted class is that of the image itself, not of a shifted one: all logits are nearly equal.
    one, head = images[:1], layers[-1]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        logits = model(one)[0]
        head.bias.add_(logits.max() - logits + torch.tensor([1e-6, 0, 0]))
    shifted: Any = plain | {"jitter": 2}
    default, named = (feature_accentuation(model, one, target, **shifted) for target in (None, 0))
    torch.testing.assert_close(default.images, named.images)
    # Of an image without activations the distance is absolute.
    black = torch.zeros(1, 3, 8, 10, dtype=torch.float64)
    bare = load_model(
        nn.Sequential(nn.Flatten(), nn.Linear(240, 240, bias=False), nn.Linear(240, 2)).double()
    )
    start = feature_accentuation(bare, black, 0, layer="1", weight=2.0, **plain | {"steps": 2, "lr": 0.01})
    assert start.images.isfinite().all()


@method(
    family="synthesis",
    references=[
        Reference(
            key="hamblin2024",
            title="Feature Accentuation: Revealing 'What' Features Respond to in Natural Images",
            authors="Hamblin, Fel, Saha, Konkle, Alvarez",
            year=2024,
            url="https://arxiv.org/abs/2402.10039",
        )
    ],
    invariants=[PixelRange(), UnitRange(field="alpha")],
    needs=["gradients"],
    cost=Cost(forward=size.images * (2 * param.steps + 2), backward=size.images * 2 * param.steps),
    oracle=linear_unit_and_layer_have_their_closed_form,
    relations=[
        Agrees(accentuation_by_hand, fields=("images",), where=ALL_ON, networks=("gap",)),
        Agrees(accentuation_by_hand, fields=("images",), where=ALL_ON | {"weight": 0}, networks=("gap",)),
        InvariantTo("logit_shift", fields=("images",), tolerance=1e-6),
        InvariantTo("batch_order", fields=("images",)),
        Monotone("steps", values=(2, 6, 12), measure="scores", where=PLAIN),
    ],
    quick={"steps": 4},
    demo={"model": "builtin:parts-resnet", "images": "builtin:part-scenes/3"},
)
def feature_accentuation(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    layer: Annotated[
        LayerName | None,
        Field(description="layer in which the image stays near; default: the middle one of the stages"),
    ] = None,
    weight: Annotated[
        float, Field(ge=0, le=1e6, description="weight lambda of the relative distance in the layer")
    ] = 10.0,
    jitter: Jitter = 8,
    rotate: Rotate = 5.0,
    rescale: Rescale = 1.1,
    parametrization: ImageParametrization = "fourier",
    optimizer: UpdateRule = "adam",
    steps: Steps = 100,
    lr: LearningRate = 0.05,
    frames: Frames = 0,
    seed: Seed = None,
) -> Synthesis:
    """Feature accentuation: the image changed so that a class or unit responds more, near it in a layer.

    x* = argmax_x S(x) - lambda ||phi(x) - phi(x0)||^2 / ||phi(x0)||^2,   started at x0

    phi is a layer of the network. Where ``class_visualization`` draws what maximizes a unit from nothing,
    the accentuated image shows what in this image the unit responds to, and how it would have to change. In
    an early layer the distance preserves every edge, in a late one only the content. Shifts, rotations and
    scales are applied to the input of S, not of phi. The opacity, the sum over the steps of |dS/dx|, is
    large where S depends on the image.

    Returns:
        ``images`` (N, C, H, W) in [0, 1], from ``sources``; ``scores`` (steps, N), S at every step; ``alpha``
        (N, H, W) in [0, 1], over its 80th percentile and clipped.

    Raises:
        DivergenceError: the gradient is zero at the start.
        ModelError: no layer is named and the model has no stages.

    Example::
        from phosphene import run

        result = run("feature_accentuation", images="builtin:scenes/2", target="star", steps=3, seed=0)
        result.images.shape  # (2, 3, 64, 64)

    Source:
        Hamblin et al. 2024, equation 3.
    """
    target = target.resolve(model, images)
    layer = layer or model.stages[len(model.stages) // 2]

    def features_of(x: Tensor) -> Tensor:
        return at_least_float32(model.features(x, layer).flatten(1))

    with torch.no_grad():
        features = features_of(images)
    norm = features.square().sum(1)
    norm = torch.where(norm > 0, norm, 1)

    def distance(x: Tensor) -> Tensor:
        return weight * (features_of(x) - features).square().sum(1) / norm

    optimization = optimize_image(
        lambda x: scores(model, x, target),
        (PixelImage if parametrization == "pixels" else FourierImage)(images),
        steps=steps,
        lr=lr,
        optimizer=optimizer,
        # equivalent mutants: a distance of weight 0 is 0
        regularizer=distance if weight else None,
        transform=random_transform(jitter, rotate, rescale),
        opacity=True,
        frames=frames,
        seed=seed,
    )
    return Synthesis(**optimization._asdict(), targets=target.names(model, len(images)), sources=images)


@hookimpl
def phosphene_methods():
    return [feature_accentuation]
