"""Texture synthesis by Gram matrices (Gatys et al.): noise optimised to a sample's feature correlations."""

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


def gram_energy(gram: Tensor, target: Tensor) -> Tensor:
    """E_l = 1/(4 N_l^2) sum_cc' (G_cc' - Ĝ_cc')^2 of Gram matrices divided by their own M_l: (N,)."""
    return (gram - target).square().sum((1, 2)) / (4 * target.shape[-1] ** 2)


def pixels_as_features_have_a_closed_form() -> None:
    """Features = pixels, one channel: the Gram matrix is the mean square of the pixels."""
    pixels = torch.nn.Conv2d(1, 1, 1, bias=False).double()
    torch.nn.init.ones_(pixels.weight)
    model = load_model(torch.nn.Sequential(pixels, torch.nn.ReLU()), input_size=(1, 8, 8))
    sample = torch.linspace(0.2, 0.8, 64, dtype=torch.float64).view(1, 1, 8, 8)
    result = gram_texture(model, sample, layers=["1"], normalization="gatys", steps=50, seed=0)
    mean_squares = sample.square().mean(), result.images.square().mean()
    assert abs(mean_squares[0] - mean_squares[1]) < 1e-6, f"mean squares differ: {mean_squares}"
    start = noise_images((1, 1, 8, 8), seed=0, mean=sample.mean(), sd=sample.std())
    # The gradient is a multiple of the image: every step scales it.
    torch.testing.assert_close(result.images / result.images.mean(), start / start.mean(), rtol=1e-5, atol=0)
    first_loss = (mean_squares[0] - start.square().mean()) ** 2 / 4
    assert abs(result.scores[0, 0] - first_loss) < 1e-12, "the first loss is not E_l of the noise"


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
    # L-BFGS evaluates the loss once or twice per step.
    cost=Cost(forward=size.images * (2 * param.steps + 2), backward=size.images * (2 * param.steps + 1)),
    oracle=pixels_as_features_have_a_closed_form,
    quick={"steps": 4, "size": 32},
    demo={"steps": 200},
)
def gram_texture(
    model: Model,
    sample: Texture,
    start: Start = None,
    *,
    layers: Annotated[
        list[LayerName] | None, Field(description="layers l of the Gram matrices; default: every stage")
    ] = None,
    weights: Annotated[
        list[NonNegativeFloat] | None,
        Field(description="w_l: weight of each layer; default: 3^-l for relative, 1 for gatys"),
    ] = None,
    normalization: Annotated[
        Literal["relative", "gatys"],
        Field(description="scale of E_l: relative to the energy of a zero Gram matrix, or as in the paper"),
    ] = "relative",
    steps: Annotated[int, Field(ge=1, le=100_000, description="number of optimisation steps")] = 100,
    size: Size = None,
    optimizer: Annotated[
        Literal["lbfgs", "adam"], Field(description="optimiser; lbfgs reaches lower losses")
    ] = "lbfgs",
    lr: Annotated[
        float | None, Field(gt=0, le=1000, description="step length; default: 1 for lbfgs, 0.02 for adam")
    ] = None,
    frames: Frames = 0,
    seed: Seed = None,
) -> Synthesis:
    """Texture synthesis by Gram matrices (Gatys et al.): noise optimised to a sample's correlations.

    L(I) = sum_l w_l E_l,  E_l = 1/(4 N_l^2 M_l^2) sum_cc' (G_cc' - Ĝ_cc')^2,  G = F F^T

    with F the layer's N_l feature maps at their M_l positions; where the sizes of image and sample differ,
    each Gram matrix is divided by its own M. ``normalization`` "gatys" is that E_l, with w_l = 1 by
    default; "relative" divides it by the E_l of a zero Gram matrix, so that the scale of features does not
    matter, and w_l is 3^-l by default: deeper layers, whose losses fall slowly, would otherwise delay the
    finer ones. In other conventions: Gram matrices also divided by N_l (Johnson et al. 2016) give 4 E_l as
    the sum of their squared differences, and 4 E_l / N_l^2 as their mean.

    ``layers`` default to the first activation at each resolution (relu1_1 ... relu5_1 of a VGG). The initial
    noise has the sample's mean and standard deviation in each channel; ``start`` (N, C, H, W) replaces it.

    Returns:
        ``images`` (N, C, H', W') of that ``size``, ``scores`` (steps, N) the loss L at each step,
        ``sources`` (N, C, H, W) the samples, ``frames`` (F, N, C, H', W').

    Raises:
        InputError: weights that do not fit the layers.

    Example::
        from phosphene import run

        result = run("gram_texture", sample="builtin:pebbles", size=32, steps=2, seed=0)
        result.images.shape  # (1, 3, 32, 32)

    Source: Gatys et al. 2015, sections 3 and 4.
    """
    layers = list(model.stages) if layers is None else list(layers)
    if not layers or (weights is not None and len(weights) != len(layers)):
        count = "none" if weights is None else len(weights)
        raise InputError(f"gram_texture needs one weight per layer: {len(layers)} layers, weights: {count}")
    with torch.no_grad():
        target_grams = [gram_matrix(model.maps(f, sample)) for f in model.features_of(sample, layers)]
    scales: list[float | Tensor]
    if normalization == "gatys":
        scales = list(weights or [1.0] * len(layers))
    else:
        zero_energies = [gram_energy(torch.zeros_like(g), g).clamp(min=1e-30) for g in target_grams]
        layer_weights = weights or [3.0**-depth for depth in range(len(layers))]
        scales = [w / e for w, e in zip(layer_weights, zero_energies, strict=True)]

    def loss(images: Tensor) -> Tensor:
        """L(I): (N,)."""
        grams = [gram_matrix(model.maps(f, images)) for f in model.features_of(images, layers)]
        terms = zip(scales, grams, target_grams, strict=True)
        return torch.stack([scale * gram_energy(gram, target) for scale, gram, target in terms]).sum(0)

    if start is None:
        shape = (1, sample.shape[1], *output_size(sample, size))
        statistics = [{"mean": s.mean((1, 2)), "sd": s.std((1, 2))} for s in sample]
        start = torch.cat([noise_images(shape, seed=seed, **s) for s in statistics])
    optimization = optimize_image(
        loss,
        PixelImage(start),
        steps=steps,
        lr=lr or (1.0 if optimizer == "lbfgs" else 0.02),
        optimizer=optimizer,
        maximize=False,
        frames=frames,
    )
    return Synthesis(**optimization._asdict(), targets=("texture",) * len(sample), sources=sample)


@hookimpl
def phosphene_methods():
    return [gram_texture]
