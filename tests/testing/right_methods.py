"""Correct methods, each of a kind that a careless check would fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from wrong_methods import (
    SOURCE,
    _linear,
    adversarial_examples,
    attribution,
    gradient,
    gradient_sign_step,
    train_brightness,
)

from phosphene import (
    InputError,
    Method,
    ModelError,
    batch_size,
    guided,
    method,
    progress_bar,
    rewrite_backward,
    scores,
    unit_centers,
)
from phosphene.results import (
    AdversarialExamples,
    Attribution,
    FilterBank,
    Panel,
    Result,
    Synthesis,
    TrainedNetwork,
)
from phosphene.roles import Dataset, Images, Labels, LayerName, Model, Seed, Target, Texture
from phosphene.spec import (
    Cost,
    Invariant,
    MapPerPixel,
    Nonnegative,
    PixelRange,
    UnitRange,
    WithinBall,
    param,
    size,
)

RIGHT: list[Method[Any, Any]] = []


def right(**spec: Any) -> Any:
    def register(function: Any) -> Method[Any, Any]:
        declared = {
            "family": "right",
            "references": [SOURCE],
            "cost": Cost(forward=size.images, backward=size.images),
        }
        registered = method(**(declared | spec))(function)
        RIGHT.append(registered)
        return registered

    return register


@right(needs=["gradients"], invariants=[MapPerPixel(), Nonnegative()])
def plain_gradient(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient magnitude, which is 0 where the score does not depend on the pixel."""
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@right(
    needs=["gradients"],
    cost=Cost(forward=size.images * param.samples, backward=size.images * param.samples),
    quick={"samples": 3},
)
def seeded_noise(
    model: Model, images: Images, target: Target = None, *,
    samples: Annotated[int, Field(ge=1, le=1000, description="number of noisy copies")] = 20,
    sigma: Annotated[float, Field(ge=0, le=1, description="standard deviation of the noise")] = 0.1,
    seed: Seed = None,
) -> Attribution:  # fmt: skip
    """Mean gradient of noisy copies, with the same noise for every image."""
    generator, total = torch.Generator().manual_seed(seed or 0), torch.zeros_like(images)
    for _ in progress_bar(range(samples), "noisy copies"):
        noise = torch.randn(1, *images.shape[1:], generator=generator, dtype=torch.float64).to(images)
        total = total + gradient(model, images + sigma * noise, target)
    return attribution(model, images, (total / samples).abs().amax(1), target)


@right(needs=["gradients"],
       invariants=[WithinBall(radius="eps", norm="norm"), PixelRange(field="adversarial")],
       cost=Cost(forward=3 * size.images, backward=size.images))  # fmt: skip
def one_step(
    model: Model, images: Images, labels: Labels, *,
    eps: Annotated[float, Field(ge=0, le=1, description="radius")] = 0.03,
    norm: Annotated[Literal["linf"], Field(description="norm of the ball")] = "linf",
) -> AdversarialExamples:  # fmt: skip
    """Gradient sign step to the boundary of the ball, rounding included."""
    adversarial = gradient_sign_step(model, images, labels, eps * (1 - 1e-6))
    return adversarial_examples(model, images, adversarial, labels)


@right(needs=["gradients", "relu"])
def guided_gradient(model: Model, images: Images, target: Target = None) -> Attribution:
    """Guided gradient; networks without ReLUs are refused."""
    with rewrite_backward(guided):
        maps = gradient(model, images, target).abs().amax(1)
    return attribution(model, images, maps, target)


@right(cost=Cost(forward=size.images))
def mean_activation(
    model: Model, images: Images, *,
    layer: Annotated[LayerName | None, Field(description="layer (default: the last feature map)")] = None,
) -> Attribution:  # fmt: skip
    """Mean over the channels of a layer of any layout."""
    layer = layer or model.last_map
    maps = model.maps(model.features(images, layer), images).mean(1)
    centers = unit_centers(model, layer, images.shape[2:])
    return Attribution(images=images, maps=maps, targets=("mean",) * len(images), centers=centers)


@right(needs=["gradients"])
def transformers_only(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient magnitude of transformers; other networks are refused."""
    if not hasattr(model.module, "class_token"):
        raise ModelError(f"{model.name} has no class token, which this method needs; use a transformer")
    return attribution(model, images, gradient(model, images, target).abs().amax(1), target)


@right(needs=["gradients"])
def views_images_flat(model: Model, images: Images, target: Target = None) -> Attribution:
    """Images are viewed as vectors, which requires contiguous memory."""
    brightest = images.view(len(images), -1).amax(1)[:, None, None]
    return attribution(model, images, brightest * gradient(model, images, target).abs().amax(1), target)


@right(cost=None, invariants=[UnitRange(when=param.normalize.is_true())])
def mean_color(
    images: Images, *, normalize: Annotated[bool, Field(description="scale to [0, 1]")] = True
) -> Attribution:
    """Mean over the color channels, without a model."""
    maps = images.mean(1)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    if normalize:
        maps = torch.where(high > low, (maps - low) / (high - low).clamp(min=1e-12), torch.zeros_like(maps))
    return Attribution(images=images, maps=maps, targets=("mean",) * len(images))


@right(cost=Cost(forward=0))
def first_layer_weights(model: Model) -> FilterBank:
    """First-layer filters; networks without a convolution are refused."""
    for name, layer in model.layers.items():
        if isinstance(layer, torch.nn.Conv2d) and layer.weight.shape[1] in (1, 3):
            kernels = layer.weight.detach().clone()
            low, high = kernels.amin((1, 2, 3), keepdim=True), kernels.amax((1, 2, 3), keepdim=True)
            tiles = ((kernels - low) / (high - low)).expand(-1, 3, -1, -1).contiguous()
            captions = tuple(str(n) for n in range(len(tiles)))
            return FilterBank(layer=name, weights=kernels, tiles=tiles, captions=captions)
    raise InputError(f"{model.name} has no convolution of color channels, whose weights could be displayed")


@right(needs=["dataset"], cost=Cost(forward=size.dataset))
def data_set_mean(model: Model, dataset: Dataset) -> Synthesis:
    """Mean image of a data set of any size, read in batches."""
    total, confidence = None, []
    for batch in progress_bar(dataset.batches(batch_size(model)), "reading"):
        images = batch.images.to(model.device, model.dtype)
        confidence += [model(images).softmax(1).amax(1)]
        for image in images:  # one by one: the rounding of a sum over batches would depend on their size
            total = image.double() if total is None else total + image.double()
    assert total is not None
    mean = (total / len(dataset)).to(model.dtype)
    return Synthesis(images=mean[None], scores=torch.cat(confidence).mean()[None, None], targets=("mean",))


@right(cost=None, batch_independent=False, needs=["gradients"])
def subtracts_the_batch_mean(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient minus the mean over the batch, declared as dependent on the batch."""
    pixel_gradients = gradient(model, images, target)
    return attribution(
        model, images, (pixel_gradients - pixel_gradients.mean(0, keepdim=True)).abs().amax(1), target
    )


@right(cost=None, quick={"steps": 2})
def smoothed_texture(
    sample: Texture, *, steps: Annotated[int, Field(ge=1, le=500, description="number of blurs")] = 50
) -> Synthesis:
    """Sample blurred in many small steps."""
    images = sample
    for _ in progress_bar(range(steps), "blurring"):
        images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)
    scores = images.flatten(1).std(1)[None]
    return Synthesis(images=images, scores=scores, targets=("blurred",) * len(images), sources=sample)


class SumsToScore(Invariant):
    """The values of each map sum to the change of the score."""

    kind: Literal["sums_to_score"] = "sums_to_score"

    def check(self, inputs: Mapping[str, Any], params: Mapping[str, Any], result: Any) -> None:
        total = result.maps.sum((1, 2))
        torch.testing.assert_close(total, result.change, rtol=1e-3, atol=1e-4)


@dataclass(frozen=True, eq=False, kw_only=True)
class CompleteAttribution(Result):
    """A result type that a plugin defines."""

    per_image: ClassVar[tuple[str, ...]] = ("maps", "change")

    maps: Tensor
    change: Tensor

    def panels(self) -> list[list[Panel]]:
        return [[Panel(m / m.abs().max().clamp(min=1e-12) / 2 + 0.5, "map")] for m in self.maps[:, None]]


@right(invariants=[SumsToScore()], cost=Cost(forward=2 * size.images))
def own_result_and_invariant(model: Model, images: Images, target: Target = None) -> CompleteAttribution:
    """A method with its own result type and invariant."""
    from phosphene import scores

    change = scores(model, images, target) - scores(model, images * 0, target)
    area = images.shape[2] * images.shape[3]
    ramp = torch.linspace(0, 2, area).to(images).view(1, *images.shape[2:]) / area
    return CompleteAttribution(maps=change[:, None, None] * ramp, change=change)


# --- methods that deviate from what checks usually see ---------------------------------------------


@right(needs=["gradients"])
def difference_of_two_logits(model: Model, images: Images) -> Attribution:
    """Gradient of the difference of two logits; networks with another number of classes are refused."""
    if model.class_count != 2:
        raise ModelError(f"{model.name} has {model.class_count} classes, and this method explains two")
    pixels = images.detach().requires_grad_()
    logits = model(pixels)
    (pixel_gradients,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), pixels)
    return Attribution(images=images, maps=pixel_gradients.abs().amax(1), targets=("1 - 0",) * len(images))


@right(cost=None, quick={"window": 13})
def occlusion_with_odd_windows(
    model: Model, images: Images, target: Target = None, *,
    window: Annotated[Literal[5, 9, 13], Field(description="side of the window")] = 9,
) -> Attribution:  # fmt: skip
    """Drop of the score behind a grey window, at the windows' centers; the last windows overlap the edge."""
    height, width = images.shape[2:]
    with torch.no_grad():
        base = scores(model, images, target)
        rows, columns = range(0, height, window // 2), range(0, width, window // 2)
        maps = images.new_zeros(len(images), len(rows), len(columns))
        for i in progress_bar(range(len(rows)), "windows"):
            for j, left in enumerate(columns):
                covered = images.clone()
                top, bottom = max(0, rows[i] - window // 2), rows[i] + window // 2 + 1
                covered[:, :, top:bottom, max(0, left - window // 2) : left + window // 2 + 1] = 0.5
                maps[:, i, j] = base - scores(model, covered, target)
    return attribution(model, images, maps, target)


@right(needs=["gradients"])
def gradient_with_a_mode(
    model: Model, images: Images, target: Target = None, *,
    mode: Annotated[Literal["plain", "power"], Field(description="how magnitudes are scaled")] = "plain",
    power: Annotated[float, Field(gt=0, le=4, description="exponent of mode power")] = 2.0,
) -> Attribution:  # fmt: skip
    """Gradient magnitude; one parameter matters under one value of the other."""
    maps = gradient(model, images, target).abs().amax(1)
    return attribution(model, images, maps**power if mode == "power" else maps, target)


@right(needs=["gradients"])
def gradient_in_chunks(
    model: Model, images: Images, target: Target = None, *,
    chunk_size: Annotated[int, Field(ge=1, le=64, description="images in one pass")] = 8,
) -> Attribution:  # fmt: skip
    """Gradient magnitude, a chunk of images at a time: a parameter that changes the work only."""
    chunks = [slice(start, start + chunk_size) for start in range(0, len(images), chunk_size)]
    rows = [range(len(images))[chunk] for chunk in chunks]
    maps = [gradient(model, images[c], target.select(r)) for c, r in zip(chunks, rows, strict=True)]
    return attribution(model, images, torch.cat(maps).abs().amax(1), target)


ATTACK: dict[str, Any] = {
    "invariants": [PixelRange(field="adversarial")],
    "cost": Cost(forward=size.images * (param.steps + 2), backward=size.images * param.steps),
    "quick": {"steps": 4},
}
Steps = Annotated[int, Field(ge=1, le=200, description="largest number of steps")]


@right(**(ATTACK | {"cost": Cost(forward=size.images * (param.steps + 3))}))
def fades_to_grey(model: Model, images: Images, labels: Labels, *, steps: Steps = 100) -> AdversarialExamples:
    """Decision-based attack: the least share of grey at which the prediction changes, or the image itself."""
    adversarial = images.clone()
    with torch.no_grad():
        remaining = model(images).argmax(1).eq(labels)
        for step in progress_bar(range(steps), "shares"):
            share = (step + 1) / steps
            faded = images + share * (1 - images.round() - images)
            fooled = model(faded).argmax(1).ne(labels) & remaining
            adversarial[fooled], remaining = faded[fooled], remaining & ~fooled
    return adversarial_examples(model, images, adversarial, labels)


@right(needs=["gradients"], **ATTACK)
def stops_at_the_first_success(
    model: Model, images: Images, labels: Labels, *, steps: Steps = 40,
    step_size: Annotated[float, Field(gt=0, le=1, description="length of a step")] = 0.02,
) -> AdversarialExamples:  # fmt: skip
    """Gradient sign steps of each image until its prediction is wrong; no radius."""
    adversarial = images.clone()
    for _ in progress_bar(range(steps), "steps"):
        points = adversarial.detach().requires_grad_()
        logits = model(points)
        active = logits.argmax(1).eq(labels)
        if not active.any():
            break
        loss = F.cross_entropy(logits, labels, reduction="sum")
        (pixel_gradients,) = torch.autograd.grad(loss, points)
        stepped = (adversarial + step_size * pixel_gradients.sign()).clamp(0, 1)
        adversarial = torch.where(active[:, None, None, None], stepped, adversarial)
    return adversarial_examples(model, images, adversarial, labels)


@dataclass(frozen=True, eq=False, kw_only=True)
class Perturbation(Result):
    """One perturbation for many images."""

    perturbation: Tensor
    rate: float

    def panels(self) -> list[list[Panel]]:
        return [[Panel(0.5 + 0.5 * self.perturbation / self.perturbation.abs().max().clamp(min=1e-9))]]


@right(needs=["gradients", "dataset"], cost=Cost(forward=2 * size.dataset, backward=size.dataset))
def universal_sign(
    model: Model, dataset: Dataset, *, eps: Annotated[float, Field(gt=0, le=1, description="radius")] = 0.1
) -> Perturbation:
    """The sign of the summed gradient over a data set, and the rate of predictions that it changes."""
    total, changed = None, 0
    batches = [b.images.to(model.device, model.dtype) for b in dataset.batches(batch_size(model))]
    for images in batches:
        points = images.clone().requires_grad_()
        (pixel_gradients,) = torch.autograd.grad(model(points).amax(1).sum(), points)
        for image in pixel_gradients:
            total = image.double() if total is None else total + image.double()
    assert total is not None
    perturbation = (-eps * total.sign()).to(model.dtype)
    with torch.no_grad():
        for images in batches:
            changed += int((images + perturbation).clamp(0, 1).mean((1, 2, 3)).gt(0.5).sum())
            model(images)
    return Perturbation(perturbation=perturbation, rate=changed / len(dataset))


@right(needs=["gradients"], cost=None, quick={"steps": 3}, invariants=[PixelRange(field="images")])
def ascends_in_logit_space(
    model: Model, target: Target, *, steps: Steps = 30,
    lr: Annotated[float, Field(gt=0, le=10, description="learning rate")] = 1.0, seed: Seed = None,
) -> Synthesis:  # fmt: skip
    """Gradient ascent of a class score over the logits of the pixels."""
    channels, height, width = model.input_size
    count = (
        len(target.names(model, 1))
        if not hasattr(target, "index")
        else len(torch.as_tensor(target.index).view(-1))
    )
    generator = torch.Generator().manual_seed(seed or 0)
    start = 0.1 * torch.randn(1, channels, height, width, generator=generator, dtype=torch.float64)
    start = start.to(model.device, model.dtype)
    pixels, objective = start.expand(count, -1, -1, -1).clone().requires_grad_(), []
    for _ in progress_bar(range(steps), "ascent"):
        value = scores(model, pixels.sigmoid(), target)
        (pixel_gradients,) = torch.autograd.grad(value.sum(), pixels)
        norm = pixel_gradients.flatten(1).norm(dim=1).clamp(min=1e-6)[:, None, None, None]
        pixels = (pixels + lr * 10 * pixel_gradients / norm).detach().requires_grad_()
        objective.append(value.detach())
    names = target.names(model, count)
    return Synthesis(images=pixels.detach().sigmoid(), scores=torch.stack(objective), targets=tuple(names))


@right(cost=None, needs=["training"], network=_linear, batch_independent=False)
def trains_for_one_step(dataset: Dataset, *, seed: Seed = None) -> TrainedNetwork:
    """Linear regression with a single step."""
    return train_brightness(dataset, 1, 1.0, True, "right.trains_for_one_step")


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassTable(Result):
    """How many images have each predicted class."""

    counts: Tensor
    most: tuple[int, ...]

    def panels(self) -> list[list[Panel]]:
        bars = self.counts.float() / self.counts.max().clamp(min=1)
        rows = torch.arange(64).flip(0)[:, None].to(bars) / 64
        return [[Panel((rows < bars.repeat_interleave(16)).float()[None], "counts")]]


@right(needs=["dataset"], cost=Cost(forward=size.dataset))
def class_table(
    model: Model, dataset: Dataset, *,
    k: Annotated[int, Field(ge=1, le=100, description="number of classes to name")] = 3,
) -> ClassTable:  # fmt: skip
    """Predicted classes of a data set as a table; k may exceed the number of classes."""
    counts = torch.zeros(model.class_count, dtype=torch.long, device=model.device)
    for batch in progress_bar(dataset.batches(batch_size(model)), "reading"):
        predicted = model(batch.images.to(model.device, model.dtype)).argmax(1)
        counts += predicted.bincount(minlength=model.class_count)
    order = counts.argsort(descending=True, stable=True)
    return ClassTable(counts=counts, most=tuple(order[:k].tolist()))
