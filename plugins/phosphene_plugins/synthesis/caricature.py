"""Caricature: an image synthesized from an image's activations, with what they stand for exaggerated."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import at_least_float32, hookimpl, load_model, method
from phosphene.images import noise_images
from phosphene.optimize import FourierImage, PixelImage, optimize_image
from phosphene.results import Synthesis
from phosphene.roles import Frames, Images, LayerName, Model, Seed
from phosphene.spec import Cost, InvariantTo, Monotone, PixelRange, ScalesWith, param, size

from ._activation_maximization import (
    CARTER,
    OLAH,
    CosinePower,
    ImageParametrization,
    Jitter,
    LearningRate,
    Rescale,
    Rotate,
    Steps,
    UpdateRule,
    random_transform,
    start_images,
)
from ._relations import PLAIN


def linear_layer_has_its_closed_form() -> None:
    """For phi = A x, S = <A x, A x0> cos^p / |A x0|^2; without p every step is lr A'A x0 / |A x0|^2."""
    torch.manual_seed(0)
    linear = nn.Linear(24, 7, bias=False).double()
    mean, std = [0.4, 0.5, 0.6], [0.5, 0.6, 0.8]
    model = load_model(nn.Sequential(nn.Flatten(), linear), mean=mean, std=std, input_size=(3, 2, 4))
    images = 0.3 + 0.4 * torch.rand(2, 3, 2, 4, dtype=torch.float64)
    center = model.mean.double().repeat_interleave(8)
    matrix = linear.weight.detach() / model.std.double().repeat_interleave(8)
    features = (images.flatten(1) - center) @ matrix.T
    plain: Any = {"parametrization": "pixels", "optimizer": "sgd", **PLAIN}
    plain |= {"layer": "1", "seed": 0, "start_noise": 0.002, "lr": 0.02, "steps": 2}
    start = noise_images((1, 3, 2, 4), seed=0, mean=model.mean, sd=0.002).double().flatten(1)
    norms = features.square().sum(1)
    slope = features @ matrix / norms[:, None]
    one = caricature(model, images, power=0.0, **plain)
    torch.testing.assert_close(one.images.flatten(1), start + 2 * 0.02 * slope)
    projected = ((start + 0.02 * slope - center) @ matrix.T * features).sum(1)
    torch.testing.assert_close(one.scores[1], projected / norms)
    assert one.sources is not None and torch.equal(one.sources, images) and one.targets == ("1", "1")

    def score(x: Tensor) -> Tensor:
        activations = (x - center) @ matrix.T
        products = (activations * features).sum(1)
        cosines = products / (activations.norm(dim=1) * norms.sqrt())
        return products / norms * cosines.clamp(min=0.1) ** 3

    # At the start the cosines are -0.6, which is clamped, and 0.6.
    two, x = caricature(model, images, power=3.0, **plain), start.expand(2, -1)
    for step in range(2):
        x.requires_grad_()
        value = score(x)
        torch.testing.assert_close(two.scores[step], value)
        x = (x + 0.02 * torch.autograd.grad(value.sum(), x)[0]).detach()
    torch.testing.assert_close(two.images.flatten(1), x)
    # Of the last map by default; noise, shifts and the parametrization change the image, and so do seeds.
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model = load_model(network.double(), mean=mean, std=std, input_size=(3, 6, 8))
    images = torch.rand(2, 3, 6, 8, dtype=torch.float64)
    plain |= {"layer": None, "steps": 2, "lr": 0.1}
    variants: list[dict[str, Any]] = [
        {},
        *({"start_noise": 0.02, "seed": seed} for seed in (0, 1)),
        *({"jitter": 2, "seed": seed} for seed in (0, 1)),
        {"parametrization": "fourier"},
    ]
    results = [caricature(model, images, frames=2, **plain | variant) for variant in variants]
    for n, result in enumerate(results):
        assert result.targets == ("0", "0") and result.scores.shape == (2, 2)
        assert result.frames is not None and len(result.frames) == 2
        assert not any(torch.equal(result.images, other.images) for other in results[:n])


@method(
    family="synthesis",
    references=[
        CARTER,
        OLAH,
    ],
    invariants=[PixelRange()],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 1), backward=size.images * param.steps),
    oracle=linear_layer_has_its_closed_form,
    relations=[
        InvariantTo("logit_shift", fields=("images",), tolerance=1e-6),
        InvariantTo("batch_order", fields=("images",)),
        ScalesWith("logits", power=0),
        Monotone("steps", values=(2, 6, 12), measure="scores", where=PLAIN),
    ],
    quick={"steps": 4},
    demo={"model": "builtin:parts-resnet", "images": "builtin:part-scenes/3"},
)
def caricature(
    model: Model,
    images: Images,
    *,
    layer: Annotated[
        LayerName | None,
        Field(description="layer of the activations; default: the last one with feature maps"),
    ] = None,
    power: CosinePower = 2.0,
    jitter: Jitter = 4,
    rotate: Rotate = 3.0,
    rescale: Rescale = 1.05,
    parametrization: ImageParametrization = "fourier",
    optimizer: UpdateRule = "adam",
    steps: Steps = 200,
    lr: LearningRate = 0.05,
    start_noise: Annotated[
        float,
        Field(
            ge=0.001,
            le=1,
            description="standard deviation of the noise in the initial image: where it is even, or nearly, "
            "the values of a pooling window are equal, and rounding decides which is the largest",
        ),
    ] = 0.02,
    frames: Frames = 0,
    seed: Seed = None,
) -> Synthesis:
    """Caricature: an image whose activations point where those of an image do, as far as possible.

    x* = argmax_x <a, a0> / ||a0||^2 max(cos(a, a0), 0.1)^power,  a = phi(x), a0 = phi(x0)

    with phi all values of a layer. ``feature_inversion`` asks for the same activations; here they may be
    larger, so what the layer has recognized is exaggerated and what it has not is absent. The power of the
    cosine prevents a large activation in another direction. The start is the mean color with a little noise:
    nothing of the image enters but a0. Compare layers to see what each one represents.

    Returns:
        ``images`` (N, C, H, W) in [0, 1], of ``sources``; ``scores`` (steps, N): 1 for the image itself.

    Raises:
        DivergenceError: the gradient is zero at the start, or all activations of an image are zero; try
            another layer or more ``start_noise``.

    Example::
        from phosphene import run

        result = run("caricature", images="builtin:scenes/2", layer="relu3_1", steps=5, seed=0)
        result.images.shape  # (2, 3, 64, 64)

    Source:
        Olah et al. 2017 (parametrization); the objective is that of Carter et al. 2019, "Activation Atlas",
        for all positions at once.
    """
    layer = layer or model.last_map

    def features_of(x: Tensor) -> Tensor:
        return at_least_float32(model.features(x, layer).flatten(1))

    with torch.no_grad():
        expected = features_of(images)
    length = expected.norm(dim=1).clamp(min=1e-30)

    def exaggeration(x: Tensor) -> Tensor:
        features = features_of(x)
        projection = (features * expected).sum(1) / length
        # A norm of zero has no gradient: the cosine of no activations is 0.
        cosine = projection / features.square().sum(1).clamp(min=1e-30).sqrt()
        return projection / length * cosine.clamp(min=0.1) ** power

    start = start_images(model, tuple(images.shape), parametrization, start_noise, seed)
    optimization = optimize_image(
        exaggeration,
        (PixelImage if parametrization == "pixels" else FourierImage)(start),
        steps=steps,
        lr=lr,
        optimizer=optimizer,
        transform=random_transform(jitter, rotate, rescale),
        frames=frames,
        seed=seed,
    )
    return Synthesis(**optimization._asdict(), targets=(layer,) * len(images), sources=images)


@hookimpl
def phosphene_methods():
    return [caricature]
