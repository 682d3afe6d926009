"""Correct attributions that declare nothing, which the ready-made relations must not refuse."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from wrong_attributions import Baseline, Steps, baseline_of, cam_map, path_gradient
from wrong_methods import attribution

from phosphene import Method, input_gradient, method, progress_bar, scores
from phosphene.images import gaussian_blur
from phosphene.results import Attribution
from phosphene.roles import Images, LayerName, Model, Seed, Target

RIGHT_ATTRIBUTIONS: list[Method[Any, Any]] = []


def right(**spec: Any) -> Any:
    def register(function: Any) -> Method[Any, Any]:
        RIGHT_ATTRIBUTIONS.append(method(**({"family": "right", "needs": ["gradients"]} | spec))(function))
        return RIGHT_ATTRIBUTIONS[-1]

    return register


Window = Annotated[int, Field(ge=1, le=64, description="side of the window in pixels")]
Samples = Annotated[int, Field(ge=1, le=10_000, description="number of samples")]


@right(needs=[], quick={"window": 7})
def occlusion_by_odd_windows(
    model: Model, images: Images, target: Target = None, *, window: Window = 7
) -> Attribution:
    """Drop of the score under windows from the top left corner, the last ones cut."""
    target = target.resolve(model, images)
    maps, clean = torch.zeros_like(images[:, 0]), scores(model, images, target)
    for top in progress_bar(range(0, images.shape[2], window), "rows"):
        for left in range(0, images.shape[3], window):
            hidden = images.clone()
            hidden[..., top : top + window, left : left + window] = 0.5
            drop = clean - scores(model, hidden, target)
            maps[:, top : top + window, left : left + window] = drop[:, None, None]
    return attribution(model, images, maps, target)


@right(needs=[], quick={"window": 16})
def occlusion_by_few_windows(
    model: Model, images: Images, target: Target = None, *, window: Window = 16
) -> Attribution:
    """Drop of the score under windows that do not divide the image."""
    return occlusion_by_odd_windows.function(model, images, target, window=window)


@right()
def input_times_gradient(model: Model, images: Images, target: Target = None) -> Attribution:
    """Input times gradient."""
    return attribution(model, images, (images * input_gradient(model, images, target)).sum(1), target)


@right()
def signed_gradient(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient summed over the channels."""
    return attribution(model, images, input_gradient(model, images, target).sum(1), target)


@right(quick={"samples": 2})
def smooth_gradient(
    model: Model, images: Images, target: Target = None, *, samples: Samples = 10, seed: Seed = None
) -> Attribution:
    """Mean magnitude of the gradient of noisy copies."""
    target, total = target.resolve(model, images), torch.zeros_like(images)
    generator = torch.Generator().manual_seed(seed or 0)
    for _ in range(samples):
        noise = torch.randn(1, *images.shape[1:], generator=generator).to(images)
        total += input_gradient(model, images + 0.1 * noise, target).abs()
    return attribution(model, images, total.amax(1) / samples, target)


@right(quick={"steps": 4})
def midpoint_rule(
    model: Model, images: Images, target: Target = None, *, steps: Steps = 32, baseline: Baseline = "zero"
) -> Attribution:
    """Integrated gradients by the midpoint rule."""
    start = baseline_of(images, baseline)
    alphas = [(n + 0.5) / steps for n in range(steps)]
    gradients = path_gradient(model, images, target, start, alphas, [1 / steps] * steps)
    return attribution(model, images, ((images - start) * gradients).sum(1), target)


@right(quick={"steps": 4})
def trapezoid_rule(
    model: Model, images: Images, target: Target = None, *, steps: Steps = 32, baseline: Baseline = "grey"
) -> Attribution:
    """Integrated gradients by the trapezoid rule."""
    start = baseline_of(images, baseline)
    weights = [(0.5 if n in (0, steps) else 1) / steps for n in range(steps + 1)]
    gradients = path_gradient(model, images, target, start, [n / steps for n in range(steps + 1)], weights)
    return attribution(model, images, ((images - start) * gradients).sum(1), target)


@right(quick={"steps": 4})
def right_sum_of_the_paper(
    model: Model, images: Images, target: Target = None, *, steps: Steps = 32,
    baseline: Annotated[float, Field(ge=0, le=1, description="value of every pixel of the baseline")] = 0.0,
) -> Attribution:  # fmt: skip
    """Integrated gradients by the right sum of the paper's equation 3."""
    start = torch.full_like(images, baseline)
    alphas = [(n + 1) / steps for n in range(steps)]
    gradients = path_gradient(model, images, target, start, alphas, [1 / steps] * steps)
    return attribution(model, images, ((images - start) * gradients).sum(1), target)


@right(quick={"steps": 4})
def path_of_blurs(model: Model, images: Images, target: Target = None, *, steps: Steps = 20) -> Attribution:
    """Integrated gradients along a path from a blurred image to the image."""
    target, total = target.resolve(model, images), torch.zeros_like(images)
    sigmas = [4.0 * (1 - n / steps) for n in range(steps + 1)]
    points = [gaussian_blur(images, sigma) if sigma > 0 else images for sigma in sigmas]
    for before, after in zip(points, points[1:], strict=False):
        total += (after - before) * input_gradient(model, (before + after) / 2, target)
    return attribution(model, images, total.sum(1), target)


@right()
def grad_cam_by_hand(
    model: Model, images: Images, target: Target = None, *,
    layer: Annotated[LayerName | None, Field(description="layer of the maps")] = None,
) -> Attribution:  # fmt: skip
    """Grad-CAM."""
    maps, gradients = cam_map(model, images, target, layer)
    return attribution(model, images, (gradients.mean((2, 3), keepdim=True) * maps).sum(1).relu(), target)


@right()
def enlarged_cam(model: Model, images: Images, target: Target = None) -> Attribution:
    """Grad-CAM, enlarged to the image and scaled to [0, 1]."""
    maps, gradients = cam_map(model, images, target, None)
    coarse = (gradients.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()
    fine = F.interpolate(coarse, images.shape[2:], mode="bilinear")[:, 0]
    return attribution(
        model, images, fine / fine.amax((1, 2), keepdim=True).clamp(min=torch.finfo(fine.dtype).tiny), target
    )


def cell_masks(count: int, grid: int, size: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    cells = (torch.rand(count, 1, grid, grid, generator=generator, dtype=torch.float64) < 0.5).double()
    return F.interpolate(cells, size, mode="nearest")


@right(needs=[], quick={"samples": 60})
def regression_over_cells(
    model: Model, images: Images, target: Target = None, *, samples: Samples = 200, seed: Seed = None
) -> Attribution:
    """LIME-like: ridge regression of the score on which cells of a grid are visible."""
    target, grid, size = target.resolve(model, images), 4, (images.shape[2], images.shape[3])
    masks = cell_masks(samples, grid, size, seed or 0).to(images)
    visible = F.adaptive_avg_pool2d(masks, grid).flatten(1)
    design = visible - visible.mean(0)
    maps = []
    for n in range(len(images)):
        values = scores(model, images[n] * masks, target.select([n] * samples)).detach()
        normal = design.T @ design + torch.eye(grid * grid).to(design)
        weights = torch.linalg.solve(normal, design.T @ (values - values.mean()))
        maps.append(F.interpolate(weights.view(1, 1, grid, grid), size, mode="nearest")[0, 0])
    return attribution(model, images, torch.stack(maps), target)


@right(needs=[], quick={"samples": 20})
def random_masks_with_a_fixed_seed(
    model: Model, images: Images, target: Target = None, *, samples: Samples = 500
) -> Attribution:
    """RISE with masks that are the same in every call, without a seed."""
    target = target.resolve(model, images)
    masks = cell_masks(samples, 7, (images.shape[2], images.shape[3]), 0).to(images)
    maps = []
    for n in range(len(images)):
        values = scores(model, images[n] * masks, target.select([n] * samples)).detach()
        maps.append((values[:, None, None] * masks[:, 0]).mean(0))
    return attribution(model, images, torch.stack(maps), target)


@right(quick={"samples": 4})
def variance_of_the_gradient(
    model: Model, images: Images, target: Target = None, *, samples: Samples = 10, seed: Seed = None
) -> Attribution:
    """VarGrad: variance of the gradient over noisy copies."""
    target, generator = target.resolve(model, images), torch.Generator().manual_seed(seed or 0)
    noise = torch.randn(samples, *images.shape[1:], generator=generator).to(images) * 0.2
    gradients = torch.stack([input_gradient(model, images + n, target) for n in noise])
    return attribution(model, images, gradients.var(0, correction=0).sum(1), target)


@right()
def contrast_of_two_classes(
    model: Model, images: Images, target: Target = None, *,
    kind: Annotated[Literal["input", "gradient"], Field(description="factor of the gradient")] = "input",
) -> Attribution:  # fmt: skip
    """Input times the gradient of the target's logit minus the mean logit."""
    resolved = target.resolve(model, images)
    gradient = input_gradient(model, images, lambda logits: resolved.score(logits) - logits.mean(1))
    return attribution(model, images, (images * gradient if kind == "input" else gradient).sum(1), target)


@right(quick={"steps": 4})
def smallest_mask(
    model: Model, images: Images, target: Target = None, *, steps: Steps = 50,
    baseline: Annotated[float, Field(ge=0, le=1, description="value of hidden pixels")] = 0.0,
) -> Attribution:  # fmt: skip
    """Optimized mask whose hidden pixels lower the score most: its steps are those of an optimizer."""
    target, hidden = target.resolve(model, images), torch.full_like(images[:, :1], 0.1)
    for _ in range(steps):
        mask = hidden.clone().requires_grad_()
        loss = scores(model, images + mask * (baseline - images), target).sum() + 1e-4 * mask.sum()
        (gradient,) = torch.autograd.grad(loss, mask)
        norm = gradient.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
        hidden = (hidden - 0.1 * gradient / norm).clamp(0, 1)
    return attribution(model, images, hidden[:, 0], target)


@right(quick={"samples": 4})
def expected_gradients(
    model: Model, images: Images, target: Target = None, *, samples: Samples = 50, seed: Seed = None
) -> Attribution:
    """Gradient SHAP: gradients at random points between random baselines and the image."""
    target, total = target.resolve(model, images), torch.zeros_like(images)
    generator = torch.Generator().manual_seed(seed or 0)
    for _ in range(samples):
        start = torch.rand(1, *images.shape[1:], generator=generator).to(images)
        alpha = torch.rand(1, generator=generator).to(images)
        total += (images - start) * input_gradient(model, start + alpha * (images - start), target)
    return attribution(model, images, total.sum(1) / samples, target)


@right(needs=[], quick={"samples": 8})
def sampled_shapley_values(
    model: Model, images: Images, target: Target = None, *, samples: Samples = 50, seed: Seed = None
) -> Attribution:
    """Shapley values of the cells of a 4x4 grid, hidden by gray, from random orders."""
    target, size, maps = target.resolve(model, images), images.shape[2:], torch.zeros(len(images), 16)
    generator = torch.Generator().manual_seed(seed or 0)
    for _ in range(samples):
        visible = torch.zeros(1, 1, 16)
        before = scores(model, torch.full_like(images, 0.5), target).detach()
        for cell in torch.randperm(16, generator=generator).tolist():
            visible[..., cell] = 1
            mask = F.interpolate(visible.view(1, 1, 4, 4), size).to(images)
            after = scores(model, 0.5 + mask * (images - 0.5), target).detach()
            maps[:, cell] += (after - before).to(maps) / samples
            before = after
    maps = F.interpolate(maps.view(-1, 1, 4, 4), size)[:, 0].to(images)
    return attribution(model, images, maps, target)


@right(quick={"top": 10})
def largest_gradients(
    model: Model, images: Images, target: Target = None, *,
    top: Annotated[int, Field(ge=1, description="number of pixels")] = 50,
) -> Attribution:  # fmt: skip
    """1 at the pixels with the largest gradients, else 0."""
    values = input_gradient(model, images, target).abs().amax(1).flatten(1)
    least = values.topk(min(top, values.shape[1]), 1).values[:, -1:]
    return attribution(model, images, (values >= least).to(images).view(-1, *images.shape[2:]), target)


@right()
def magnitude_of_the_loss_gradient(model: Model, images: Images, target: Target = None) -> Attribution:
    """Gradient magnitude of the cross entropy."""
    resolved = target.resolve(model, images)
    gradient = input_gradient(model, images, lambda logits: -resolved.score(logits.log_softmax(1)))
    return attribution(model, images, gradient.abs().amax(1), target)
