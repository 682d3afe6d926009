"""AutoAttack: a parameter-free ensemble of APGD, targeted APGD, targeted FAB and Square."""

import math
from itertools import cycle
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Model as AnyModel
from phosphene import Reference, hookimpl, method, methods, progress_bar
from phosphene.attacks import Norm, build_result
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import (
    Agrees,
    Cost,
    InvariantTo,
    Monotone,
    PixelRange,
    SameShape,
    WithinBall,
    ceil,
    param,
    size,
)
from phosphene.testing import linear_model

from ..attacks._gradients import raw_gradient
from ..attacks._losses import cross_entropy
from ._autoattack_result import AutoAttackExamples

#: Steps, queries and target classes of the standard.
_STEPS, _QUERIES, _CLASSES = 100, 5000, 9
_EFFORT_STEPS, _EFFORT_QUERIES = ceil(_STEPS * param.effort), ceil(_QUERIES * param.effort)


def robust_exactly_where_the_margin_of_a_linear_model_exceeds_eps() -> None:
    """An image is robust if and only if (z_y - z_k) / ||w_k - w_y||_q > eps, q of the dual norm."""
    normal = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = linear_model(torch.stack([normal / 2, -normal / 2]).view(2, 3, 2, 2))
    gray = torch.full((12,), 0.5, dtype=torch.float64)
    boundary = gray - normal * (gray @ normal) / normal.square().sum()
    norms: list[tuple[Norm, float]] = [("linf", 1.0), ("l2", 2.0), ("l1", torch.inf)]
    for norm, dual in norms:
        # Margins in units of eps, on either side of the boundary.
        margins = torch.tensor([0.5, 0.98, 1.02, -0.98, -1.02], dtype=torch.float64)
        images = boundary + normal * (0.05 * margins * normal.norm(dual) / normal.square().sum())[:, None]
        images = images.view(5, 3, 2, 2)
        result = auto_attack(model, images, (margins < 0).long(), eps=0.05, norm=norm, effort=0.1, seed=0)
        assert result.success.tolist() == [True, True, False, True, False], norm
        distance, outside = result.distance(norm), ~result.success
        assert (distance >= 0.05 * margins.abs())[result.success].all() and (distance <= 0.05).all(), norm
        torch.testing.assert_close(result.adversarial[outside], images[outside])
        torch.testing.assert_close(result.confidence_after, model(result.adversarial).softmax(1).amax(1))
        assert result.broken_by == ("apgd-ce", "apgd-ce", "", "apgd-ce", ""), norm
        assert result.warnings == (("few classes", "effort"),) * 5, norm
    assert result.clean_accuracy == 1 and result.robust_accuracy == 0.4


def warnings_name_what_is_wrong_with_a_model() -> None:
    """Probabilities, noise and zero gradients; rounded pixels, where Square alone succeeds."""
    weight = torch.tensor([[0.0, 0, 0, 0], [4, -3, 2, 0]], dtype=torch.float64).view(2, 1, 2, 2)
    images = torch.tensor([[[[0.5, 0.55], [0.5, 0.5]]], [[[0.3, 0.8], [0.4, 0.6]]]], dtype=torch.float64)
    labels = torch.tensor([1, 0])  # the predicted classes
    # Differs between any two passes by the same amount: drawn noise is at times below the tolerance.
    signs = cycle((1, -1))
    noise: Any = lambda x: x + 1e-4 * next(signs)
    normal, constant = linear_model(weight), torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    models: list[tuple[AnyModel, list[tuple[str, ...]]]] = [
        (normal, [(), ()]),
        (linear_model(weight.abs()), [(), ()]),  # a gradient of the loss without positive numbers
        (normal.defended(noise, "noise"), [("random",)] * 2),
        (linear_model(weight, bias=[0.0, -50.0]).defended(noise, "noise"), [(), ()]),  # below the tolerance
        (linear_model(constant), [(), ("no gradient",)]),  # predicts 0, so the first image is wrong already
        (linear_model(constant, bias=[1.5, -0.5]), [(), ("no gradient",)]),  # the sum alone is 1
        (linear_model(constant, bias=[2.0, 2.0]), [(), ("no gradient",)]),
        (linear_model(constant, bias=[1.0, 0.0]), [("probabilities",), ("probabilities", "no gradient")]),
        (linear_model(constant[:1], bias=[1.0]), [("no gradient",)] * 2),
    ]
    for model, expected in models:
        classes = labels.clamp(max=model(images).shape[1] - 1)
        assert _inspect(model, images, classes)[1] == expected, model
    four = linear_model(torch.cat([weight, weight]), bias=[0.0, 0.0, -9.0, -9.0])
    result = auto_attack(four, images, labels * 0 + 3, seed=0)
    assert result.broken_by == ("clean",) * 2 and result.warnings == ((),) * 2
    assert {*result.flags()} == {"labels"} and torch.equal(result.adversarial, images)
    # With the least effort a step of APGD, from the start of the seed.
    least = auto_attack(normal, images, labels, eps=0.5, norm="l2", effort=0.001, seed=1)
    step = methods["attacks.apgd"](normal, images, labels, eps=0.5, norm="l2", steps=1, seed=1)
    assert least.success.all() and torch.equal(least.adversarial, step.adversarial)
    rounded = normal.defended(lambda x: (10 * x).round() / 10, "rounded")
    result = auto_attack(rounded, images, labels, eps=0.12, effort=0.02, seed=0)
    always = ("few classes", "effort")
    assert result.broken_by == ("", "square")
    assert result.warnings == (("no gradient", *always), ("no gradient", "square", *always))


def robust_where_it_has_to_be() -> None:
    """Robust exactly beyond the margin of a linear model; warnings about models of other kinds."""
    robust_exactly_where_the_margin_of_a_linear_model_exceeds_eps()
    warnings_name_what_is_wrong_with_a_model()


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
    relations=[
        InvariantTo("logit_shift", fields=("adversarial",)),
        Monotone("eps", values=(1e-4, 1e-3, 1e-2), measure="success"),
        # Where the first attack breaks every image.
        Agrees("attacks.apgd", where={"eps": 0.3}, other={"eps": 0.3, "steps": 1}, fields=("adversarial",)),
    ],
    needs=["gradients"],
    # Forward per step: 1 of APGD, 1 per class of APGD-T, 2 per class of FAB-T. Besides, a start of APGD per
    # run, and 2, 2 and 12 passes of APGD, APGD-T and FAB-T around their loops, 3 here.
    cost=Cost(
        forward=size.images
        * ((1 + 3 * _CLASSES) * _EFFORT_STEPS + _EFFORT_QUERIES + (1 + _CLASSES) + (2 + 2 + 12 + 3)),
        backward=size.images * ((1 + 2 * _CLASSES) * _EFFORT_STEPS + (1 + _CLASSES) + 1),
    ),
    tags=["white-box", "black-box", "fixed-radius"],
    oracle=robust_where_it_has_to_be,
    exempt={"parameters_matter": "effort matters only where the first steps of every attack fail"},
    quick={"effort": 0.005},
    demo={"images": "builtin:scenes/6", "eps": 2 / 255, "effort": 0.04},
)
def auto_attack(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Annotated[float, Field(gt=0, le=1000, description="radius of the ball, pixels in [0, 1]")] = 8 / 255,
    norm: Annotated[Norm, Field(description="norm of the ball")] = "linf",
    effort: Annotated[
        float, Field(gt=0, le=1, description="share of the standard's steps and queries; 1 is AutoAttack")
    ] = 1.0,
    seed: Seed = None,
) -> AutoAttackExamples:
    """AutoAttack: adversarial examples by APGD, APGD-T, FAB-T and Square, and robust accuracy.

    robust accuracy = share of images with f(x') = y for every x' that the four attacks return

    Each attack runs on the images that the earlier ones did not break: ``apgd`` on the cross-entropy;
    ``apgd`` on the targeted difference of logits ratio, towards each of the 9 most likely other classes;
    ``fab`` towards the same classes, where its example is within ``eps``; and ``square`` with 5000 queries.
    The others take 100 steps, without restarts. Nothing is tuned. ``effort`` below 1 reduces steps and
    queries for a first impression, and adds the flag "effort". ``images`` (N, C, H, W) in [0, 1],
    ``labels`` (N,).

    Returns:
        ``adversarial`` (N, C, H, W), unchanged for images that are not broken or misclassified from the
        start; ``broken_by`` (N,) the attack that broke each image; ``robust_accuracy``; ``flags()`` with
        reasons to doubt the result: "labels" (all misclassified from the start), "random" logits,
        "probabilities" instead of logits, "no gradient", "square" (it succeeded where gradients did not),
        "few classes", "effort".

    Raises:
        ModelError: no gradient flows to the images.

    Example::
        from phosphene import run

        result = run("auto_attack", images="builtin:scenes/2", eps=2 / 255, effort=0.01)
        result.robust_accuracy, result.broken_by

    Source: Croce & Hein 2020, sections 5 and 6; the flags extend those of the authors' code.
    """
    common = {"norm": norm, "seed": seed or 0}
    steps, queries = math.ceil(_STEPS * effort), math.ceil(_QUERIES * effort)
    stages: dict[str, tuple[str, dict[str, Any]]] = {
        "apgd-ce": ("apgd", {"eps": eps, "steps": steps}),
        "apgd-t": ("apgd", {"eps": eps, "steps": steps, "loss": "dlr", "target_classes": _CLASSES}),
        "fab-t": ("fab", {"steps": steps, "target_classes": _CLASSES}),
        "square": ("square", {"eps": eps, "max_queries": queries}),
    }
    before, warnings = _inspect(model, images, labels)
    correct = before.argmax(1) == labels
    broken_by = ["" if is_correct else "clean" for is_correct in correct.tolist()]
    adversarial, remaining = images.clone(), correct.nonzero()[:, 0]
    for stage, (name, params) in progress_bar(stages.items(), "attack by attack"):
        if not len(remaining):
            break
        result: AdversarialExamples = methods[f"attacks.{name}"](
            model, images[remaining], labels[remaining], **common, **params
        )
        success = result.success
        if name == "fab":  # a minimum-norm attack: its example may lie outside the ball
            success = success & (result.distance(norm) <= eps)
        adversarial[remaining[success]] = result.adversarial[success]
        for n in remaining[success]:
            broken_by[n] = stage
        remaining = remaining[~success]
    examples = build_result(model, images, adversarial, labels, before, targeted=False)
    # A random model may classify the final examples differently: the last pass decides.
    success_list = examples.success.tolist()
    broken_by = [name if success else "" for name, success in zip(broken_by, success_list, strict=True)]
    always = ("few classes",) * (before.shape[1] < 4) + ("effort",) * (effort < 1)
    return AutoAttackExamples(
        **dict(examples.fields()),
        broken_by=tuple(broken_by),
        warnings=tuple(
            (*names, *(("square",) if attack == "square" else ()), *always)
            for names, attack in zip(warnings, broken_by, strict=True)
        ),
    )


def _inspect(model: AnyModel, images: Tensor, labels: Tensor) -> tuple[Tensor, list[tuple[str, ...]]]:
    """The logits (N, K), and the names of the warnings about them or their gradient, by image."""
    gradient, logits = raw_gradient(model, images, labels, cross_entropy)
    with torch.no_grad():
        repeated = model(images)
    largest = gradient.flatten(1).abs().amax(1)
    is_distribution = (logits.amin(1) >= 0) & ((logits.sum(1) - 1).abs() < 1e-5)
    conditions = {
        "random": (repeated - logits).abs().amax(1) > 1e-4 * logits.abs().amax(1),
        "probabilities": is_distribution & (logits.shape[1] > 1)
        | bool(model.output_activation(logits, images)),
        # Only of an image that will be attacked.
        "no gradient": ((largest == 0) | ~largest.isfinite()) & logits.argmax(1).eq(labels),
    }
    return logits, [tuple(name for name in conditions if conditions[name][n]) for n in range(len(images))]


@hookimpl
def phosphene_methods():
    return [auto_attack]
