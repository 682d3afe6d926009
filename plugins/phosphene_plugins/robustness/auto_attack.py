"""AutoAttack: four attacks with nothing to tune, one after another, each on what the others left standing."""

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Model as AnyModel
from phosphene import Reference, hookimpl, load_model, method, methods, progress_bar
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Cost, PixelRange, SameShape, WithinBall, ceil, param, size

from ..attacks._gradients import bare_gradient, cross_entropy, judged, unreached
from ..attacks._lp_balls import Norm
from ._autoattack_result import AutoAttackExamples

#: The standard's steps, queries and target classes.
_STEPS, _QUERIES, _CLASSES = 100, 5000, 9


def breaks_a_linear_model_exactly_inside_its_margin() -> None:
    """Robust is (z_y - z_k) / ||w_k - w_y||_q > eps, q of the dual norm: no more, and no less."""
    away = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    linear = nn.Linear(12, 2, bias=False).double()
    linear.weight.data = torch.stack([away / 2, -away / 2])
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(3, 2, 2))
    grey = torch.full((12,), 0.5, dtype=torch.float64)
    grey = grey - away * (grey @ away) / away.square().sum()  # on the boundary
    norms: list[tuple[Norm, float]] = [("linf", 1.0), ("l2", 2.0), ("l1", torch.inf)]
    for norm, dual in norms:
        # Margins of so many eps, on either side of the boundary.
        shares = torch.tensor([0.5, 0.98, 1.02, -0.98, -1.02], dtype=torch.float64)
        images = grey + away * (0.05 * shares * away.norm(dual) / away.square().sum())[:, None]
        images = images.view(5, 3, 2, 2)
        found = auto_attack(model, images, (shares < 0).long(), eps=0.05, norm=norm, effort=0.1, seed=0)
        assert found.success.tolist() == [True, True, False, True, False], norm


@method(
    family="robustness",
    title="AutoAttack",
    references=[
        Reference(
            key="croce2020",
            title="Reliable evaluation of adversarial robustness with an ensemble of diverse "
            "parameter-free attacks",
            authors="Croce, Hein",
            year=2020,
            url="https://arxiv.org/abs/2003.01690",
        )
    ],
    invariants=[
        WithinBall(radius="eps", norm="norm"),
        PixelRange(field="adversarial"),
        SameShape(field="adversarial"),
    ],
    needs=["gradients"],
    cost=Cost(
        forward=size.images * (28 * ceil(100 * param.effort) + ceil(5000 * param.effort) + 29),
        backward=size.images * (19 * ceil(100 * param.effort) + 11),
    ),
    tags=["white-box", "black-box", "fixed-radius"],
    oracle=breaks_a_linear_model_exactly_inside_its_margin,
    quick={"effort": 0.005},
    demo={"images": "builtin:scenes/6", "eps": 2 / 255, "effort": 0.04},
)
def auto_attack(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Annotated[float, Field(gt=0, le=1000, description="radius of the ball, pixels in [0, 1]")] = 8 / 255,
    norm: Annotated[Norm, Field(description="what the ball is measured in")] = "linf",
    effort: Annotated[
        float, Field(gt=0, le=1, description="share of the standard's steps and queries; 1 is AutoAttack")
    ] = 1.0,
    seed: Seed = None,
) -> AutoAttackExamples:
    """Break what can be broken: APGD, APGD-T, FAB-T and Square in turn, each on what still stands.

    robust accuracy = share of images with f(x') = y for every x' that the four attacks find

    ``apgd`` climbs the cross-entropy, then the targeted difference of logits ratio towards each of the 9
    likeliest other classes; ``fab`` looks for the nearest boundary to each of these and counts where it
    is within ``eps``; ``square`` asks 5000 times and looks at no gradient. The others take 100 steps,
    and none restarts. There is nothing to tune: ``effort`` below 1 takes that share of the steps and queries
    for a first look, and the result says that it was no more. Of fewer than four classes the ratio is what
    ``apgd`` makes of it. ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,).

    ``broken_by`` tells which attack broke an image, ``robust_accuracy`` how many withstood them; these, and
    what is taken for another class from the outset, come back as they are. ``flags()`` says by name
    what makes the figure doubtful: "labels" (all wrong from the outset), "random" answers, "probabilities" in
    the place of logits, "no gradient", "square" (it broke what no gradient led to), "few classes",
    "effort". An image counts only where the model is right about it.

    Source: Croce & Hein 2020, sections 5 and 6; the flags are those of its authors' code, and some more.
    """
    told = {"norm": norm, "seed": seed or 0}
    steps, queries = math.ceil(_STEPS * effort), math.ceil(_QUERIES * effort)
    stages: dict[str, tuple[str, dict[str, Any]]] = {
        "apgd-ce": ("apgd", {"eps": eps, "steps": steps}),
        "apgd-t": ("apgd", {"eps": eps, "steps": steps, "loss": "dlr", "target_classes": _CLASSES}),
        "fab-t": ("fab", {"steps": steps, "target_classes": _CLASSES}),
        "square": ("square", {"eps": eps, "max_queries": queries}),
    }
    before, doubts = _looked_at(model, images, labels)
    adversarial, rows = images.clone(), unreached(before, labels, targeted=False)
    broken_by = ["clean"] * len(images)
    for n in rows.tolist():
        broken_by[n] = ""
    for stage, (name, params) in progress_bar(stages.items(), "attack after attack"):
        if not len(rows):
            break
        found: AdversarialExamples = methods[f"attacks.{name}"](
            model, images[rows], labels[rows], **told, **params
        )
        # The others never leave the ball.
        won = found.success & (found.distance(norm) <= eps) if name == "fab" else found.success
        adversarial[rows[won]] = found.adversarial[won]
        for n in rows[won].tolist():
            broken_by[n] = stage
        rows = rows[~won]
    seen = judged(model, images, adversarial, labels, before, targeted=False)
    # By the model's last word, which may be another if it is random.
    broken_by = [name if won else "" for name, won in zip(broken_by, seen.success.tolist(), strict=True)]
    always = ("few classes",) * (before.shape[1] < 4) + ("effort",) * (effort < 1)
    return AutoAttackExamples(
        **dict(seen.fields()),
        broken_by=tuple(broken_by),
        doubts=tuple(
            (*found, *(("square",) if name == "square" else ()), *always)
            for found, name in zip(doubts, broken_by, strict=True)
        ),
    )


def _looked_at(model: AnyModel, images: Tensor, labels: Tensor) -> tuple[Tensor, list[tuple[str, ...]]]:
    """The model's logits (N, K), and what looks wrong about them and about their gradients."""
    gradient, logits = bare_gradient(model, images, labels, cross_entropy)
    with torch.no_grad():
        again = model(images)
    steep = gradient.flatten(1).abs().amax(1)
    wrong = {
        "random": (again - logits).abs().amax(1) > 1e-4 * logits.abs().amax(1),
        "probabilities": (logits.amin(1) >= 0) & ((logits.sum(1) - 1).abs() < 1e-5) & (logits.shape[1] > 1),
        # Of an image that is to be attacked.
        "no gradient": ((steep == 0) | ~steep.isfinite()) & logits.argmax(1).eq(labels),
    }
    return logits, [tuple(name for name in wrong if wrong[name][n]) for n in range(len(images))]


@hookimpl
def phosphene_methods():
    return [auto_attack]
