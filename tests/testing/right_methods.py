"""Correct methods, each of a kind that a careless check would fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from wrong_methods import SOURCE, adversarial_examples, attribution, gradient, gradient_sign_step

from phosphene import (
    InputError,
    Method,
    ModelError,
    batch_size,
    guided,
    method,
    progress_bar,
    rewrite_backward,
)
from phosphene.results import AdversarialExamples, Attribution, FilterBank, Panel, Result, Synthesis
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
    maps = model.maps(model.features(images, layer or model.last_map), images).mean(1)
    return Attribution(images=images, maps=maps, targets=("mean",) * len(images))


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
