"""Feature inversion, Mahendran and Vedaldi 2015: images reconstructed from the features of a layer."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, at_least_float32, hookimpl, load_model, method, optimize
from phosphene.images import noise_images
from phosphene.optimize import PixelImage, optimize_image, pad_rows
from phosphene.roles import Frames, Images, LayerName, Model, Seed
from phosphene.spec import (
    Agrees,
    Cost,
    InvariantTo,
    Monotone,
    PixelRange,
    ScalesWith,
    either,
    length,
    param,
    size,
)

from ._activation_maximization import mean_color
from ._inversions_result import Inversions
from ._relations import inversion_by_adam

#: Standard deviation of the initial noise; it makes the initial features differ between positions.
START_NOISE = 0.02

ADAM = {"optimizer": "adam", "beta": 1.5, "alpha": 4.0, "total_variation": 0.5, "alpha_norm": 2.0}


def linear_features_have_the_pseudoinverse_solution() -> None:
    """For Phi = A x without penalties, x = s + A^+ (A x_0 - A s): nearest to the start s with A x = A x_0."""
    torch.manual_seed(0)
    linear = nn.Linear(27, 5, bias=False).double()
    network = nn.Sequential(nn.Flatten(), linear)
    model = load_model(network, input_size=(3, 3, 3), mean=[0.375, 0.5, 0.625], std=[0.5] * 3)
    images = 0.4 + 0.2 * torch.rand(2, 3, 3, 3, dtype=torch.float64)
    plain: Any = {"layers": ["1"], "total_variation": 0, "alpha_norm": 0, "seed": 0}
    result = feature_inversion(model, images, steps=60, **plain)
    start = noise_images(images.shape, seed=0, mean=model.mean, sd=START_NOISE).to(images).flatten(1)
    matrix = linear.weight.detach() / 0.5
    expected = start + (images.flatten(1) - start) @ matrix.T @ torch.linalg.pinv(matrix).T
    torch.testing.assert_close(result.inversions[:, 0].flatten(1), expected, atol=1e-6, rtol=0)
    assert result.layers == ("1",) and result.losses.shape[1:] == (2, 1) and result.frames is None
    offsets = (images.flatten(1) - start, (images - model.mean[:, None, None]).flatten(1))
    distance, size = ((offset @ matrix.T).square().sum(1) for offset in offsets)
    torch.testing.assert_close(result.losses[0, :, 0], distance / size)
    # Adam's first step is its learning rate, 0.02, in every pixel; two frames of two layers.
    ascent = (images.flatten(1) - start) @ matrix.T @ matrix
    one = feature_inversion(model, images, optimizer="adam", steps=1, **plain).inversions
    torch.testing.assert_close(one.flatten(1), start + 0.02 * ascent.sign(), atol=1e-4, rtol=0)
    # For features Phi_0 that are all zero, the absolute error.
    closed = load_model(nn.Sequential(nn.Flatten(), nn.ReLU(), linear), input_size=(3, 3, 3), mean=[0.9] * 3)
    dark = feature_inversion(closed, 0 * images, steps=2, **plain)
    error = (
        noise_images(images.shape, seed=0, mean=torch.full((3,), 0.9), sd=START_NOISE).double() - 0.9
    ).relu()
    torch.testing.assert_close(dark.losses[0, :, 0], error.square().sum((1, 2, 3)))
    both = feature_inversion(model, images, steps=3, frames=2, **plain | {"layers": ["0", "1"]})
    assert both.frames is not None and len(both.frames) == 2 and both.inversions.shape == (2, 2, 3, 3, 3)


@method(
    family="synthesis",
    references=[
        Reference(
            key="mahendran2015",
            title="Understanding Deep Image Representations by Inverting Them",
            authors="Mahendran, Vedaldi",
            year=2015,
            url="https://arxiv.org/abs/1412.0035",
        )
    ],
    invariants=[PixelRange(field="inversions")],
    needs=["gradients"],
    # The line search of L-BFGS evaluates the loss once or twice per step.
    cost=Cost(
        forward=size.images * (2 + 2 * param.steps) * length(either(param.layers, size.stages)),
        backward=size.images * (1 + 2 * param.steps) * length(either(param.layers, size.stages)),
    ),
    oracle=linear_features_have_the_pseudoinverse_solution,
    relations=[
        Agrees(inversion_by_adam, fields=("inversions",), where=ADAM),
        Agrees(inversion_by_adam, fields=("inversions",), where=ADAM | {"total_variation": 0, "lr": 0.05}),
        Agrees(inversion_by_adam, fields=("inversions",), where=ADAM | {"alpha_norm": 0, "beta": 2.0}),
        InvariantTo("batch_order", fields=("inversions",)),
        ScalesWith("logits", power=0),
        Monotone("steps", values=(2, 6, 12), measure="losses", falls=True),
    ],
    quick={"steps": 3},
    demo={"model": "builtin:parts-resnet", "images": "builtin:part-scenes/2", "steps": 50},
)
def feature_inversion(
    model: Model,
    images: Images,
    *,
    layers: Annotated[
        Annotated[list[LayerName], Field(min_length=1)] | None,
        Field(description="layers to invert, one image each; default: all stages, shallow to deep"),
    ] = None,
    total_variation: Annotated[
        float, Field(ge=0, le=1e6, description="weight of the total variation, per pixel")
    ] = 1.0,
    beta: Annotated[
        float, Field(ge=1, le=4, description="exponent of the total variation: 1 preserves edges, 2 smooths")
    ] = 2.0,
    alpha_norm: Annotated[
        float, Field(ge=0, le=1e6, description="weight of the alpha-norm, per pixel")
    ] = 0.1,
    alpha: Annotated[
        float, Field(ge=2, le=12, description="exponent of the alpha-norm: high values bound the range")
    ] = 6.0,
    optimizer: Annotated[
        Literal["lbfgs", "adam"], Field(description="optimizer; L-BFGS reaches lower losses")
    ] = "lbfgs",
    steps: Annotated[
        int, Field(ge=1, le=100_000, description="number of optimization steps per layer")
    ] = 100,
    lr: Annotated[
        float | None, Field(gt=0, le=1000, description="learning rate; default: 1 for L-BFGS, 0.02 for Adam")
    ] = None,
    frames: Frames = 0,
    seed: Seed = None,
) -> Inversions:
    """Feature inversion: image whose features match those of the input image, for each layer.

    x* = argmin_x ||Phi(x) - Phi_0||^2 / ||Phi_0||^2 + total_variation R_V(x) + alpha_norm R_alpha(x)

    R_V = 1/HW sum_ij ((x_i,j+1 - x_ij)^2 + (x_i+1,j - x_ij)^2)^(beta/2),  R_alpha = 1/HW sum |x - m|^alpha

    with Phi_0 = Phi(x_0) the features of the input x_0 and m the model's mean color (mid-gray for a model
    without a mean), which is also the start, with a little noise. The first term is relative, so that the
    weights of the penalties suit every layer; for a layer whose features are all zero it is the absolute
    error. What an inversion loses is what the layer discards: shallow layers retain nearly everything, deep
    ones what the classes need. The network is evaluated up to the layer only.

    Returns:
        ``inversions`` (N, L, C, H, W) in [0, 1] for ``images`` (N, C, H, W) and L ``layers``; ``losses``
        (steps, N, L), the relative feature distance at every step.

    Raises:
        DivergenceError: the gradient is zero at the start.

    Example::
        from phosphene import run

        result = run("feature_inversion", images="builtin:scenes/1", layers=["features.6"], steps=3, seed=0)
        result.inversions.shape  # (1, 1, 3, 64, 64)

    Source:
        Mahendran and Vedaldi 2015, equations 1 to 3 (lecture 21.9).
    """
    layers_to_invert = tuple(layers or model.stages)
    center, pixel_count = mean_color(model), images[0, 0].numel()

    def features_of(x: Tensor, layer: str) -> Tensor:
        return at_least_float32(model.features(x, layer).flatten(1))

    def feature_distance(x: Tensor, layer: str, features: Tensor, norm: Tensor) -> Tensor:
        return (features_of(x, layer) - features).square().sum(1) / norm

    def penalty(x: Tensor) -> Tensor:
        alpha_term = (x - center.to(x)[:, None, None]).abs().pow(alpha).sum((1, 2, 3))
        variation = optimize.total_variation(x, beta) if total_variation else torch.zeros_like(alpha_term)
        return (total_variation * variation + alpha_norm * alpha_term) / pixel_count

    start = noise_images(images.shape, seed=seed, mean=center, sd=START_NOISE).to(images)
    optimizations = []
    for layer in layers_to_invert:
        with torch.no_grad():
            features = features_of(images, layer)
        norm = features.square().sum(1)
        norm = torch.where(norm > 0, norm, 1)
        optimizations.append(
            optimize_image(
                partial(feature_distance, layer=layer, features=features, norm=norm),
                PixelImage(start),
                steps=steps,
                lr=lr or (1.0 if optimizer == "lbfgs" else 0.02),
                optimizer=optimizer,
                maximize=False,
                # equivalent mutants: a penalty of weight 0 is 0
                regularizer=penalty if total_variation or alpha_norm else None,
                frames=frames,
            )
        )
    recorded = [result.frames for result in optimizations if result.frames is not None]
    return Inversions(
        images=images,
        inversions=torch.stack([result.images for result in optimizations], 1),
        layers=layers_to_invert,
        losses=torch.stack(pad_rows([result.scores for result in optimizations]), 2),
        frames=torch.cat(pad_rows(recorded), -1) if recorded else None,
    )


@hookimpl
def phosphene_methods():
    return [feature_inversion]
