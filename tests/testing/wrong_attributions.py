"""Attributions with wrong arithmetic, and the check that must fail: each declares what its paper proves."""

# The summary of each method is its defect.
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from wrong_methods import SOURCE, attribution

from phosphene import Method, guided, input_gradient, layer_gradients, method, rewrite_backward
from phosphene.results import Attribution
from phosphene.roles import Images, LayerName, Model, Seed, Target
from phosphene.spec import (
    Agrees,
    Calls,
    Complete,
    Converges,
    Cost,
    Equivariant,
    InvariantTo,
    LinearIn,
    Relation,
    ScalesWith,
    ZeroWhen,
    param,
    size,
)

#: (name of the check that must fail, method)
WRONG_ATTRIBUTIONS: list[tuple[str, Method[Any, Any]]] = []
ONE_PASS = Cost(forward=size.images, backward=size.images)
NOISE = Cost(forward=size.images * (param.samples + 1), backward=size.images * param.samples)
PATH = Cost(forward=size.images * (param.steps + 1), backward=size.images * (param.steps + 1))
Steps = Annotated[int, Field(ge=1, le=1000, description="points between the baseline and the image")]
Baseline = Annotated[Literal["zero", "grey"], Field(description="start of the integral")]
Layer = Annotated[LayerName | None, Field(description="layer of the maps; default: the last one")]

#: What the papers prove of a gradient map, of Grad-CAM and of integrated gradients.
GRADIENT: tuple[Relation, ...] = (
    Equivariant("hflip"), Equivariant("transpose"), Equivariant("shift"),
    ScalesWith("logits", power=1), InvariantTo("logit_shift"), InvariantTo("batch_order"),
)  # fmt: skip
GRAD_CAM: tuple[Relation, ...] = (
    Agrees("attribution.cam", rectified=True, proportional=True, networks=("gap",)),
    Equivariant("hflip"), Equivariant("transpose"),
    ScalesWith("logits", power=1), InvariantTo("logit_shift"), InvariantTo("batch_order"),
)  # fmt: skip
COMPLETE: tuple[Relation, ...] = (
    Complete("baseline", where={"steps": 32, "baseline": "zero"}),
    Complete("baseline", where={"steps": 32, "baseline": "grey"}),
    LinearIn("target"), Equivariant("hflip"), Equivariant("transpose"),
)  # fmt: skip


def caught_by(check: str, **spec: Any) -> Callable[[Callable[..., Any]], Method[Any, Any]]:
    def register(function: Callable[..., Any]) -> Method[Any, Any]:
        declared = {
            "family": "wrong",
            "references": [SOURCE],
            "needs": ["gradients"],
            "cost": ONE_PASS,
        } | spec
        registered = method(**declared)(function)
        WRONG_ATTRIBUTIONS.append((check, registered))
        return registered

    return register


def baseline_of(images: Tensor, baseline: str) -> Tensor:
    return torch.full_like(images, 0.0 if baseline == "zero" else 0.5)


def path_gradient(
    model: Any, images: Tensor, target: Any, start: Tensor, alphas: list[float], weights: list[float]
) -> Tensor:
    """Weighted sum of the gradients at points of the line from ``start`` to the images."""
    target = target.resolve(model, images)
    total = torch.zeros_like(images)
    for alpha, weight in zip(alphas, weights, strict=True):
        total += weight * input_gradient(model, start + alpha * (images - start), target)
    return total


def cam_map(model: Any, images: Tensor, target: Any, layer: str | None) -> tuple[Tensor, Tensor]:
    [(maps, gradients)] = layer_gradients(model, images, target, layer or model.last_map)
    return maps, gradients


# --- geometry: caught without a declaration --------------------------------------------------------


@caught_by("localizes")
def transposed_map(model: Model, images: Images, target: Target = None) -> Attribution:
    """The map is transposed and resized to the image's shape."""
    maps = input_gradient(model, images, target).abs().amax(1).mT
    return attribution(model, images, F.interpolate(maps[:, None], images.shape[2:])[:, 0], target)


@caught_by("equivariant")
def transposed_cam(
    model: Model, images: Images, target: Target = None, *, layer: Layer = None
) -> Attribution:
    """Grad-CAM's map has the axes (w, h)."""
    maps, gradients = cam_map(model, images, target, layer)
    return attribution(model, images, (gradients.mean((2, 3), keepdim=True) * maps).sum(1).relu().mT, target)


@caught_by("localizes")
def flipped_map(model: Model, images: Images, target: Target = None) -> Attribution:
    """Columns are in reverse order."""
    return attribution(model, images, input_gradient(model, images, target).abs().amax(1).flip(-1), target)


@caught_by("localizes")
def rotated_map(model: Model, images: Images, target: Target = None) -> Attribution:
    """Rows and columns are in reverse order."""
    maps = input_gradient(model, images, target).abs().amax(1).flip(-1, -2)
    return attribution(model, images, maps, target)


@caught_by("localizes")
def shuffled_map(model: Model, images: Images, target: Target = None) -> Attribution:
    """The pixels of the map are in a fixed random order."""
    maps = input_gradient(model, images, target).abs().amax(1).flatten(1)
    order = torch.randperm(maps.shape[1], generator=torch.Generator().manual_seed(0))
    return attribution(model, images, maps[:, order].view(-1, *images.shape[2:]), target)


@caught_by("localizes")
def swapped_sides(model: Model, images: Images, target: Target = None) -> Attribution:
    """Pixels are written column by column and read row by row."""
    maps = input_gradient(model, images, target).abs().amax(1)
    return attribution(model, images, maps.mT.reshape(maps.shape), target)


@caught_by("localizes")
def negated_cam(model: Model, images: Images, target: Target = None, *, layer: Layer = None) -> Attribution:
    """Grad-CAM without its ReLU, with the opposite sign."""
    maps, gradients = cam_map(model, images, target, layer)
    return attribution(model, images, -(gradients.mean((2, 3), keepdim=True) * maps).sum(1), target)


@caught_by("localizes")
def next_image_of_the_batch(model: Model, images: Images, target: Target = None) -> Attribution:
    """Each image gets the map of the next one."""
    maps = (images * input_gradient(model, images, target)).sum(1).roll(1, 0)
    return attribution(model, images, maps, target)


@caught_by("complete", cost=PATH, quick={"steps": 4})
def left_sum_undeclared(
    model: Model, images: Images, target: Target = None, *, steps: Steps = 32, baseline: Baseline = "zero"
) -> Attribution:
    """Integrated gradients by a left sum, without any declaration."""
    start = baseline_of(images, baseline)
    alphas = [n / steps for n in range(steps)]
    gradients = path_gradient(model, images, target, start, alphas, [1 / steps] * steps)
    return attribution(model, images, ((images - start) * gradients).sum(1), target)


@caught_by("complete", cost=PATH, quick={"steps": 4})
def baseline_ignored_undeclared(
    model: Model, images: Images, target: Target = None, *, steps: Steps = 32, baseline: Baseline = "grey"
) -> Attribution:
    """The integral starts from black, whatever the baseline."""
    start = torch.zeros_like(images)
    alphas = [(n + 0.5) / steps for n in range(steps)]
    gradients = path_gradient(model, images, target, start, alphas, [1 / steps] * steps)
    return attribution(model, images, (images * gradients).sum(1), target)


# --- integrated gradients --------------------------------------------------------------------------


@caught_by(str(COMPLETE[0]), cost=PATH, quick={"steps": 4}, relations=COMPLETE)
def left_sum(
    model: Model, images: Images, target: Target = None, *, steps: Steps = 32, baseline: Baseline = "zero"
) -> Attribution:
    """Integrated gradients by a left sum."""
    start = baseline_of(images, baseline)
    alphas = [n / steps for n in range(steps)]
    gradients = path_gradient(model, images, target, start, alphas, [1 / steps] * steps)
    return attribution(model, images, ((images - start) * gradients).sum(1), target)


@caught_by(str(COMPLETE[0]), cost=PATH, quick={"steps": 4}, relations=COMPLETE)
def step_too_many(
    model: Model, images: Images, target: Target = None, *, steps: Steps = 32, baseline: Baseline = "zero"
) -> Attribution:
    """The sum has one term more than its divisor."""
    start = baseline_of(images, baseline)
    alphas = [n / steps for n in range(steps + 1)]
    gradients = path_gradient(model, images, target, start, alphas, [1 / steps] * (steps + 1))
    return attribution(model, images, ((images - start) * gradients).sum(1), target)


@caught_by(str(COMPLETE[1]), cost=PATH, quick={"steps": 4}, relations=COMPLETE)
def image_instead_of_the_difference(
    model: Model, images: Images, target: Target = None, *, steps: Steps = 32, baseline: Baseline = "zero"
) -> Attribution:
    """The factor is the image, not its difference from the baseline."""
    start = baseline_of(images, baseline)
    alphas = [(n + 0.5) / steps for n in range(steps)]
    gradients = path_gradient(model, images, target, start, alphas, [1 / steps] * steps)
    return attribution(model, images, (images * gradients).sum(1), target)


@caught_by(str(COMPLETE[0]), cost=PATH, quick={"steps": 4}, relations=COMPLETE)
def channel_mean(
    model: Model, images: Images, target: Target = None, *, steps: Steps = 32, baseline: Baseline = "zero"
) -> Attribution:
    """Channels are averaged instead of summed."""
    start = baseline_of(images, baseline)
    alphas = [(n + 0.5) / steps for n in range(steps)]
    gradients = path_gradient(model, images, target, start, alphas, [1 / steps] * steps)
    return attribution(model, images, ((images - start) * gradients).mean(1), target)


@caught_by(
    "converges('steps', order=2.0)", cost=PATH, quick={"steps": 4}, relations=[Converges("steps", order=2)]
)
def right_sum_called_midpoint(
    model: Model, images: Images, target: Target = None, *, steps: Steps = 32, baseline: Baseline = "zero"
) -> Attribution:
    """A right sum, where the midpoint rule is declared."""
    start = baseline_of(images, baseline)
    alphas = [(n + 1) / steps for n in range(steps)]
    gradients = path_gradient(model, images, target, start, alphas, [1 / steps] * steps)
    return attribution(model, images, ((images - start) * gradients).sum(1), target)


# --- gradients ---------------------------------------------------------------------------------------


@caught_by(str(GRADIENT[0]), relations=GRADIENT)
def off_by_one(model: Model, images: Images, target: Target = None) -> Attribution:
    """The map is shifted by one column."""
    maps = input_gradient(model, images, target).abs().amax(1).roll(1, -1)
    return attribution(model, images, maps, target)


@caught_by(str(GRADIENT[3]), relations=GRADIENT)
def squared_gradient(model: Model, images: Images, target: Target = None) -> Attribution:
    """The gradient is squared, where its magnitude is declared."""
    return attribution(model, images, input_gradient(model, images, target).square().amax(1), target)


@caught_by(str(GRADIENT[3]), relations=GRADIENT)
def gradient_of_the_probability(model: Model, images: Images, target: Target = None) -> Attribution:
    """The probability is differentiated instead of the logit."""
    resolved = target.resolve(model, images)
    maps = input_gradient(model, images, lambda logits: resolved.score(logits.softmax(1))).abs().amax(1)
    return attribution(model, images, maps, target)


@caught_by(str(GRADIENT[3]), relations=GRADIENT)
def gradient_of_the_loss(model: Model, images: Images, target: Target = None) -> Attribution:
    """The cross entropy is differentiated instead of the logit."""
    resolved = target.resolve(model, images)
    maps = input_gradient(model, images, lambda logits: -resolved.score(logits.log_softmax(1))).abs().amax(1)
    return attribution(model, images, maps, target)


@caught_by("linear_in('target')", relations=[LinearIn("target")])
def absolute_value_too_early(model: Model, images: Images, target: Target = None) -> Attribution:
    """Input times the gradient's magnitude, where input times gradient is declared."""
    return attribution(model, images, (images * input_gradient(model, images, target).abs()).sum(1), target)


@caught_by(str(GRADIENT[5]), relations=GRADIENT)
def scaled_by_the_first_image(model: Model, images: Images, target: Target = None) -> Attribution:
    """Every map is weighted by the brightness of the batch's first image."""
    maps = input_gradient(model, images, target).abs().amax(1) * images[:1].mean()
    return attribution(model, images, maps, target)


@caught_by("invariant_to('normalization')", relations=[InvariantTo("normalization"), *GRADIENT])
def normalized_pixels(model: Model, images: Images, target: Target = None) -> Attribution:
    """The factor of the gradient is the normalized pixel."""
    pixels = (images - model.mean.to(images)[:, None, None]) / model.std.to(images)[:, None, None]
    return attribution(model, images, (pixels * input_gradient(model, images, target)).sum(1), target)


@caught_by("zero_when('constant')", relations=[ZeroWhen("constant"), ZeroWhen("ignored")])
def image_in_the_map(model: Model, images: Images, target: Target = None) -> Attribution:
    """The image's brightness is added to the map."""
    maps = input_gradient(model, images, target).abs().amax(1) + 0.1 * images.mean(1)
    return attribution(model, images, maps, target)


@caught_by("zero_when('ignored')", relations=[ZeroWhen("constant"), ZeroWhen("ignored")])
def blurred_over_the_border(model: Model, images: Images, target: Target = None) -> Attribution:
    """The map is averaged over 13x13 pixels, beyond those that the score depends on."""
    maps = input_gradient(model, images, target).abs().amax(1, keepdim=True)
    return attribution(model, images, F.avg_pool2d(maps, 13, 1, padding=6)[:, 0], target)


SALIENCY = Agrees("attribution.saliency", where={"sigma": 0.0})


@caught_by(str(SALIENCY), relations=[SALIENCY], quick={"samples": 3},
           cost=NOISE)  # fmt: skip
def sigma_is_ignored(
    model: Model, images: Images, target: Target = None, *,
    samples: Annotated[int, Field(ge=1, le=100, description="number of noisy copies")] = 5,
    sigma: Annotated[float, Field(ge=0, le=1, description="standard deviation of the noise")] = 0.1,
    seed: Seed = None,
) -> Attribution:  # fmt: skip
    """SmoothGrad whose noise has a fixed standard deviation."""
    target, total = target.resolve(model, images), torch.zeros_like(images)
    generator = torch.Generator().manual_seed(seed or 0)
    for _ in range(samples):
        noise = torch.randn(1, *images.shape[1:], generator=generator, dtype=torch.float64).to(images)
        total += input_gradient(model, images + 0.1 * noise, target)
    return attribution(model, images, (total / samples).abs().amax(1), target)


@caught_by("converges('samples', start=1, order=0.1)", relations=[Converges("samples", start=1, order=0.1)],
           quick={"samples": 3},
           cost=NOISE)  # fmt: skip
def one_noisy_copy(
    model: Model, images: Images, target: Target = None, *,
    samples: Annotated[int, Field(ge=1, le=100, description="number of noisy copies")] = 5,
    seed: Seed = None,
) -> Attribution:  # fmt: skip
    """SmoothGrad whose noise is the same in every copy."""
    target, total = target.resolve(model, images), torch.zeros_like(images)
    for _ in range(samples):
        generator = torch.Generator().manual_seed(seed or 0)
        noise = torch.randn(1, *images.shape[1:], generator=generator, dtype=torch.float64).to(images)
        total += input_gradient(model, images + 0.1 * noise, target)
    return attribution(model, images, total.abs().amax(1), target)


GUIDED = Agrees("attribution.guided_backprop")


@caught_by(str(GUIDED), relations=[GUIDED], needs=["gradients", "relu"])
def guided_by_the_negative_part(model: Model, images: Images, target: Target = None) -> Attribution:
    """Guided backpropagation of the negated score."""
    resolved = target.resolve(model, images)
    with rewrite_backward(guided):
        gradient = input_gradient(model, images, lambda logits: -resolved.score(logits))
    return attribution(model, images, gradient.abs().amax(1), target)


# --- class activation maps -----------------------------------------------------------------------------


@caught_by(str(GRAD_CAM[0]), relations=GRAD_CAM)
def previous_layer(
    model: Model, images: Images, target: Target = None, *, layer: Layer = None
) -> Attribution:
    """Grad-CAM of the first layer with a map instead of the last."""
    first = next(n for n, info in model.structure.layers.items() if info.shape and len(info.shape) == 3)
    maps, gradients = cam_map(model, images, target, layer or first)
    return attribution(model, images, (gradients.mean((2, 3), keepdim=True) * maps).sum(1).relu(), target)


@caught_by(str(GRAD_CAM[0]), relations=GRAD_CAM)
def weights_of_another_channel(
    model: Model, images: Images, target: Target = None, *, layer: Layer = None
) -> Attribution:
    """Each feature map has the weight of the next one."""
    maps, gradients = cam_map(model, images, target, layer)
    weights = gradients.mean((2, 3), keepdim=True).roll(1, 1)
    return attribution(model, images, (weights * maps).sum(1).relu(), target)


@caught_by(str(GRAD_CAM[0]), relations=GRAD_CAM)
def magnitude_of_the_weights(
    model: Model, images: Images, target: Target = None, *, layer: Layer = None
) -> Attribution:
    """The weights lose their sign."""
    maps, gradients = cam_map(model, images, target, layer)
    weights = gradients.mean((2, 3), keepdim=True).abs()
    return attribution(model, images, (weights * maps).sum(1).relu(), target)


@caught_by(str(GRAD_CAM[3]), relations=GRAD_CAM)
def cam_of_the_probability(
    model: Model, images: Images, target: Target = None, *, layer: Layer = None
) -> Attribution:
    """The log-probability is differentiated instead of the logit."""
    resolved = target.resolve(model, images)
    maps, gradients = cam_map(model, images, lambda logits: resolved.score(logits.log_softmax(1)), layer)
    return attribution(model, images, (gradients.mean((2, 3), keepdim=True) * maps).sum(1).relu(), target)


EXACT = Agrees("attribution.grad_cam")


@caught_by(str(EXACT), relations=[EXACT])
def sum_instead_of_mean(
    model: Model, images: Images, target: Target = None, *, layer: Layer = None
) -> Attribution:
    """The weights are sums of the gradients, not their means."""
    maps, gradients = cam_map(model, images, target, layer)
    return attribution(model, images, (gradients.sum((2, 3), keepdim=True) * maps).sum(1).relu(), target)


@caught_by(str(EXACT), relations=[EXACT])
def missing_relu(model: Model, images: Images, target: Target = None, *, layer: Layer = None) -> Attribution:
    """Grad-CAM without its ReLU."""
    maps, gradients = cam_map(model, images, target, layer)
    return attribution(model, images, (gradients.mean((2, 3), keepdim=True) * maps).sum(1), target)


@caught_by(str(EXACT), relations=[EXACT])
def mean_over_channels(
    model: Model, images: Images, target: Target = None, *, layer: Layer = None
) -> Attribution:
    """The gradients are averaged over the channels as well."""
    maps, gradients = cam_map(model, images, target, layer)
    return attribution(model, images, (gradients.mean((1, 2, 3), keepdim=True) * maps).sum(1).relu(), target)


def enlarged_grad_cam(calls: Calls) -> Tensor:
    """Grad-CAM's map enlarged between pixel centers."""
    maps = calls.other("attribution.grad_cam").maps[:, None]
    return F.interpolate(maps, calls.inputs["images"].shape[2:], mode="bilinear")[:, 0]


ENLARGED = Agrees(enlarged_grad_cam)


@caught_by(str(ENLARGED), relations=[ENLARGED])
def corners_aligned(
    model: Model, images: Images, target: Target = None, *, layer: Layer = None
) -> Attribution:
    """The map is enlarged between corners instead of pixel centers."""
    maps, gradients = cam_map(model, images, target, layer)
    coarse = (gradients.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()
    fine = F.interpolate(coarse, images.shape[2:], mode="bilinear", align_corners=True)[:, 0]
    return attribution(model, images, fine, target)


@caught_by(str(ENLARGED), relations=[ENLARGED])
def gradient_of_half_the_map(
    model: Model, images: Images, target: Target = None, *, layer: Layer = None
) -> Attribution:
    """The gradient is averaged over the left half of the map."""
    maps, gradients = cam_map(model, images, target, layer)
    weights = gradients[..., : gradients.shape[-1] // 2].mean((2, 3), keepdim=True)
    coarse = (weights * maps).sum(1, keepdim=True).relu()
    return attribution(model, images, F.interpolate(coarse, images.shape[2:], mode="bilinear")[:, 0], target)
