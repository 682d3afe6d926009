"""Feature inversion: the pictures that a layer cannot tell from the one it was shown."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, hookimpl, load_model, method, optimize
from phosphene.images import noise_images
from phosphene.optimize import PixelImage, optimize_image, pad_rows
from phosphene.results import Panel, Result
from phosphene.roles import Frames, Images, LayerName, Model, Seed
from phosphene.spec import Cost, PixelRange, either, length, param, size


@dataclass(frozen=True, eq=False, kw_only=True)
class Inversions(Result):
    """What layers know of pictures: ``inversions`` (N, L, C, H, W) of ``images`` (N, C, H, W), in [0, 1].

    One for each of ``layers``, which found them by ``losses`` (steps, N, L); ``frames`` (F, N, C, H, L W),
    bytes, how they came about, side by side, where that was asked for.
    """

    per_image: ClassVar[tuple[str, ...]] = ("images", "inversions")
    per_step: ClassVar[tuple[str, ...]] = ("losses", "frames")

    images: Tensor
    inversions: Tensor
    layers: tuple[str, ...]
    losses: Tensor
    frames: Tensor | None = None

    def panels(self) -> list[list[Panel]]:
        titles = [
            [f"{layer}, loss {loss:.2g}" for layer, loss in zip(self.layers, row, strict=True)]
            for row in self.losses[-1].tolist()
        ]
        return [
            [
                Panel(image, "picture"),
                *(Panel(p, t, is_output=True) for p, t in zip(found, told, strict=True)),
            ]
            for image, found, told in zip(self.images, self.inversions, titles, strict=True)
        ]

    def animation_frames(self) -> list[Tensor]:
        return [] if self.frames is None else [torch.cat(list(frame), -2) / 255 for frame in self.frames]


def linear_features_give_the_nearest_picture_with_them() -> None:
    """Phi = A x without penalties: the nearest x to the start with A x = A x_0, x = s + A^+ (A x_0 - A s)."""
    torch.manual_seed(0)
    linear = nn.Linear(27, 5, bias=False).double()
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(3, 3, 3))
    images = 0.4 + 0.2 * torch.rand(2, 3, 3, 3, dtype=torch.float64)
    found = feature_inversion(model, images, layers=["1"], total_variation=0, alpha_norm=0, steps=60, seed=0)
    start = noise_images(images.shape, seed=0, sd=_NOISE).to(images).flatten(1)
    matrix = linear.weight.detach()
    wanted = start + (images.flatten(1) - start) @ matrix.T @ torch.linalg.pinv(matrix).T
    torch.testing.assert_close(found.inversions[:, 0].flatten(1), wanted, atol=1e-6, rtol=0)


#: Deviation of the noise that it starts from: enough for no two places to be alike.
_NOISE = 0.02


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
    # L-BFGS looks once a step, or twice.
    cost=Cost(
        forward=size.images * (2 + 2 * param.steps) * length(either(param.layers, size.stages)),
        backward=size.images * (1 + 2 * param.steps) * length(either(param.layers, size.stages)),
    ),
    oracle=linear_features_give_the_nearest_picture_with_them,
    quick={"steps": 3},
    demo={"images": "builtin:scenes/2", "steps": 50},
)
def feature_inversion(
    model: Model,
    images: Images,
    *,
    layers: Annotated[
        Annotated[list[LayerName], Field(min_length=1)] | None,
        Field(description="whose features, one picture each; every stage, shallow to deep"),
    ] = None,
    total_variation: Annotated[float, Field(ge=0, le=1e6, description="weight of it, per pixel")] = 1.0,
    beta: Annotated[float, Field(ge=1, le=4, description="its exponent: 1 keeps edges, 2 smooths")] = 2.0,
    alpha_norm: Annotated[float, Field(ge=0, le=1e6, description="weight of it, per pixel")] = 0.1,
    alpha: Annotated[float, Field(ge=2, le=12, description="its exponent: high ones bound the range")] = 6.0,
    optimizer: Annotated[Literal["lbfgs", "adam"], Field(description="lbfgs gets further")] = "lbfgs",
    steps: Annotated[int, Field(ge=1, le=100_000, description="steps of descent for each layer")] = 100,
    lr: Annotated[float | None, Field(gt=0, le=1000, description="step length: 1, or 0.02 for Adam")] = None,
    frames: Frames = 0,
    seed: Seed = None,
) -> Inversions:
    """Find a picture that a layer takes for the given one: what is lost on the way up stays open.

    x* = argmin_x ||Phi(x) - Phi_0||^2 / ||Phi_0||^2 + total_variation R_V(x) + alpha_norm R_alpha(x)

    R_V = 1/HW sum_ij ((x_i,j+1 - x_ij)^2 + (x_i+1,j - x_ij)^2)^(beta/2),  R_alpha = 1/HW sum |x - m|^alpha

    with Phi_0 = Phi(x_0) the features of the picture x_0, and m the model's mean colour (mid-grey where it
    has none). The first term is relative, so that the weights mean the same for every layer. Begins at m with
    a little noise. ``images`` (N, C, H, W) in [0, 1] -> ``inversions`` (N, L, C, H, W), one for each of
    the ``layers``; None: ``model.stages``, from shallow ones, which keep nearly everything, to deep ones,
    which keep what the classes need. Nothing above a layer runs. A layer that answers the picture with zeros
    alone is inverted by its absolute error.

    Raises DivergenceError where nothing moves. Source: Mahendran & Vedaldi 2015, equations 1 to 3.
    """
    chosen = tuple(layers or model.stages)
    grey = model.mean if model.mean.any() else torch.full_like(model.mean, 0.5)
    places = images[0, 0].numel()

    def distance(found: Tensor, layer: str, wanted: Tensor, size: Tensor) -> Tensor:
        return (model.features(found, layer).flatten(1) - wanted).square().sum(1) / size

    def penalty(found: Tensor) -> Tensor:
        away = (found - grey.to(found)[:, None, None]).abs().pow(alpha).sum((1, 2, 3))
        steep = optimize.total_variation(found, beta) if total_variation else torch.zeros_like(away)
        return (total_variation * steep + alpha_norm * away) / places

    start = noise_images(images.shape, seed=seed, mean=grey, sd=_NOISE).to(images)
    made = []
    for layer in chosen:
        with torch.no_grad():
            wanted = model.features(images, layer).flatten(1)
        size = wanted.square().sum(1)
        size = torch.where(size > 0, size, 1)

        made.append(
            optimize_image(
                partial(distance, layer=layer, wanted=wanted, size=size),
                PixelImage(start),
                steps=steps,
                lr=lr or (1.0 if optimizer == "lbfgs" else 0.02),
                optimizer=optimizer,
                maximize=False,
                regularizer=penalty if total_variation or alpha_norm else None,
                frames=frames,
            )
        )
    film = [found.frames for found in made if found.frames is not None]
    return Inversions(
        images=images,
        inversions=torch.stack([found.images for found in made], 1),
        layers=chosen,
        losses=torch.stack(pad_rows([found.scores for found in made]), 2),
        frames=torch.cat(pad_rows(film), -1) if film else None,
    )


@hookimpl
def phosphene_methods():
    return [feature_inversion]
