"""Signs of masked gradients: whether an attack that fails says anything about the model."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Reference, batch_size, hookimpl, load_model, method, progress_bar
from phosphene import Model as AnyModel
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Cost, PixelRange, UnitRange, length, param, size

from ..attacks._gradients import (
    Loss,
    bare_gradient,
    climb,
    cross_entropy,
    difference_of_logits_ratio,
    margin,
    projected_ascent,
)
from ..attacks._lp_balls import project
from ..attacks.square import square
from ..models._ensembles import URIs, loaded_beside
from . import _gradient_masking_checks as signs
from ._gradient_masking_checks import Climb
from ._gradient_masking_result import GradientMasking

#: The radii that are tried beside 1, at which any picture may be made, in units of eps.
_RADII = (0.25, 0.5, 1.0, 2.0, 4.0)
#: How many random directions the gradient's is compared with, and the step along them, in units of eps.
_DIRECTIONS, _STEP = 4, 0.25
#: So many of the images are shown.
_SHOWN = 6


def finds_out_what_hides_a_linear_model() -> None:
    """A linear model is honest, and no more so behind rounded pixels, with huge logits, or with noise."""
    linear, huge = (nn.Linear(4, 2, bias=False) for _ in range(2))
    linear.weight.data = torch.tensor([[0.0, 0.0, 0.0, 0.0], [4.0, -3.0, 2.0, -1.0]])
    huge.weight.data = 1e4 * linear.weight.data
    plain, saturated = (
        load_model(nn.Sequential(nn.Flatten(), n), input_size=(1, 2, 2)) for n in (linear, huge)
    )
    images = torch.tensor([[[[0.5, 0.3], [0.5, 0.5]]], [[[0.4, 0.7], [0.4, 0.6]]]])
    labels = plain(images).argmax(1)
    for model, guilty in (
        (plain, set()),
        (
            plain.defended(lambda x: (10 * x).round() / 10, "rounded"),
            {"a gradient", "unbounded eps fools all"},
        ),
        (saturated, {"a gradient", "loss not saturated"}),
        (plain.defended(lambda x: x + 0.1 * torch.randn_like(x), "noise"), {"the same answer twice"}),
    ):
        found = gradient_masking_checks(model, images, labels, eps=0.3, steps=5, max_queries=30, seed=0)
        suspicious = {check.name for check in found.checks if check.verdict == "suspicious"}
        assert suspicious >= guilty and bool(suspicious) == bool(guilty), f"{suspicious}, not {guilty}"


@method(
    family="robustness",
    references=[
        Reference(
            key="athalye2018",
            title="Obfuscated Gradients Give a False Sense of Security",
            authors="Athalye, Carlini, Wagner",
            year=2018,
            url="https://arxiv.org/abs/1802.00420",
        ),
        Reference(
            key="carlini2019",
            title="On Evaluating Adversarial Robustness",
            authors="Carlini, Athalye, Papernot, Brendel, Rauber, Tsipras, Goodfellow, Madry, Kurakin",
            year=2019,
            url="https://arxiv.org/abs/1902.06705",
        ),
    ],
    invariants=[PixelRange(field="adversarial"), UnitRange(field="by_steps"), UnitRange(field="by_eps")],
    needs=["gradients"],
    cost=Cost(
        forward=size.images
        * (
            (9 + _DIRECTIONS)
            + (len(_RADII) + 2) * (param.steps + 1)
            + param.max_queries
            + length(param.models) * (param.steps + 2)
        ),
        backward=size.images
        * (4 + (len(_RADII) + 2) * (param.steps + 1) + length(param.models) * param.steps),
    ),
    tags=["evaluation"],
    batch_independent=False,
    oracle=finds_out_what_hides_a_linear_model,
    quick={"steps": 2, "max_queries": 10, "models": ()},
    demo={
        "models": ("builtin:shapes-resnet",),
        "images": "builtin:scenes/12",
        "eps": 4 / 255,
        "steps": 6,
        "max_queries": 100,
    },
)
def gradient_masking_checks(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Annotated[float, Field(gt=0, le=1, description="radius of the linf ball, pixels in [0, 1]")] = 8
    / 255,
    steps: Annotated[int, Field(ge=1, le=10_000, description="steps of the white-box attack")] = 20,
    max_queries: Annotated[
        int, Field(ge=1, le=1_000_000, description="pictures that the black-box attack may show for an image")
    ] = 500,
    models: URIs = (),
    seed: Seed = None,
) -> GradientMasking:
    """Look for the signs that a model hides its gradients, so that attacks which fail on it prove nothing.

    x <- clip(P(x + 2.5 r / steps sign(dL/dx))),  L the cross-entropy of ``labels``, in linf balls of radius r

    is the white-box attack whose failure would be taken for robustness; what is wrong with it is asked by
    what honest models never show. Suspicious is: another answer to the same picture; a gradient that is zero
    or not finite; one of the cross-entropy alone, whose logits are so far apart that softmax rounds to 1,
    or a ratio of logits (DLR) that gets further; one along which the logits' margin grows less than along
    random directions; one step that finds more than ``steps`` do; success and loss that do not rise with the
    steps; at r = 1, where any picture may be made, a single image that withstands, or a larger ball that
    finds less; ``square``, which sees no gradient, fooling the model where the attack did not; and the same
    of examples made on other ``models``.

    Each check gives a verdict, pass, suspicious or could not tell, with its reason and numbers. Rates are of
    the images that the model takes for their ``labels`` (N,), of the ``images`` (N, C, H, W) in [0, 1]; what
    is so for 5 % of them or fewer is taken for an accident. A defence that brings its own backward pass
    (``defended:``) is judged with it. No list of signs is complete: what passes may still be masked.
    Raises InputError where the model has no image right, ModelError where it lets no gradient through.

    Source: Athalye et al. 2018, section 3.1; Carlini et al. 2019, sections 3 to 5.
    """
    others = loaded_beside(model, models)
    first, again = (_logits(model, images) for _ in range(2))
    right = first.argmax(1) == labels
    if not right.any():
        raise InputError(f"{model.name} takes none of the images for their labels: nothing is to be attacked")
    x, y = images[right], labels[right]
    loss_gradients, margin_gradients = (_gradients(model, x, y, loss) for loss in (cross_entropy, margin))
    radii = sorted({min(1.0, part * eps) for part in _RADII} | {1.0})
    balls = {
        radius: climbed(model, x, y, cross_entropy, radius, steps)
        for radius in progress_bar(radii, "attacking in ever larger balls")
    }
    white = balls[eps]
    once = climbed(model, x, y, cross_entropy, eps, 1, step_size=eps)
    by_ratio = climbed(model, x, y, difference_of_logits_ratio, eps, steps)
    black = square(model, x, y, eps=eps, max_queries=max_queries, seed=seed).success
    checks = [
        signs.same_answer(first, again),
        signs.a_gradient(loss_gradients, margin_gradients),
        signs.not_saturated(loss_gradients, margin_gradients, white, by_ratio),
        signs.uphill(*_slopes(model, x, y, margin_gradients, _STEP * eps, seed or 0)),
        signs.beaten("many steps beat one", {f"{steps} steps": white.won}, {"one alone": once.won}),
        signs.more_steps(white),
        signs.unbounded({radius: ball.won for radius, ball in balls.items()}),
        signs.beaten("white box beats black box", {"the gradient": white.won}, {"square": black}),
        signs.beaten(
            "white box beats transfer",
            {"the gradient": white.won},
            {other.name: _transferred(other, model, x, y, eps, steps) for other in others},
        ),
    ]
    shown = slice(_SHOWN)
    said = _logits(model, white.points[shown]).argmax(1)
    return GradientMasking(
        names=tuple(check.name for check in checks),
        verdicts=tuple(check.verdict for check in checks),
        reasons=tuple(check.reason for check in checks),
        numbers=tuple(check.numbers for check in checks),
        eps=eps,
        by_steps=torch.stack([white.won_after(count) for count in range(steps + 1)]).to(images),
        radii=tuple(balls),
        by_eps=torch.stack([ball.won.double().mean() for ball in balls.values()]).to(images),
        images=x[shown],
        adversarial=white.points[shown],
        before=tuple(map(model.class_name, y[shown].tolist())),
        after=tuple(map(model.class_name, said.tolist())),
    )


def climbed(
    model: AnyModel,
    images: Tensor,
    labels: Tensor,
    loss: Loss,
    eps: float,
    steps: int,
    step_size: float | None = None,
) -> Climb:
    """Climb ``loss`` inside linf balls, each image until the model is fooled: how far it came, and when."""
    step_size = 2.5 * eps / steps if step_size is None else step_size
    points, after = images.clone(), torch.full_like(labels, steps + 1)
    start = highest = images.new_full((len(images),), -torch.inf)
    for step in range(steps + 1):
        if not len(rows := (after > steps).nonzero()[:, 0]):
            break
        for part in rows.split(batch_size(model)):
            _, gradient, logits = climb(model, points[part], labels[part], loss)
            height = margin(logits, labels[part])
            highest = highest.index_copy(0, part, torch.maximum(highest[part], height))
            won = logits.argmax(1) != labels[part]
            after[part[won]] = step
            moved = points[part] + step_size * gradient.nan_to_num().sign()
            moved = project(moved, images[part], eps, "linf")
            points[part] = torch.where(won[:, None, None, None] | (step == steps), points[part], moved)
        start = highest if step == 0 else start
    return Climb(points, after, steps, start, highest)


def _logits(model: AnyModel, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(some) for some in images.split(batch_size(model))])


def _gradients(model: AnyModel, images: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    size = batch_size(model)
    parts = zip(images.split(size), labels.split(size), strict=True)
    return torch.cat([bare_gradient(model, *part, loss)[0] for part in parts])


def _slopes(
    model: AnyModel, images: Tensor, labels: Tensor, gradients: Tensor, step: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """By how much the margin grows over a step along the gradient's signs (N,), and along random ones (D, N).

    And by how much the gradient promises, (N,).
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (_DIRECTIONS, 1, *images.shape[1:])
    random = torch.randint(2, shape, generator=generator).to(images) * 2 - 1
    start = margin(_logits(model, images), labels)

    def grown(direction: Tensor) -> tuple[Tensor, Tensor]:
        moved = (images + step * direction).clamp(0, 1)
        promised = ((moved - images) * gradients.nan_to_num()).sum((1, 2, 3))
        return margin(_logits(model, moved), labels) - start, promised

    along, promised = grown(gradients.nan_to_num().sign())
    return along, torch.stack([grown(direction)[0] for direction in random]), promised


def _transferred(
    surrogate: AnyModel, model: AnyModel, images: Tensor, labels: Tensor, eps: float, steps: int
) -> Tensor:
    """(N,) whether an example made on the surrogate, by momentum (MI-FGSM), fools the model."""
    surrogate.require_gradients()
    size, made = batch_size(surrogate), []
    with surrogate.guard():
        for some, theirs in zip(images.split(size), labels.split(size), strict=True):
            made.append(
                projected_ascent(
                    surrogate, some, theirs, eps=eps, step_size=2.5 * eps / steps, steps=steps, norm="linf",
                    targeted=False, momentum=1.0,
                )[0]
            )  # fmt: skip
    return _logits(model, torch.cat(made)).argmax(1) != labels


@hookimpl
def phosphene_methods():
    return [gradient_masking_checks]
