"""Gram texture: a new picture with the feature statistics of a sample."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from phosphene import InputError, Reference, hookimpl, load_model, method
from phosphene.images import noise_images
from phosphene.optimize import PixelImage, gram_matrix, optimize_image
from phosphene.results import Synthesis
from phosphene.roles import Frames, LayerName, Model, Seed, Start, Texture
from phosphene.spec import Cost, PixelRange, param, size

from ._texture_samples import Size, output_size


def gram_energy(found: Tensor, wanted: Tensor) -> Tensor:
    """E_l = 1/(4 N_l^2) sum_cc' (G_cc' - Ĝ_cc')^2 of Gram matrices over their own M_l: (N,)."""
    return (found - wanted).square().sum((1, 2)) / (4 * wanted.shape[-1] ** 2)


def one_pixel_has_its_closed_form() -> None:
    """Features = pixels, one channel, one place a pixel: the Gram is the mean square, whatever the order."""
    pixels = torch.nn.Conv2d(1, 1, 1, bias=False).double()
    torch.nn.init.ones_(pixels.weight)
    model = load_model(torch.nn.Sequential(pixels, torch.nn.ReLU()), input_size=(1, 8, 8))
    sample = torch.linspace(0.2, 0.8, 64, dtype=torch.float64).view(1, 1, 8, 8)
    made = gram_texture(model, sample, layers=["1"], normalization="gatys", steps=50, seed=0)
    squares = sample.square().mean(), made.images.square().mean()
    assert abs(squares[0] - squares[1]) < 1e-6, f"mean squares differ: {squares}"
    start = noise_images((1, 1, 8, 8), seed=0, mean=sample.mean(), sd=sample.std())
    first = (squares[0] - start.square().mean()) ** 2 / 4
    assert abs(made.scores[0, 0] - first) < 1e-12, "the first loss is not E_l of the noise"


@method(
    family="textures",
    references=[
        Reference(
            key="gatys2015texture",
            title="Texture Synthesis Using Convolutional Neural Networks",
            authors="Gatys, Ecker, Bethge",
            year=2015,
            url="https://arxiv.org/abs/1505.07376",
        )
    ],
    invariants=[PixelRange()],
    needs=["gradients"],
    # L-BFGS looks once a step, or twice.
    cost=Cost(forward=size.images * (2 * param.steps + 2), backward=size.images * (2 * param.steps + 1)),
    oracle=one_pixel_has_its_closed_form,
    quick={"steps": 4, "size": 32},
    demo={"steps": 200},
)
def gram_texture(
    model: Model,
    sample: Texture,
    start: Start = None,
    *,
    layers: Annotated[list[LayerName] | None, Field(description="layers l; every stage")] = None,
    weights: Annotated[list[NonNegativeFloat] | None, Field(description="w_l, one a layer")] = None,
    normalization: Annotated[
        Literal["relative", "gatys"], Field(description="E_l over that of an empty picture, or the paper's")
    ] = "relative",
    steps: Annotated[int, Field(ge=1, le=100_000, description="steps of descent")] = 100,
    size: Size = None,
    optimizer: Annotated[Literal["lbfgs", "adam"], Field(description="lbfgs gets further")] = "lbfgs",
    lr: Annotated[float | None, Field(gt=0, le=1000, description="step length: 1, or 0.02 for Adam")] = None,
    frames: Frames = 0,
    seed: Seed = None,
) -> Synthesis:
    """Grow a picture out of noise until its features correlate as the sample's do.

    L(I) = sum_l w_l E_l,  E_l = 1/(4 N_l^2 M_l^2) sum_cc' (G_cc' - Ĝ_cc')^2,  G = F F^T

    with F the layer's N_l feature maps at their M_l places; where the picture is not of the sample's
    size, each Gram matrix is divided by its own M. ``normalization`` "gatys" is that E_l, with w_l = 1
    where ``weights`` is None; "relative" divides it by the E_l of an empty picture, so that no scale of
    features matters, and w_l is 3^-l, so that deeper layers, whose losses fall slowly, do not hold up
    the finer ones. In other conventions: Gram matrices divided by N_l, too (Johnson et al. 2016), give
    4 E_l as the sum of their squared differences, and 4 E_l / N_l^2 as their mean.

    ``layers`` None: the first activation at each resolution (relu1_1 ... relu5_1 of a VGG). The
    noise has the sample's mean and standard deviation, channel by channel; ``start`` (N, C, H, W) is gone
    on with in its place. Gives images (N, C, H, W) of that ``size`` for N samples, and the loss L at every
    step as scores. Raises InputError if weights do not fit layers. Source: Gatys et al. 2015.
    """
    chosen = list(layers) if layers is not None else list(model.stages)
    if not chosen or (weights is not None and len(weights) != len(chosen)):
        given = "none" if weights is None else len(weights)
        raise InputError(f"gram_texture needs one weight per layer: {len(chosen)} layers, weights: {given}")
    with torch.no_grad():
        wanted = [gram_matrix(model.maps(f, sample)) for f in model.features_of(sample, chosen)]
    relative = normalization == "relative"
    shares: Sequence[Tensor | float]
    shares = weights or [3.0**-depth if relative else 1.0 for depth in range(len(chosen))]
    if relative:
        empty = [gram_energy(torch.zeros_like(g), g).clamp(min=1e-30) for g in wanted]
        shares = [w / e for w, e in zip(shares, empty, strict=True)]

    def loss(images: Tensor) -> Tensor:
        terms = zip(shares, model.features_of(images, chosen), wanted, strict=True)
        return torch.stack([w * gram_energy(gram_matrix(model.maps(f, images)), g) for w, f, g in terms]).sum(
            0
        )

    if start is None:
        shape = (1, sample.shape[1], *output_size(sample, size))
        spread = [{"mean": s.mean((1, 2)), "sd": s.std((1, 2))} for s in sample]
        start = torch.cat([noise_images(shape, seed=seed, **colours) for colours in spread])
    made = optimize_image(
        loss,
        PixelImage(start),
        steps=steps,
        lr=lr or (1.0 if optimizer == "lbfgs" else 0.02),
        optimizer=optimizer,
        maximize=False,
        frames=frames,
    )
    return Synthesis(**made._asdict(), targets=("texture",) * len(sample), sources=sample)


@hookimpl
def phosphene_methods():
    return [gram_texture]
