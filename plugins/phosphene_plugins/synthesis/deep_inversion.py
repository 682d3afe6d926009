"""DeepInversion, Yin et al. 2020: images of classes with the feature statistics of the training images."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import Class, InputError, at_least_float32, hookimpl, load_model, method, optimize
from phosphene.images import noise_images
from phosphene.optimize import (
    FourierImage,
    Optimization,
    PixelImage,
    l2_penalty,
    optimize_image,
    pad_rows,
    total_variation,
)
from phosphene.roles import Frames, Model, Seed, Target
from phosphene.spec import Agrees, Calls, Cost, InvariantTo, ParameterGroup, PixelRange, param, size

from ._activation_maximization import LearningRate, Steps, mean_color
from ._batch_norm_prior import YIN, BatchNormPrior
from ._class_inversions_result import ClassInversions


class InversionOptions(ParameterGroup):
    """The parameters of DeepInversion; a method may change the defaults."""

    statistics: Annotated[
        float, Field(ge=0, description="weight of the distance from the stored feature statistics")
    ] = 0.01
    total_variation: Annotated[float, Field(ge=0, description="weight of the total variation")] = 0.01
    l2: Annotated[
        float, Field(ge=0, description="weight of the penalty ||x - m||^2, m the model's mean color")
    ] = 0.0
    jitter: Annotated[int, Field(ge=0, le=1024, description="largest random shift per step, in pixels")] = 8
    parametrization: Annotated[
        Literal["pixels", "fourier"],
        Field(description="optimized variables: pixels, or a Fourier spectrum with decorrelated colors"),
    ] = "fourier"
    optimizer: Annotated[Literal["adam", "sgd"], Field(description="optimizer of the images")] = "adam"
    steps: Steps = 200
    lr: LearningRate = 0.03
    start_noise: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="standard deviation of the initial noise: images of a class differ by it",
        ),
    ] = 0.02
    batch: Annotated[
        int, Field(ge=1, le=4096, description="images optimized together, whose joint statistics count")
    ] = 32


def first_step_has_its_closed_form() -> None:
    """One gradient step on two batches of a network that is a batch norm and a linear layer."""
    draw = torch.Generator().manual_seed(0)
    norm, linear = nn.BatchNorm2d(3).double(), nn.Linear(12, 3).double()
    for tensor in (norm.running_mean, norm.weight, norm.bias, linear.weight, linear.bias):
        assert tensor is not None
        tensor.data = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
    norm.running_var = torch.rand(3, generator=draw, dtype=torch.float64) + 0.5
    mean, std = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.3, 0.4]], dtype=torch.float64)
    network = nn.Sequential(norm, nn.Flatten(), linear).eval()
    model = load_model(network, input_size=(3, 2, 2), mean=mean.tolist(), std=std.tolist())
    plain: Any = {"parametrization": "pixels", "optimizer": "sgd", "jitter": 0, "steps": 1, "lr": 0.01}
    weights: Any = {"statistics": 0.7, "total_variation": 0.03, "l2": 0.2, "start_noise": 0.05, "batch": 2}
    result = deep_inversion(model, Class((2, 0)), per_class=2, seed=5, **plain, **weights)
    start = torch.cat([noise_images((1, 3, 2, 2), seed=n, mean=mean, sd=0.05).double() for n in range(5, 9)])
    expected, objectives, distances = [], [], []
    assert norm.running_mean is not None and norm.running_var is not None
    for x in start.split(2):
        features = (x - mean[:, None, None]) / std[:, None, None]
        slope = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - slope * norm.running_mean
        outputs = features * slope[:, None, None] + shift[:, None, None]
        logits = outputs.flatten(1) @ linear.weight.T + linear.bias
        probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
        classes = torch.tensor([[0, 0, 1], [1, 0, 0]]).double()
        ascent = ((classes - probabilities) @ linear.weight).view_as(x) * (slope / std)[:, None, None]
        # The distance of the means and of the variances over the 2 x 4 values of each channel.
        u = features.mean((0, 2, 3)) - norm.running_mean
        v = ((features - features.mean((0, 2, 3), keepdim=True)) ** 2).mean((0, 2, 3)) - norm.running_var
        centered = features - features.mean((0, 2, 3), keepdim=True)
        toward = (u / u.norm())[:, None, None] / 8 + (v / v.norm())[:, None, None] * centered / 4
        # Each of the two images has the whole distance in its objective.
        descent = 2 * 0.7 * toward / std[:, None, None] + 0.2 * 2 * (x - mean[:, None, None])
        corner = torch.zeros_like(x)
        right, down = x[..., 0, 1] - x[..., 0, 0], x[..., 1, 0] - x[..., 0, 0]
        corner[..., 0, 1], corner[..., 1, 0], corner[..., 0, 0] = right, down, -right - down
        expected.append(x + 0.01 * (ascent - descent - 0.03 * 2 * corner))
        distances.append(u.norm() + v.norm())
        objectives.append((classes * probabilities).sum(1).log() - 0.7 * distances[-1])
    torch.testing.assert_close(result.images, torch.cat(expected).clamp(0, 1).detach())
    torch.testing.assert_close(result.scores, torch.cat(objectives)[None].detach())
    torch.testing.assert_close(result.distances[:, 0], torch.stack(distances).detach())
    assert result.targets == ("class 2", "class 0") * 2
    final = model(result.images).softmax(1)[torch.arange(4), torch.tensor([2, 0, 2, 0])]
    torch.testing.assert_close(result.probabilities, final.detach())
    features = (result.images[2:] - mean[:, None, None]) / std[:, None, None]
    shifts = features.mean((0, 2, 3)) - norm.running_mean, features.var((0, 2, 3), False) - norm.running_var
    torch.testing.assert_close(result.distances[1, 1], shifts[0].norm() + shifts[1].norm())
    # Shifts, their size and seed, and the parametrization change the image.
    larger = nn.Sequential(norm, nn.Flatten(), nn.Linear(54, 3).double()).eval()
    model = load_model(larger, input_size=(3, 3, 6), mean=mean.tolist(), std=std.tolist())
    plain |= {"start_noise": 1e-9, "steps": 2, "seed": 0}
    variants: list[dict[str, Any]] = [
        {}, {"jitter": 1}, {"jitter": 1, "seed": 1}, {"jitter": 3}, {"parametrization": "fourier"}
    ]  # fmt: skip
    plain |= {"frames": 2, "per_class": 3, "batch": 2}
    results = [deep_inversion(model, Class(1), **plain | variant) for variant in variants]
    for n, result in enumerate(results):
        assert result.frames is not None and result.frames.shape == (2, 3, 3, 3, 6)
        assert result.targets == ("class 1",) * 3
        assert all((result.images - other.images).abs().max() > 1e-6 for other in results[:n])


def inversion_by_adam(calls: Calls) -> Tensor:
    """All images in one batch, by Adam on their pixels."""
    p, model, classes = calls.params, calls.model, torch.tensor([1])
    x = noise_images((1, *model.input_size), seed=p["seed"], mean=model.mean, sd=p["start_noise"])
    x = x.to(model.dtype).requires_grad_()
    prior, optimizer = BatchNormPrior(model), torch.optim.Adam([x], lr=p["lr"])
    for _ in range(p["steps"]):
        down, right = x[..., 1:, :-1] - x[..., :-1, :-1], x[..., :-1, 1:] - x[..., :-1, :-1]
        loss = F.cross_entropy(model(x), classes) + p["statistics"] * prior(x).sum()
        loss = loss + p["total_variation"] * (down.square().sum() + right.square().sum())
        (x.grad,) = torch.autograd.grad(loss, x)
        optimizer.step()
        x.data.clamp_(0, 1)
    return x.detach()


@method(
    family="synthesis",
    title="DeepInversion",
    references=[YIN],
    invariants=[PixelRange()],
    needs=["gradients"],
    cost=Cost(
        forward=size.images * param.per_class * (param.steps + 3),
        backward=size.images * param.per_class * param.steps,
    ),
    batch_independent=False,
    oracle=first_step_has_its_closed_form,
    relations=[
        Agrees(
            inversion_by_adam,
            fields=("images",),
            where={"jitter": 0, "parametrization": "pixels", "per_class": 1},
            networks=("gap",),
        ),
        InvariantTo("logit_shift", fields=("images",), tolerance=1e-6),
    ],
    quick={"steps": 3},
    defaults={"model": "builtin:parts-resnet"},
    demo={"target": ["boat", "fish", "bird", "butterfly", "cat"], "steps": 100},
)
def deep_inversion(
    model: Model,
    target: Target,
    *,
    per_class: Annotated[int, Field(ge=1, le=10_000, description="number of images of each class")] = 1,
    options: InversionOptions = InversionOptions(),
    frames: Frames = 0,
    seed: Seed = None,
) -> ClassInversions:
    """DeepInversion: images of classes whose feature statistics are those of the training images.

    x* = argmin_x mean_i CE(f(x_i), y_i) + statistics R(x) + total_variation TV(x_i) + l2 ||x_i - m||^2

    R(x) = sum_l ||mu_l(x) - m_l||_2 + ||v_l(x) - s_l||_2

    mu_l and v_l are the mean and variance per channel at the input of batch norm l, over the positions and
    the images of a ``batch``; m_l and s_l are the running mean and variance that the layer has stored in its
    training. Without any training image, the result therefore resembles the training images more than the
    classes' optima do: compare ``statistics=0``. R adds up over the layers and their channels: the
    default weight suits the bundled networks and those of ImageNet; a larger one lowers the probabilities of
    the classes. Images of a class differ by the noise that they start
    from.

    Returns:
        ``images`` (N, C, H, W) in [0, 1], ``per_class`` times the classes of the target in their order;
        ``scores`` (steps, N): log p(y_i) - statistics R at every step; ``probabilities`` (N,) of the classes
        at the end; ``distances`` (B, 2), R of each batch at the start and at the end.

    Raises:
        ModelError: a network without batch norm, or whose classes do not exclude each other.
        InputError: a target that is no class.

    Example::
        from phosphene import run

        result = run("deep_inversion", target=["cat", "boat"], steps=3)
        result.images.shape  # (2, 3, 128, 128)

    Source:
        Yin et al. 2020, equations 2 to 4, with a Fourier spectrum for the image (lecture 21.9).
    """
    if not isinstance(target, Class):
        raise InputError(f'DeepInversion draws classes, and {target} is none: for example target="star"')
    classes = (target.index,) if isinstance(target.index, int) else target.index
    labels = torch.tensor(classes * per_class)
    prior = BatchNormPrior(model)
    inversion, distances = invert_classes(model, labels, options, prior, frames=frames, seed=seed)
    with torch.no_grad():
        logits = torch.cat([model(images) for images in inversion.images.split(options.batch)])
    return ClassInversions(
        **inversion._asdict(),
        targets=tuple(map(model.class_name, labels.tolist())),
        probabilities=at_least_float32(logits).softmax(1).gather(1, labels[:, None].to(logits.device))[:, 0],
        distances=distances,
    )


def invert_classes(
    model: Model,
    labels: Tensor,
    options: InversionOptions,
    prior: BatchNormPrior | None,
    *,
    frames: int = 0,
    seed: int | None,
) -> tuple[Optimization, Tensor]:
    """Images of the classes ``labels`` (N,), one batch after another, and the distances of the batches.

    The distances (B, 2) of a batch's statistics from the stored ones are those at the start and at the end;
    (0, 2) without a ``prior``, whose term is then left out.
    """
    center = mean_color(model)
    # Each image has noise of its own: ``noise_images`` draws the same for all images of a call.
    seeds = [None if seed is None else seed + n for n in range(len(labels))]
    shape, sd = (1, *model.input_size), options.start_noise
    start = torch.cat([noise_images(shape, seed=number, mean=center, sd=sd) for number in seeds])
    start = start.to(model.device, model.dtype)
    parametrization = PixelImage if options.parametrization == "pixels" else FourierImage

    def objective(images: Tensor, labels: Tensor) -> Tensor:
        with prior.record() if prior else nullcontext() as tap:
            logits = at_least_float32(model(images))
        likelihoods = -F.cross_entropy(logits, labels, reduction="none")
        if prior is None or tap is None:
            return likelihoods
        return likelihoods - options.statistics * prior.distances(tap, together=True).sum()

    def penalty(images: Tensor) -> Tensor:
        variation = options.total_variation * total_variation(images)
        return variation + options.l2 * l2_penalty(images, center)

    inversions, distances = [], [start.new_zeros(0, 2)]
    for images, classes in zip(start.split(options.batch), labels.split(options.batch), strict=True):
        inversion = optimize_image(
            partial(objective, labels=classes.to(model.device)),
            parametrization(images),
            steps=options.steps,
            lr=options.lr,
            optimizer=options.optimizer,
            regularizer=penalty,
            transform=partial(optimize.jitter, pixels=options.jitter) if options.jitter else None,
            frames=frames,
            seed=seed,
        )
        inversions.append(inversion)
        if prior is not None:
            with torch.no_grad():
                ends = [prior(x, together=True).sum() for x in (images, inversion.images)]
            distances.append(torch.stack(ends)[None])
    recorded = [inversion.frames for inversion in inversions if inversion.frames is not None]
    return Optimization(
        images=torch.cat([inversion.images for inversion in inversions]),
        scores=torch.cat(pad_rows([inversion.scores for inversion in inversions]), 1),
        frames=torch.cat(pad_rows(recorded), 1) if recorded else None,
    ), torch.cat([part.to(distances[-1]) for part in distances])


@hookimpl
def phosphene_methods():
    return [deep_inversion]
