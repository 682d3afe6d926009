"""Attacks on a single image, as plain loops of their equations: what the oracles compare batches with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Generator, Tensor

from phosphene import Model
from phosphene.attacks import Norm, project

from ._apgd_l1 import _sparse_sign, _stages
from ._hyperplane_projection import project_onto_hyperplane
from ._losses import Loss
from ._oracle_models import LinearCase, unit_step
from ._parameters import MinimizedNorm

#: Point (C, H, W) -> loss, its gradient (C, H, W), and whether the point is adversarial.
Objective = Callable[[Tensor], tuple[float, Tensor, bool]]


def deepfool_of_one_image(
    model: Model, image: Tensor, label: int, norm: Norm, steps: int, overshoot: float, candidates: int
) -> Tensor:
    """Moosavi-Dezfooli et al. 2016, algorithm 2, for an image (C, H, W)."""
    rivals = [k for k in model(image[None])[0].argsort(descending=True).tolist() if k != label]
    x, total = image, torch.zeros_like(image)
    for _ in range(steps):
        leaf = x.detach().requires_grad_()
        logits = model(leaf[None])[0]
        if logits.argmax() != label:
            break
        moves = []
        for k in rivals[: candidates - 1]:
            (w,) = torch.autograd.grad(logits[k] - logits[label], leaf, retain_graph=True)
            slope = float(w.norm() if norm == "l2" else w.abs().sum())
            if slope > 0:
                distance = max((logits[label] - logits[k]).item() / slope, 1e-6)
                moves.append((distance, w / slope if norm == "l2" else w.sign()))
        if not moves:
            break
        distance, direction = min(moves, key=lambda move: move[0])
        total = total + distance * direction
        x = (image + (1 + overshoot) * total).clamp(0, 1)
    return x


def apgd_of_one_image(
    objective: Objective, start: Tensor, image: Tensor, eps: float, steps: int, norm: Norm
) -> tuple[Tensor, float, bool]:
    """Croce & Hein 2020, algorithm 1: the first adversarial point or the best one, its loss, and success."""

    def onto_ball(point: Tensor) -> Tensor:
        return project(point[None], image[None], eps, norm)[0]

    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    checkpoints = [-int(-round(fraction * steps, 6) // 1) for fraction in p]
    x = x_before = best = start
    value = best_value = checkpoint_value = -torch.inf
    eta = checkpoint_eta = 2 * eps
    best_gradient, increases = torch.zeros_like(image), 0
    for step in range(steps + 1):
        new, gradient, success = objective(x)
        increases, value = increases + (new > value), new
        if value > best_value:
            best, best_value, best_gradient = x, value, gradient
        if success:
            return x, value, True
        if step in checkpoints and step < steps:
            since = step - max((c for c in checkpoints if c < step), default=0)
            stalled = increases < 0.75 * since or (eta, best_value) == (checkpoint_eta, checkpoint_value)
            checkpoint_eta, checkpoint_value, increases = eta, best_value, 0
            if stalled:
                eta, x, value, gradient = eta / 2, best, best_value, best_gradient
        a = 0.75 if step else 1.0
        z = onto_ball(x + eta * unit_step(gradient[None], norm)[0])
        x, x_before = onto_ball(x + a * (z - x) + (1 - a) * (x - x_before)), x
    return best, best_value, False


def apgd_l1_of_one_image(
    objective: Objective, start: Tensor, image: Tensor, eps: float, steps: int
) -> tuple[Tensor, float, bool]:
    """Croce & Hein 2021, algorithm 1 in balls of 3, 2 and 1 eps: as ``apgd_of_one_image``."""
    sparsity, best = 0.2 * image.numel(), start
    counts = [int(0.3 * steps), int(0.3 * steps)]
    best_value = -torch.inf
    for radius, count in zip((3 * eps, 2 * eps, eps), (*counts, steps + 1 - sum(counts)), strict=True):
        if not count:
            continue
        x = best = project(best[None], image[None], radius, "l1")[0]
        best_value, changed_before, eta, best_gradient = -torch.inf, torch.inf, radius, torch.zeros_like(x)
        for n in range(count):
            value, gradient, success = objective(x)
            if value > best_value:
                best, best_value, best_gradient = x, value, gradient
            if success and radius == eps:
                return x, value, True
            if n and n % max(1, int(0.04 * count)) == 0:
                changed = int((best != image).sum())
                if changed < 0.95 * changed_before:
                    eta, x, gradient = radius, best, best_gradient
                else:
                    eta = max(eta / 1.5, 0.1 * radius)
                sparsity, changed_before = changed / 1.5, changed
            k = min(max(int(sparsity), 1), image.numel())
            moved = gradient.abs() >= gradient.abs().flatten().sort(descending=True).values[k - 1]
            step = gradient.sign() * moved
            step = step / max(float(step.abs().sum()), 1)
            x = project((x + eta * step)[None], image[None], radius, "l1")[0]
    return best, best_value, False


def gradients_and_signs_of_apgd_l1() -> None:
    """Gradients of all balls, one more than steps; the largest components, of which there may be too few."""
    for steps in (1, 10, 34):
        stages = _stages(0.5, steps)
        assert sum(count for _, count in stages) == steps + 1 and [radius for radius, _ in stages][-1] == 0.5
    gradient = torch.tensor([[3.0, -1.0, 0.5, -2.0]]).view(1, 1, 2, 2).expand(4, -1, -1, -1)
    signs = _sparse_sign(gradient, torch.tensor([0.0, 2.9, 4.0, 1e6]))
    assert signs.flatten(1).tolist() == [[1, 0, 0, 0], [0.5, 0, 0, -0.5]] + 2 * [[0.25, -0.25, 0.25, -0.25]]


def best_of_plain_runs(
    case: LinearCase,
    labels: Tensor,
    runs: Sequence[tuple[Tensor, Tensor]],
    loss: Loss,
    targeted: bool,
    eps: float,
    steps: int,
    norm: Norm,
    stops: bool,
) -> Tensor:
    """Each image's first success of several runs of APGD, each of starts and labels; else its best point."""
    results = []
    for n, (image, label) in enumerate(zip(case.images, labels, strict=True)):
        outcomes = []
        for starts, loss_labels in runs:

            def objective(
                x: Tensor, y: Tensor = loss_labels[n : n + 1], label: Tensor = label
            ) -> tuple[float, Tensor, bool]:
                leaf = x[None].detach().requires_grad_()
                logits = case.model(leaf)
                value = loss(logits, y)[0]
                (gradient,) = torch.autograd.grad(value, leaf)
                return value.item(), gradient[0], stops and bool((logits.argmax() == label) == targeted)

            if norm == "l1":
                outcomes.append(apgd_l1_of_one_image(objective, starts[n], image, eps, steps))
            else:
                outcomes.append(apgd_of_one_image(objective, starts[n], image, eps, steps, norm))
        successes = [point for point, _, success in outcomes if success]
        results.append(successes[0] if successes else max(outcomes, key=lambda outcome: outcome[1])[0])
    return torch.stack(results)


def fab_of_one_image(
    model: Model,
    image: Tensor,
    label: int,
    rivals: Sequence[int],
    start: Tensor,
    norm: Norm,
    targeted: bool,
    steps: int,
    alpha: float,
    beta: float,
    eta: float,
) -> tuple[Tensor, float]:
    """One run of Croce & Hein 2020, algorithm 1: the nearest example of an image, and its distance."""
    x, best, nearest = start, image, torch.inf
    for _ in range(steps):
        leaf = x.detach().requires_grad_()
        logits = model(leaf[None])[0]
        own, others = label, rivals
        if targeted:
            own, others = max((k for k in range(len(logits)) if k != label), key=lambda k: logits[k]), [label]
        boundaries = []
        for k in others:
            gap = logits[own] - logits[k]
            (w,) = torch.autograd.grad(-gap, leaf, retain_graph=True)
            slope = {"linf": w.abs().sum(), "l2": w.norm(), "l1": w.abs().max()}[norm].item()
            if slope > 0:
                boundaries.append((abs(gap.item()) / slope, gap.item(), w))
        if not boundaries:
            break
        _, gap_, w = min(boundaries, key=lambda boundary: boundary[0])
        d, d_0 = (
            project_onto_hyperplane(point[None], w[None], torch.tensor([offset]).to(point), norm)[0]
            for point, offset in ((x, gap_), (image, gap_ + (w * (x - image)).sum().item()))
        )
        a = min(_size(d, norm) / max(_size(d, norm) + _size(d_0, norm), 1e-300), alpha)
        x = ((1 - a) * (x + eta * d) + a * (image + eta * d_0)).clamp(0, 1)
        if (model(x[None]).argmax() == label) == targeted:
            if _size(x - image, norm) < nearest:
                best, nearest = x, _size(x - image, norm)
            x = image + beta * (x - image)
    return best, nearest


def _size(change: Tensor, norm: Norm) -> float:
    return float(change.flatten().norm(float(norm.removeprefix("l"))))


def carlini_wagner_of_one_image(
    model: Model,
    image: Tensor,
    label: int,
    norm: MinimizedNorm,
    targeted: bool,
    steps: int,
    search_steps: int,
    kappa: float,
) -> Tensor:
    """Carlini & Wagner 2017 from the nearest linearized boundary, the result moved to the boundary."""
    leaf = image.detach().requires_grad_()
    logits = model(leaf[None])[0]
    order = [k for k in logits.argsort(descending=True).tolist() if k != label]
    own, rivals = (order[0], [label]) if targeted else (label, order[:9])
    gaps, normals = [], []
    for k in rivals:
        gaps.append((logits[own] - logits[k]).item())
        normals.append(torch.autograd.grad(logits[k] - logits[own], leaf, retain_graph=True)[0])
    slopes = [float(w.norm() if norm == "l2" else w.abs().sum()) for w in normals]
    distances = [gap / slope if slope else math.inf for gap, slope in zip(gaps, slopes, strict=True)]
    n = distances.index(min(distances))
    start = image
    if slopes[n]:
        direction = normals[n] / slopes[n] if norm == "l2" else normals[n].sign()
        start = (image + 1.02 * max(distances[n], 1e-6) * direction).clamp(0, 1)
    tiny = torch.finfo(image.dtype).tiny ** 0.5
    slope, size = max(slopes[0], tiny), image.numel()
    needed = (gaps[0] + kappa) / slope
    c = min(max((3 * needed if norm == "l2" else size) / slope, tiny), 1 / tiny)
    step_size = min(max(needed / (size if norm == "l2" else 64) ** 0.5, 1e-7), 0.05)
    low, high, tau, nearest, best = 0.0, math.inf, 1.0, math.inf, image

    def lacking(logits: Tensor) -> Tensor:
        others = torch.stack([z for k, z in enumerate(logits) if k != label]).max()
        return (kappa + (others - logits[label]) * (1 if targeted else -1)).clamp(min=0)

    def succeeds(point: Tensor) -> bool:
        logits = model(point[None])[0].detach()
        return bool((logits.argmax() == label) == targeted and lacking(logits) <= 0)

    for _ in range(search_steps):
        before, hit, x, lowest, lowest_before = nearest, False, start, math.inf, math.inf
        mean = square = torch.zeros_like(image)
        for step in range(steps):
            leaf = x.detach().requires_grad_()
            f, delta = lacking(model(leaf[None])[0]), leaf - image
            first = delta.square().sum() if norm == "l2" else (delta.abs() - tau).clamp(min=0).sum()
            if succeeds(x):
                distance = _size(x - image, norm)
                if distance < nearest:
                    best, nearest = x, distance
                hit = hit or norm == "l2" or distance <= tau
            (gradient,) = torch.autograd.grad(first + c * f, leaf)
            lowest = min(lowest, (first + c * f).item())
            if norm == "linf" and hit:
                break
            if step % max(1, steps // 10) == 0:
                if lowest >= 0.999 * lowest_before:
                    break
                lowest_before = lowest
            mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient.square()
            spread = (square / (1 - 0.999 ** (step + 1))).sqrt() + tiny
            length = step_size * (1 + math.cos(math.pi * step / steps)) / 2
            x = (x - length * mean / (1 - 0.9 ** (step + 1)) / spread).clamp(0, 1)
        start = image
        step_size = min(step_size * (4 if nearest == math.inf else 1), 0.05)
        if norm == "linf":
            tau, c = (0.9 * nearest, c) if hit else (tau, 2 * c)
            continue
        low, high = (low, min(high, c)) if hit else (max(low, c), high)
        c = 4 * c if high == math.inf else low**0.5 * high**0.5 if low else c / 2
        if nearest > 0.999 * before and high < math.inf:
            break
    low, high, result = 0.0, _size(best - image, norm), best
    for _ in range(10):
        middle = (low + high) / 2
        shorter = project(best[None], image[None], middle, norm)[0]
        if succeeds(shorter):
            result, high = shorter, middle
        else:
            low = middle
    return result


def square_of_one_image(
    case: LinearCase,
    n: int,
    eps: float,
    norm: Norm,
    areas: Sequence[float],
    targeted: bool,
    generator: Generator,
) -> tuple[Tensor, int]:
    """Andriushchenko et al. 2020, algorithm 1 for image ``n``, a query for each area; and the queries."""
    image, label = case.images[n], int(case.labels[n])
    (channels, height, width), power = image.shape, 2 if norm == "l2" else 1

    def integer(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    def signs(*shape: int) -> Tensor:
        return torch.randint(2, shape, generator=generator) * 2.0 - 1

    def unit(change: Tensor) -> Tensor:
        return change / max(_size(change, norm), 1e-12)

    def bump(side: int) -> Tensor:
        values = torch.zeros(side, side)
        for i, j in product(range(side), range(side)):
            lower = i >= side // 2
            rows = side - side // 2 if lower else side // 2
            ring = max(abs(i - lower * (side // 2) - rows // 2), abs(j - side // 2))
            values[i, j] = (1 - 2 * lower) * sum(1 / (r + 1) ** 2 for r in range(ring, side // 2 + 1))
        return (values.T if integer(2) else values) / values.norm()

    def first() -> Tensor:
        if norm == "linf":
            return image + eps * signs(1, channels, 1, width)[0]
        change, side = torch.zeros_like(image), max(1, min(height, width) // 5)
        for top, left in product(range(0, height - side + 1, side), range(0, width - side + 1, side)):
            sign = signs(1, channels, 1, 1)[0]
            change[:, top : top + side, left : left + side] = bump(side) * sign
        return image + eps * unit(change)

    def next_(x: Tensor, area: float) -> Tensor:
        side = min(max(round((area * height * width) ** 0.5), 1 if norm == "linf" else 3), height, width)

        def window() -> tuple[slice, slice, slice]:
            top, left = integer(height - side + 1), integer(width - side + 1)
            return slice(None), slice(top, top + side), slice(left, left + side)

        x = x.clone()
        if norm == "linf":
            into = window()
            x[into] += 2 * eps * signs(1, channels, 1, 1)[0]
            return x
        into, out_of = window(), window()
        sign = signs(1, channels, 1, 1)[0]
        change = x - image
        both = torch.zeros_like(image)
        both[into] = both[out_of] = 1
        mass = (change.abs() ** power).sum((1, 2))
        spare = max(eps**power - float(mass.sum()), 0) / channels
        available = ((change * both).abs() ** power).sum((1, 2)) + spare
        shape = bump(side) * sign
        new = shape / (shape.abs() ** power).sum((1, 2), keepdim=True) ** (1 / power) + unit(change[into])
        size = (new.abs() ** power).sum((1, 2)).clamp(min=1e-12)
        change[out_of] = 0
        change[into] = new * ((available / size) ** (1 / power))[:, None, None]
        return image + eps * unit(change)

    x, lowest = image, torch.inf
    for query, area in enumerate(areas):
        tried = next_(x, area) if query else first()
        tried = project(tried[None], image[None], eps, norm)[0]
        logits = case.model(tried[None])[0].detach()
        others = max(float(z) for k, z in enumerate(logits) if k != label)
        loss = -float(logits.log_softmax(0)[label]) if targeted else float(logits[label]) - others
        if loss < lowest:
            x, lowest = tried, loss
        if (logits.argmax() == label) == targeted:
            return tried, query + 2
    return x, len(areas) + 1
