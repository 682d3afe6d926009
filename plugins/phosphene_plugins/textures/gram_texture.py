"""Texture synthesis by Gram matrices (Gatys et al.): noise optimised to a sample's feature correlations."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

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
    """Features = normalized pixels, and their means over 2 x 2: the loss of the first images by hand."""
    tested: Any = gram_texture  # its result has every field here
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ((0.25, 0.5), (0.5, 0.75)))
    pixels = torch.nn.Conv2d(2, 2, 1, bias=False).double()
    pixels.weight.data = torch.eye(2, dtype=torch.float64)[:, :, None, None]
    network = torch.nn.Sequential(pixels, torch.nn.AvgPool2d(2))
    model = load_model(network, input_size=(2, 10, 12), mean=(0.25, 0.5), std=(0.5, 0.75))
    sample = torch.rand(2, 2, 10, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gram(images: Tensor, side: int) -> Tensor:
        features = torch.nn.functional.avg_pool2d((images - mean) / std, side).flatten(2)
        return features @ features.mT / features.shape[2]

    noise = [noise_images((1, 2, 8, 10), seed=1, mean=s.mean((1, 2)), sd=s.std((1, 2))) for s in sample]
    starts = torch.cat(noise), sample[:, :, :8, :10]
    defaults = tested(model, sample, size=(8, 10), steps=60, frames=3, seed=1)
    paper = tested(model, sample, starts[1], layers=["0", "1"], normalization="gatys", steps=2, seed=1)
    weighted = tested(model, sample, starts[1], layers=["1"], weights=[5], steps=2, seed=1)
    for result, start, weights in (
        (defaults, starts[0], {1: 1, 2: 1 / 3}),
        (paper, starts[1], {1: 1, 2: 1}),
        (weighted, starts[1], {2: 5}),
    ):
        loss = torch.zeros(2, dtype=torch.float64)
        for side, weight in weights.items():
            target = gram(sample, side)
            scale = 16 if result is paper else target.square().sum((1, 2))  # 4 N^2, or relative
            loss += weight * (gram(start, side) - target).square().sum((1, 2)) / scale
        assert (result.scores[0] - loss).abs().max() < 1e-12, "the first loss is not that of the first images"
        assert torch.equal(result.sources, sample)
    assert (gram(defaults.images, 1) - gram(sample, 1)).abs().max() < 1e-4, "Gram matrices differ"
    assert len(defaults.frames) == 3 and (defaults.frames[-1] / 255 - defaults.images).abs().max() < 0.01
    for optimizer, lr in (("lbfgs", 1.0), ("adam", 0.02), ("adam", 0.05)):
        options: Any = {"optimizer": optimizer, "steps": 3, "lr": lr}
        result = tested(model, sample, starts[1], **options)
        default = tested(model, sample, starts[1], **options | {"lr": None})
        assert torch.equal(result.images, default.images) == (lr != 0.05), "the default step length differs"


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
    layers = list(model.stages) if layers is None else layers
    if not layers or (weights is not None and len(weights) != len(layers)):
        raise InputError(f"gram_texture needs one weight per layer: {len(layers)} layers, weights: {weights}")
    with torch.no_grad():
        target_grams = _gram_matrices(model, sample, layers)
    scales: list[float | Tensor]
    if normalization == "gatys":
        scales = list(weights or [1.0] * len(layers))
    else:
        zero_energies = [gram_energy(torch.zeros_like(g), g).clamp(min=1e-30) for g in target_grams]
        layer_weights = weights or [3.0**-depth for depth in range(len(layers))]
        scales = [w / e for w, e in zip(layer_weights, zero_energies, strict=True)]

    def loss(images: Tensor) -> Tensor:
        """L(I): (N,)."""
        terms = zip(scales, _gram_matrices(model, images, layers), target_grams, strict=True)
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


def _gram_matrices(model: Model, images: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """Gram matrices (N, C, C) of the maps of every layer."""
    features = zip(model.features_of(images, layers), layers, strict=True)
    return [gram_matrix(model.maps(values, images, layer)) for values, layer in features]


@hookimpl
def phosphene_methods():
    return [gram_texture]
