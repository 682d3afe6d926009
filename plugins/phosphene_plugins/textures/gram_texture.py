"""Texture synthesis by feature statistics: Gram matrices (Gatys et al.) or sliced Wasserstein distances."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import Generator, Tensor

from phosphene import InputError, Reference, hookimpl, load_model, method
from phosphene.images import noise_images
from phosphene.optimize import Optimization, PixelImage, concatenate_stages, gram_matrix, optimize_image
from phosphene.results import Synthesis
from phosphene.roles import Frames, LayerName, Model, Seed, Start, Texture
from phosphene.spec import Cost, PixelRange, ceil, param, size

from ._periodic_features import feature_maps
from ._texture_samples import Periodic, Size, output_size

#: Steps after which the sliced Wasserstein loss draws new directions.
REDRAW_STEPS = 20


def gram_energy(gram: Tensor, target: Tensor) -> Tensor:
    """E_l = 1/(4 N_l^2) sum_cc' (G_cc' - Ĝ_cc')^2 of Gram matrices divided by their own M_l: (N,)."""
    # equivalent mutants: Gram matrices are square
    return (gram - target).square().sum((1, 2)) / (4 * target.shape[-1] ** 2)


def sorted_projections(features: Tensor, directions: Tensor) -> Tensor:
    """The projections <v, F_p> on directions (K, C), sorted over positions p of (N, C, h, w): (N, K, h w)."""
    return torch.einsum("kc,ncp->nkp", directions.to(features), features.flatten(2)).sort(2).values


def sliced_energy(projections: Tensor, target: Tensor) -> Tensor:
    """The mean squared difference of sorted projections (N, K, M) and (N or 1, K, M'): (N,).

    It is the squared Wasserstein distance of each pair of projections for M = M', averaged over directions;
    otherwise the target's quantiles at the ranks (i + 1/2) / M are compared.
    """
    ranks = torch.arange(projections.shape[2], device=target.device) + 0.5
    ranks = (ranks * (target.shape[2] / projections.shape[2])).long()
    return (projections - target[:, :, ranks]).square().mean((1, 2))


def draw_directions(channels: Sequence[int], seed: int) -> list[Tensor]:
    """For each layer of C channels, C random unit vectors (C, C)."""
    generator = Generator().manual_seed(seed)
    drawn = [torch.randn(c, c, dtype=torch.float64, generator=generator) for c in channels]
    return [vectors / vectors.norm(dim=1, keepdim=True) for vectors in drawn]


class TextureLoss:
    """L(I) = sum_l w_l E_l of images: their features' Gram matrices against those of samples (N, C, H, W).

    With ``direction_seed``, their features' distributions along random directions instead.
    """

    def __init__(
        self,
        model: Model,
        sample: Tensor,
        layers: Sequence[str],
        weights: Sequence[float] | None,
        normalization: str,
        periodic: bool,
        direction_seed: int | None,
    ) -> None:
        self.model, self.layers, self.periodic = model, layers, periodic
        with torch.no_grad():
            features = feature_maps(model, sample, layers, periodic=False)
        self.directions: list[Tensor] | None = None
        if direction_seed is not None:
            self.directions = draw_directions([maps.shape[1] for maps in features], direction_seed)
        self.energy = gram_energy if self.directions is None else sliced_energy
        self.targets = self.statistics(features)
        self.scales: list[float | Tensor]
        if normalization == "gatys":
            self.scales = list(weights or [1.0] * len(layers))
        else:
            energies = [self.energy(torch.zeros_like(t), t).clamp(min=1e-30) for t in self.targets]
            layer_weights = weights or [3.0**-depth for depth in range(len(layers))]
            self.scales = [w / e for w, e in zip(layer_weights, energies, strict=True)]

    def statistics(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The Gram matrix or the sorted projections of each layer's maps (N, C, h, w)."""
        if self.directions is None:
            return [gram_matrix(maps) for maps in features]
        return [sorted_projections(maps, d) for maps, d in zip(features, self.directions, strict=True)]

    def __call__(self, images: Tensor) -> Tensor:
        features = feature_maps(self.model, images, self.layers, periodic=self.periodic)
        terms = zip(self.scales, self.statistics(features), self.targets, strict=True)
        return torch.stack([scale * self.energy(values, target) for scale, values, target in terms]).sum(0)


def sliced_distances_have_a_closed_form() -> None:
    """Sorted values against each other, quantiles of unequal counts, unit directions; the first loss."""
    first, second = (torch.tensor(v, dtype=torch.float64).view(1, 1, 1, -1) for v in ((3, 1, 2), (5, 2, 2)))
    one = torch.ones(1, 1, dtype=torch.float64)
    projections = [sorted_projections(values, one) for values in (first, second, first.repeat(1, 1, 1, 2))]
    assert sliced_energy(projections[0], projections[1]).tolist() == [(1 + 0 + 4) / 3]
    assert sliced_energy(projections[2], projections[0]).tolist() == [0]
    assert sliced_energy(projections[0], projections[2]).tolist() == [0]
    tested: Any = gram_texture
    mean, std = torch.tensor((0.25, 0.5)), torch.tensor((0.5, 0.75))
    pixels = torch.nn.Conv2d(2, 2, 1, bias=False).double()
    pixels.weight.data = torch.eye(2, dtype=torch.float64)[:, :, None, None]
    model = load_model(torch.nn.Sequential(pixels), input_size=(2, 8, 9), mean=(0.25, 0.5), std=(0.5, 0.75))
    sample, start = torch.rand(2, 2, 2, 8, 9, dtype=torch.float64, generator=Generator().manual_seed(1))
    options: Any = {"layers": ["0"], "statistics": "sliced_wasserstein", "seed": 3}
    result = tested(model, sample, start, steps=21, **options)
    paper = tested(model, sample, start, steps=1, normalization="gatys", weights=[2.0], **options)
    drawn = torch.randn(2, 2, dtype=torch.float64, generator=Generator().manual_seed(3))
    drawn = drawn / drawn.norm(dim=1, keepdim=True)
    for n in range(2):
        rows = [
            ((images[n] - mean[:, None, None]) / std[:, None, None]).flatten(1) for images in (start, sample)
        ]
        distance = energy = 0.0
        for direction in drawn:
            x, y = ((direction[:, None] * r).sum(0).sort().values for r in rows)
            distance += float((x - y).square().mean()) / 2
            energy += float(y.square().mean()) / 2
        assert abs(float(result.scores[0, n]) - distance / energy) < 1e-9, "the first loss differs"
        assert abs(float(paper.scores[0, n]) - 2 * distance) < 1e-9, "the loss without normalization differs"
    earlier = tested(model, sample, start, steps=20, **options)
    continued = tested(model, sample, earlier.images, steps=1, **options | {"seed": 3 + 20})
    assert torch.equal(continued.images, result.images), "new directions are not drawn after 20 steps"


def images_are_periodic_and_samples_end() -> None:
    """Features = sums over 3 x 3: of a periodic image also across its edges, of the sample with zeros."""
    tested: Any = gram_texture
    box = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    torch.nn.init.ones_(box.weight)
    model = load_model(torch.nn.Sequential(box), input_size=(1, 8, 8))
    sample, start = torch.rand(2, 1, 1, 6, 8, dtype=torch.float64, generator=Generator().manual_seed(0))
    for periodic in (False, True):
        options: Any = {"layers": ["0"], "normalization": "gatys", "steps": 1, "periodic": periodic}
        grams = []
        for image, mode in ((sample, "constant"), (start, "circular" if periodic else "constant")):
            padded = torch.nn.functional.pad(image, (1, 1, 1, 1), mode)
            sums = padded.unfold(2, 3, 1).unfold(3, 3, 1).sum((4, 5))
            grams.append(sums.square().mean())
        expected = (grams[1] - grams[0]).square() / 4
        result = tested(model, sample, start, **options)
        assert abs(float(result.scores[0, 0] - expected)) < 1e-9, f"the loss of periodic={periodic} differs"


def periodic_features_have_no_border() -> None:
    """Means over 11 x 11 pixels across the edges, at strides 1 and 4, of half an image more at each edge."""
    pools = torch.nn.AvgPool2d(11, 1, 5), torch.nn.AvgPool2d(4)
    model = load_model(torch.nn.Sequential(*pools), input_size=(3, 24, 16), mean=[0] * 3, std=[1] * 3)
    sizes = []
    handle = model.module.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[2:]))
    # At each edge 8 or 12, multiples of 4, of which half an image is no more.
    for sides, larger in (((12, 20), (28, 44)), ((14, 11), (30, 27))):
        images = torch.rand(2, 3, *sides, generator=Generator().manual_seed(1))
        continued = F.avg_pool2d(F.pad(images, (5, 5, 5, 5), mode="circular"), 11, 1)
        fine, coarse = feature_maps(model, images, ["0", "1"], periodic=True)
        assert sizes[-1] == larger, "not half an image more at each edge, in steps of the coarsest stride"
        assert fine.shape == images.shape and (fine - continued).abs().max() < 1e-6
        assert coarse.shape[2:] == (round(sides[0] / 4), round(sides[1] / 4))
        if sides == (12, 20):
            assert (coarse - F.avg_pool2d(continued, 4)).abs().max() < 1e-6
        (bordered,) = feature_maps(model, images, ["0"], periodic=False)
        assert (bordered - F.avg_pool2d(images, 11, 1, 5)).abs().max() < 1e-6
    (row,) = feature_maps(model, images[:, :, :1], ["1"], periodic=True)
    assert row.shape[2:] == (1, 3), "an image of less than a stride has no position"
    handle.remove()


def pixels_as_features_have_a_closed_form() -> None:
    """Features = normalized pixels, and their means over 2 x 2: the loss of the first images by hand."""
    periodic_features_have_no_border()
    sliced_distances_have_a_closed_form()
    images_are_periodic_and_samples_end()
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
        ),
        Reference(
            key="heitz2021",
            title="A Sliced Wasserstein Loss for Neural Texture Synthesis",
            authors="Heitz, Vanhoey, Chambon, Belcour",
            year=2021,
            url="https://arxiv.org/abs/2006.07229",
        ),
    ],
    invariants=[PixelRange()],
    needs=["gradients"],
    # L-BFGS evaluates the loss once or twice per step.
    # A periodic image is evaluated with half an image at each edge.
    cost=Cost(
        forward=size.images
        * (2 * param.steps + 2 + ceil(param.steps / REDRAW_STEPS))
        * (1 + 3 * param.periodic),
        backward=size.images * (2 * param.steps + 1) * (1 + 3 * param.periodic),
    ),
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
        list[LayerName] | None, Field(description="layers l of the statistics; default: every stage")
    ] = None,
    weights: Annotated[
        list[NonNegativeFloat] | None,
        Field(description="w_l: weight of each layer; default: 3^-l for relative, 1 for gatys"),
    ] = None,
    statistics: Annotated[
        Literal["gram", "sliced_wasserstein"],
        Field(
            description="statistics of the features: Gram matrices, or distributions by sliced Wasserstein"
        ),
    ] = "gram",
    normalization: Annotated[
        Literal["relative", "gatys"],
        Field(description="scale of E_l: relative to the energy of zero features, or as in the paper"),
    ] = "relative",
    steps: Annotated[int, Field(ge=1, le=100_000, description="number of optimization steps")] = 100,
    size: Size = None,
    periodic: Periodic = False,
    optimizer: Annotated[
        Literal["lbfgs", "adam"], Field(description="optimizer; lbfgs reaches lower losses")
    ] = "lbfgs",
    lr: Annotated[
        float | None, Field(gt=0, le=1000, description="step length; default: 1 for lbfgs, 0.02 for adam")
    ] = None,
    frames: Frames = 0,
    seed: Seed = None,
) -> Synthesis:
    """Texture synthesis by Gram matrices (Gatys et al.): noise optimized to a sample's correlations.

    L(I) = sum_l w_l E_l,  E_l = 1/(4 N_l^2 M_l^2) sum_cc' (G_cc' - Ĝ_cc')^2,  G = F F^T

    with F the layer's N_l feature maps at their M_l positions; where the sizes of image and sample differ,
    each Gram matrix is divided by its own M. ``statistics`` "sliced_wasserstein" compares distributions
    instead of correlations (Heitz et al.):

    E_l = mean_v 1/M_l |sort(v . F) - sort(v . F̂)|^2

    over N_l random unit vectors v, drawn anew every 20 steps; for another size, with the sample's quantiles.

    ``normalization`` "gatys" is that E_l, with w_l = 1 by default; "relative" divides it by the E_l of zero
    features, so that the scale of features does not matter, and w_l is 3^-l by default: deeper layers,
    whose losses fall slowly, would otherwise delay the finer ones. In other conventions: Gram matrices also
    divided by N_l (Johnson et al. 2016) give 4 E_l as the sum of their squared differences, and 4 E_l / N_l^2
    as their mean.

    ``layers`` default to the first activation at each resolution (relu1_1 ... relu5_1 of a VGG). The initial
    noise has the sample's mean and standard deviation in each channel; ``start`` (N, C, H, W) replaces it.
    A ``periodic`` image is evaluated with half of itself beyond each edge, at four times the cost; it can be
    tiled without seams where receptive fields are no larger than the image.

    Returns:
        ``images`` (N, C, H', W') of that ``size``, ``scores`` (steps, N) the loss L at each step,
        ``sources`` (N, C, H, W) the samples, ``frames`` (F, N, C, H', W').

    Raises:
        InputError: weights that do not fit the layers.

    Example::
        from phosphene import run

        result = run("gram_texture", sample="builtin:pebbles", size=32, steps=2, seed=0)
        result.images.shape  # (1, 3, 32, 32)

    Source: Gatys et al. 2015, sections 3 and 4; Heitz et al. 2021, section 3.
    """
    layers = list(model.stages) if layers is None else layers
    if not layers or (weights is not None and len(weights) != len(layers)):
        raise InputError(f"gram_texture needs one weight per layer: {len(layers)} layers, weights: {weights}")

    if start is None:
        shape = (1, sample.shape[1], *output_size(sample, size))
        colors = [{"mean": s.mean((1, 2)), "sd": s.std((1, 2))} for s in sample]
        start = torch.cat([noise_images(shape, seed=seed, **c) for c in colors])
    stages: list[Optimization] = []
    for done in range(0, steps, steps if statistics == "gram" else REDRAW_STEPS):
        directions = None if statistics == "gram" else (seed or 0) + done
        end = steps if statistics == "gram" else min(steps, done + REDRAW_STEPS)
        stages.append(
            optimize_image(
                TextureLoss(model, sample, layers, weights, normalization, periodic, directions),
                PixelImage(stages[-1].images if stages else start),
                steps=end - done,
                lr=lr or (1.0 if optimizer == "lbfgs" else 0.02),
                optimizer=optimizer,
                maximize=False,
                frames=frames * end // steps - frames * done // steps,
            )
        )
    optimization = concatenate_stages(stages)
    return Synthesis(**optimization._asdict(), targets=("texture",) * len(sample), sources=sample)


@hookimpl
def phosphene_methods():
    return [gram_texture]
