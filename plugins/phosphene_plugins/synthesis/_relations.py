"""Relations that several syntheses declare, and the plain loops that they agree with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phosphene import optimize, rewrite_backward, scores
from phosphene.images import gaussian_blur, noise_images, resize
from phosphene.spec import Agrees, Calls
from phosphene.targets import parse_target

Score = Callable[[Tensor], Tensor]

#: Every term, edit and transform of activation maximization, on the pixels and by the plain gradient step.
ALL_TERMS: dict[str, Any] = {
    "parametrization": "pixels",
    "optimizer": "sgd",
    "steps": 4,
    "lr": 0.5,
    "l2": 0.02,
    "total_variation": 0.01,
    "blur_every": 2,
    "blur_sigma": 0.7,
    "jitter": 2,
    "rotate": 10,
    "rescale": 1.2,
    "clip_norm": 10,
    "clip_contribution": 15,
    "clip_gradient": 12,
    "start_noise": 0.1,
    "start_contrast": 0,
    "deconvnet_steps": 0,
    "size": 20,
}


#: No random augmentation.
PLAIN: dict[str, Any] = {"jitter": 0, "rotate": 0, "rescale": 1}


def gradient_ascent(score: Score, start: Tensor, center: Tensor, params: Mapping[str, Any]) -> Tensor:
    """Projected gradient ascent on S - l2 ||I - m||^2 - total_variation TV, with all edits and transforms."""
    random = torch.Generator().manual_seed(params["seed"])
    images, mean = start.clone(), center.view(-1, 1, 1).to(start)
    for step in range(1, params["steps"] + 1):
        variable = images.clone().requires_grad_()
        inputs: Tensor = variable
        if params["jitter"]:
            inputs = optimize.jitter(inputs, random, pixels=params["jitter"])
        if params["rotate"]:
            inputs = optimize.rotate(inputs, random, degrees=params["rotate"])
        if params["rescale"] > 1:
            inputs = optimize.rescale(inputs, random, factor=params["rescale"])
        is_rewritten = step <= params["deconvnet_steps"]
        with rewrite_backward(_positive) if is_rewritten else nullcontext():
            (ascent,) = torch.autograd.grad(score(inputs).sum(), variable)
        if params["clip_gradient"]:
            zero, norms = ascent.new_zeros(()), ascent.norm(dim=1, keepdim=True)
            ascent = _clip(ascent, zero, norms, params["clip_gradient"])
        down = (variable[..., 1:, :-1] - variable[..., :-1, :-1]).square().sum()
        right = (variable[..., :-1, 1:] - variable[..., :-1, :-1]).square().sum()
        penalty = params["l2"] * (variable - mean).square().sum() + params["total_variation"] * (down + right)
        images = (images + params["lr"] * (ascent - torch.autograd.grad(penalty, variable)[0])).clamp(0, 1)
        if params["blur_every"] and step % params["blur_every"] == 0:
            images = gaussian_blur(images, params["blur_sigma"])
        if params["clip_norm"]:
            images = _clip(images, mean, (images - mean).norm(dim=1, keepdim=True), params["clip_norm"])
        if params["clip_contribution"]:
            contribution = ((images - mean) * ascent).sum(1, keepdim=True).abs()
            images = _clip(images, mean, contribution, params["clip_contribution"])
    return images


def _positive(gradient: Tensor, relu_gradient: Tensor) -> Tensor:
    """Positive gradients pass every ReLU, negative ones none."""
    return torch.where(gradient > 0, gradient, 0)


def _clip(images: Tensor, mean: Tensor, importance: Tensor, percentage: float) -> Tensor:
    """The least important pixels set to the mean, or their gradients to zero."""
    threshold = importance.flatten(1).quantile(percentage / 100, dim=1).view(-1, 1, 1, 1)
    return torch.where(importance < threshold, mean, images)


def initial_images(calls: Calls, score: Score, count: int) -> Tensor:
    """The model's mean color plus noise; coarse gray noise where the score has no gradient there."""
    channels, height, width = calls.model.input_size
    seed, noise = calls.params["seed"], calls.params["start_noise"]
    shape = (count, channels, calls.params["size"] or height, calls.params["size"] or width)
    images = noise_images(shape, seed=seed, mean=calls.model.mean, sd=noise).to(calls.model.dtype)
    for attempt in range(1, 9):
        variable = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(score(variable).sum(), variable)
        coarse = gaussian_blur(
            noise_images((1, 1, *shape[2:]), seed=seed + attempt) - 0.5, min(shape[2:]) / 10
        )
        coarse = (0.5 + 0.2 * coarse / coarse.std()).clamp(0, 1).to(images)
        images = torch.where((gradient == 0).flatten(1).all(1).view(-1, 1, 1, 1), coarse, images)
    return images


def class_ascent(calls: Calls) -> Tensor:
    """Activation maximization of the target by ``gradient_ascent``."""

    def score(images: Tensor) -> Tensor:
        return scores(calls.model, images, calls.inputs["target"])

    return gradient_ascent(score, initial_images(calls, score, 1), calls.model.mean, calls.params)


def unit_ascent(calls: Calls) -> Tensor:
    """Activation maximization of a unit by ``gradient_ascent``, with the unit's formula."""
    p = calls.params
    channels = torch.tensor(p["channels"])
    layer = p["layer"] or calls.model.last_map
    weights = torch.tensor(p["direction"] or [1.0] * len(channels), dtype=torch.float64)

    def score(images: Tensor) -> Tensor:
        maps = calls.model.features(images, layer)
        rows = torch.arange(len(images))
        y, x = p["position"] or (calls.model.map_shape(layer)[1] // 2, calls.model.map_shape(layer)[2] // 2)
        formulas = {
            "neuron": lambda: maps[rows, channels, y, x],
            "channel": lambda: maps[rows, channels].flatten(1).mean(1),
            "layer": lambda: (maps**2).flatten(1).mean(1),
            "direction": lambda: (weights[:, None, None] * maps[:, channels]).sum(1).flatten(1).mean(1),
        }
        return formulas[p["unit"]]()

    count = 1 if p["unit"] in ("layer", "direction") else len(channels)
    return gradient_ascent(score, initial_images(calls, score, count), calls.model.mean, p)


def phases_by_adam(calls: Calls) -> Tensor:
    """MACO by Adam on all phases, in double precision."""
    p, (channels, height, width) = calls.params, calls.model.input_size
    rows, columns = p["size"] or height, p["size"] or width
    random = torch.Generator().manual_seed(p["seed"])
    noise = noise_images((1, channels, rows, columns), seed=p["seed"]).double()
    phases = torch.fft.rfft2(noise - 0.5).angle()
    color = torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]]).double()
    color = color / color.norm(dim=0).max()
    y, x = torch.meshgrid(
        torch.fft.fftfreq(rows).double(), torch.fft.fftfreq(columns).double(), indexing="ij"
    )
    decay = torch.where((y == 0) & (x == 0), 0, (x**2 + y**2).clamp(min=1e-12) ** -0.6)
    decay = 1.8 * decay / (decay.square().sum() / (rows * columns)).sqrt()
    level = torch.linalg.solve(color, calls.model.mean.double().logit()) * (rows * columns) ** 0.5
    magnitudes = decay[:, : columns // 2 + 1].repeat(channels, 1, 1)
    if (data := calls.inputs["dataset"]) is not None:
        pixels = data.read(range(len(data))).double().clamp(0.02, 0.98).logit()
        spectra = torch.fft.rfft2(torch.linalg.solve(color, pixels.flatten(2)).view_as(pixels), norm="ortho")
        magnitudes, level = spectra.abs().mean(0), spectra[..., 0, 0].real.mean(0)
    moments = [torch.zeros_like(phases), torch.zeros_like(phases)]

    def image() -> Tensor:
        spectrum = magnitudes * torch.exp(1j * phases)
        spectrum[:, :, 0, 0] = level.to(spectrum)
        signal = torch.fft.irfft2(spectrum, s=(rows, columns), norm="ortho")
        return torch.einsum("ij,njhw->nihw", color, signal).sigmoid()

    for step in range(1, p["steps"] + 1):
        phases = phases.detach().requires_grad_()
        x_image = image()
        values = []
        for _ in range(p["crops"]):
            part = p["crop_min"] + (p["crop_max"] - p["crop_min"]) * float(torch.rand((), generator=random))
            sides = [max(1, round(part * side)) for side in (rows, columns)]
            centers = 0.5 + 0.15 * torch.randn(2, generator=random)
            starts = [
                min(max(round(float(c) * n - s / 2), 0), n - s)
                for c, n, s in zip(centers, (rows, columns), sides, strict=True)
            ]
            window = x_image[..., starts[0] :, starts[1] :][..., : sides[0], : sides[1]]
            crop = F.interpolate(window, (height, width), mode="bilinear", antialias=True)
            grain = torch.randn(1, channels, height, width, generator=random).double()
            crop = (crop + p["noise"] * grain).clamp(0, 1)
            values.append(scores(calls.model, crop, calls.inputs["target"]))
        score = torch.stack(values).mean(0).sum()
        (gradient,) = torch.autograd.grad(score, phases)
        # Coefficients that are real: those whose frequency is its own negative.
        for row in {0, rows / 2} & {*range(rows)}:
            for column in {0, columns / 2} & {*range(columns // 2 + 1)}:
                gradient[..., int(row), int(column)] = 0
        moments[0] = 0.9 * moments[0] + 0.1 * gradient
        moments[1] = 0.999 * moments[1] + 0.001 * gradient**2
        mean, square = moments[0] / (1 - 0.9**step), moments[1] / (1 - 0.999**step)
        phases = phases.detach() + p["lr"] * mean / (square.sqrt() + 1e-8)
    return image()


def accentuation_by_hand(calls: Calls) -> Tensor:
    """Feature accentuation by plain gradient steps on the pixels."""
    p = calls.params
    layer = p["layer"] or calls.model.stages[len(calls.model.stages) // 2]
    start: Tensor = calls.inputs["images"]
    with torch.no_grad():
        expected = calls.model.features(start, layer).flatten(1)
    target = parse_target(calls.inputs["target"], calls.model).resolve(calls.model, start)
    random = torch.Generator().manual_seed(p["seed"])
    x = start.clone()
    for _ in range(p["steps"]):
        x = x.detach().requires_grad_()
        inputs = optimize.jitter(x, random, pixels=p["jitter"])
        inputs = optimize.rotate(inputs, random, degrees=p["rotate"])
        inputs = optimize.rescale(inputs, random, factor=p["rescale"])
        difference = calls.model.features(x, layer).flatten(1) - expected
        share = (difference**2).sum(1) / (expected**2).sum(1)
        objective = scores(calls.model, inputs, target) - p["weight"] * share
        x = (x + p["lr"] * torch.autograd.grad(objective.sum(), x)[0]).clamp(0, 1)
    return x.detach()


def inversion_by_adam(calls: Calls) -> Tensor:
    """Feature inversion of every stage by Adam on its loss."""
    p, images, mean = calls.params, calls.inputs["images"], calls.model.mean[:, None, None]
    inversions = []
    for layer in calls.model.stages:
        with torch.no_grad():
            expected = calls.model.features(images, layer).flatten(1)
        start = noise_images(images.shape, seed=p["seed"], mean=calls.model.mean, sd=0.02)
        x = start.to(images).requires_grad_()
        optimizer = torch.optim.Adam([x], lr=p["lr"] or 0.02)
        for _ in range(p["steps"]):
            features = calls.model.features(x, layer).flatten(1)
            distance = ((features - expected) ** 2).sum(1) / (expected**2).sum(1)
            across, down = x[..., :-1, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, :-1]
            variation = ((across**2 + down**2) ** (p["beta"] / 2)).sum((1, 2, 3))
            norm = ((x - mean).abs() ** p["alpha"]).sum((1, 2, 3))
            penalty = (p["total_variation"] * variation + p["alpha_norm"] * norm) / images[0, 0].numel()
            (x.grad,) = torch.autograd.grad((distance + penalty).sum(), x)
            optimizer.step()
            x.data.clamp_(0, 1)
        inversions.append(x.detach())
    return torch.stack(inversions, 1)


def dream_by_hand(calls: Calls) -> Tensor:
    """DeepDream of the second to last stage, octave by octave, without shifts; zoomed into the center."""
    p, layer = calls.params, calls.model.stages[-2]
    images: Tensor = calls.inputs["images"]
    height, width = images.shape[2:]
    for run in range(p["zoom"] + 1):
        if run:
            crop = [max(1, round(side / p["zoom_scale"])) for side in (height, width)]
            top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
            images = resize(images[..., top : top + crop[0], left : left + crop[1]], (height, width))
        detail = torch.zeros_like(images)
        for octave in range(p["octaves"]):
            factor = p["octave_scale"] ** (octave + 1 - p["octaves"])
            size = (round(height * factor), round(width * factor))
            base = resize(images, size)
            dream = (base + F.interpolate(detail, size, mode="bilinear", antialias=True)).clamp(0, 1)
            for step in range(1, p["steps"] + 1):
                dream = _dream_step(calls, layer, dream)
                if p["blur_every"] and step % p["blur_every"] == 0:
                    dream = gaussian_blur(dream, p["blur_sigma"])
            detail = dream - base
        images = dream
    return images


def _dream_step(calls: Calls, layer: str, images: Tensor) -> Tensor:
    """One step of normalized length on the mean square of a layer minus the total variation."""
    variable = images.clone().requires_grad_()
    energy = calls.model.features(variable, layer).square().flatten(1).mean(1).sum()
    down = (variable[..., 1:, :-1] - variable[..., :-1, :-1]).square().sum()
    right = (variable[..., :-1, 1:] - variable[..., :-1, :-1]).square().sum()
    penalty = calls.params["total_variation"] * (down + right) / images[0, 0].numel()
    (gradient,) = torch.autograd.grad(energy - penalty, variable)
    rms = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
    return (images + calls.params["lr"] * gradient / rms).clamp(0, 1)


def latent_ascent(calls: Calls) -> Tensor:
    """Codes after projected gradient ascent on S(G(z)) - l2 ||z||^2 from the best of the drawn codes."""
    p, size = calls.params, calls.model.input_size
    generator = calls.inputs["generator"].double()

    def score(z: Tensor) -> Tensor:
        return scores(calls.model, resize(generator.decode(z), (size[1], size[2])), calls.inputs["target"])

    random = torch.Generator().manual_seed(p["seed"])
    codes = torch.randn(p["draws"], *generator.latent_size, generator=random).double()
    with torch.no_grad():
        z = codes[score(codes).argmax()][None].clamp(-p["bound"], p["bound"])
    for _ in range(p["steps"]):
        variable = z.clone().requires_grad_()
        objective = score(variable).sum() - p["l2"] * variable.square().sum()
        (gradient,) = torch.autograd.grad(objective, variable)
        z = (z + p["lr"] * gradient).clamp(-p["bound"], p["bound"])
    return z


def class_visualization(calls: Calls) -> Tensor:
    """The images of ``class_visualization`` with its defaults, in as many steps."""
    shared = {name: calls.params[name] for name in ("steps", "seed")}
    images: Tensor = calls.other("synthesis.class_visualization", shared).images
    return images


def agrees_with_ascent(reference: Callable[[Calls], Tensor], **where: Any) -> Agrees:
    """Agreement of the images with a plain loop, with all terms."""
    return Agrees(reference, fields=("images",), where=ALL_TERMS | where, networks=("gap",))
