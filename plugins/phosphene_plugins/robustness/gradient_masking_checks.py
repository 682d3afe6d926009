"""Checks for gradient masking (obfuscated gradients): whether failed attacks prove robustness."""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    InputError,
    Reference,
    batch_size,
    hookimpl,
    load_model,
    max_batch,
    method,
    progress_bar,
)
from phosphene import Model as AnyModel
from phosphene.attacks import project
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Cost, InvariantTo, Monotone, PixelRange, UnitRange, length, param, size
from phosphene.testing import linear_model

from ..attacks._gradients import loss_gradient, raw_gradient
from ..attacks._losses import Loss, cross_entropy, difference_of_logits_ratio, margin
from ..attacks.square import square
from ..models._ensembles import ModelURIs, load_compatible_models
from ._gradient_masking_result import GradientMasking
from ._masking_verdicts import (
    AttackTrajectory,
    check_beats_weaker_attack,
    check_deterministic,
    check_gradient_ascends,
    check_gradient_exists,
    check_loss_not_saturated,
    check_more_steps_help,
    check_unbounded_attack_succeeds,
)
from ._verdict_cases import verdicts_on_written_out_measurements

#: The radii tried, in units of eps, beside 1: in that ball lies every image.
_RADII = (0.25, 0.5, 1.0, 2.0, 4.0)
#: How many random directions the gradient is compared with, and the step along them in units of eps.
_DIRECTIONS, _STEP = 4, 0.25
#: Step size of the white-box attacks, in units of eps / steps.
_STEP_FACTOR = 2.5
#: Images in the result.
_EXAMPLES = 6


def identifies_how_a_linear_model_is_masked() -> None:
    """A linear model passes; behind rounded pixels, with huge logits or with noise it is suspicious."""
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0], [4.0, -3.0, 2.0, -1.0]]).view(2, 1, 2, 2)
    plain, saturated = linear_model(weight), linear_model(1e4 * weight)
    images = torch.tensor([[[[0.5, 0.3], [0.5, 0.5]]], [[[0.4, 0.7], [0.4, 0.6]]]])
    labels = plain(images).argmax(1)
    for model, expected in (
        (plain, set()),
        (
            plain.defended(lambda x: (10 * x).round() / 10, "rounded"),
            {"gradient exists", "unbounded attack succeeds"},
        ),
        (saturated, {"gradient exists", "loss not saturated"}),
        (plain.defended(lambda x: x + 0.1 * torch.randn_like(x), "noise"), {"deterministic"}),
    ):
        result = gradient_masking_checks(model, images, labels, eps=0.3, steps=5, max_queries=30, seed=0)
        suspicious = {check.name for check in result.checks if check.verdict == "suspicious"}
        assert suspicious >= expected, f"{suspicious}, not {expected}"
        assert bool(suspicious) == bool(expected), f"{suspicious}, not {expected}"
    result = gradient_masking_checks(plain, images, labels, eps=0.05, steps=5, max_queries=30, seed=0)
    signs = (1 - 2 * labels[:, None]) * torch.tensor([1.0, -1.0, 1.0, -1.0])
    torch.testing.assert_close(result.adversarial, (images + 0.05 * signs.view_as(images)).clamp(0, 1))
    margins = plain(images).diff(dim=1).abs()
    changes = [
        abs((plain((images + r * signs.view_as(images)).clamp(0, 1)) - plain(images)).diff(dim=1))
        for r in result.radii
    ]
    broken = torch.cat([margins < change for change in changes], 1).float().mean(0)
    torch.testing.assert_close(result.success_by_eps, broken)
    torch.testing.assert_close(torch.tensor(result.radii), torch.tensor([0.0125, 0.025, 0.05, 0.1, 0.2, 1.0]))


def numbers_on_a_linear_model_have_a_closed_form() -> None:
    """The margin m of w = w_1 - w_0 falls by r |w|_1 over steps of length r along the gradient's signs."""
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0], [4.0, -3.0, 2.0, -1.0]]).view(2, 1, 2, 2)
    model, w = linear_model(weight, bias=[0.0, -1.0]), weight[1].flatten()
    # Margins 0.03, 0.08, ..., 0.38 of class 1, far from the pixels' bounds.
    images = 0.5 + (0.05 * torch.arange(8) + 0.03).view(-1, 1, 1, 1) / 30 * weight[1:]
    labels = torch.ones(8, dtype=torch.int64)
    steps, eps = 5, 0.02  # the steps change the margin by 0.1 each, and eps by 0.2
    result = gradient_masking_checks(model, images, labels, eps=eps, steps=steps, max_queries=200, seed=0)
    torch.testing.assert_close(result.success_by_steps, torch.tensor([0, 2, 4, 4, 4, 4]) / 8)
    assert len(result.images) == 6 and torch.equal(result.images, images[:6])
    numbers = {check.name: check.numbers for check in result.checks}
    generator = torch.Generator().manual_seed(0)
    directions = torch.randint(2, (4, 1, 1, 2, 2), generator=generator).flatten(1) * 2.0 - 1
    growth = {"better_than_random": 1.0, "gain_ratio": 1.0, "along_gradient": 0.05}
    growth["along_random"] = -0.005 * float((directions @ w).mean())
    torch.testing.assert_close(numbers["gradient ascends"], growth, rtol=1e-3, atol=1e-6)
    assert 0 < numbers["white box beats black box"]["square"] <= 0.5


def attacks_by_hand() -> None:
    """The margins of the white-box attack on its way, growth at the pixels' bounds, and MI-FGSM."""
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 3)]
    for layer in (layers[1], layers[3]):
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    layers[1].weight.data[:, 0] = 0.0  # type: ignore[union-attr, index, operator]
    model = load_model(nn.Sequential(*layers), input_size=(3, 2, 2))
    images, eps = torch.rand(4, 3, 2, 2, generator=generator), 0.2
    images[1, :, 0] = 1.0
    labels = model(images).argmax(1)
    labels[2] = (labels[2] + 1) % 3  # misclassified

    def gradient_of(loss: Loss, points: Tensor) -> Tensor:
        points = points.detach().requires_grad_()
        return torch.autograd.grad(loss(model(points), labels).sum(), points)[0]

    x, margins = images, [margin(model(images), labels)]
    count, momentum, moved = torch.where(margins[0] > 0, 0, 4), torch.zeros_like(images), images
    for step in range(3):
        ascent = x + 2.5 * eps / 3 * gradient_of(cross_entropy, x).sign()
        ascent = torch.minimum(torch.maximum(ascent, images - eps), images + eps).clamp(0, 1)
        x = torch.where((count < 4)[:, None, None, None], x, ascent)
        margins.append(margin(model(x), labels))
        count = torch.where((margins[-1] > 0) & (count == 4), step + 1, count)
        gradient = gradient_of(cross_entropy, moved)
        momentum = momentum + gradient / gradient.abs().mean((1, 2, 3), keepdim=True)
        moved = moved + 2.5 * eps / 3 * momentum.sign()
        moved = torch.minimum(torch.maximum(moved, images - eps), images + eps).clamp(0, 1)
    attack = white_box_attack(model, images, labels, cross_entropy, eps, 3)
    torch.testing.assert_close(attack.points, x)
    assert attack.steps_to_success.tolist() == count.tolist()
    torch.testing.assert_close(attack.initial_margin, margins[0])
    torch.testing.assert_close(attack.best_margin, torch.stack(margins).amax(0))
    moved = torch.where(torch.arange(4)[:, None, None, None] == 2, images, moved)
    torch.testing.assert_close(_momentum_examples(model, images, labels, eps, 3), moved)
    success = model(moved).argmax(1) != labels
    assert _transfer_success(model, model, images, labels, eps, 3).tolist() == success.tolist()
    gradients = gradient_of(margin, images)
    along = (images + 0.02 * gradients.sign()).clamp(0, 1)
    growth, along_random, predicted = _margin_growth(model, images, labels, gradients, 0.02, 0)
    torch.testing.assert_close(growth, margin(model(along), labels) - margins[0])
    signs = torch.randint(2, (4, 1, 3, 2, 2), generator=torch.Generator().manual_seed(0)) * 2 - 1
    moved = (images + 0.02 * signs).clamp(0, 1).flatten(0, 1)
    grown = margin(model(moved), labels.repeat(4)).view(4, 4) - margins[0]
    torch.testing.assert_close(along_random, grown)
    torch.testing.assert_close(predicted, ((along - images) * gradients).sum((1, 2, 3)))


class _SignedRows(AnyModel):
    """A model whose logits have another sign in each row of a call."""

    signs: Tensor

    def for_rows(self, rows: Any) -> _SignedRows:
        view = copy.copy(self)
        view.signs = self.signs[rows]
        return view

    def __call__(self, images: Tensor) -> Tensor:
        assert len(images) == len(self.signs), "not the rows of the images"
        return self.signs[:, None] * super().__call__(images)


def rows_have_classifiers_of_their_own() -> None:
    """Attacks, gradients and logits of several rows are those of each row alone."""
    generator = torch.Generator().manual_seed(0)
    plain = linear_model(torch.randn(2, 1, 2, 3, generator=generator))
    model = _SignedRows(plain.module, **plain.settings)
    model.signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])
    images = torch.rand(5, 1, 2, 3, generator=generator)
    labels = (model.signs[:, None] * plain(images)).argmax(1)

    def measure(model: AnyModel, images: Tensor, labels: Tensor) -> list[Tensor]:
        attack = white_box_attack(model, images, labels, cross_entropy, 0.1, 3)
        gradients = _gradients(model, images, labels, cross_entropy)
        growth, along_random, _ = _margin_growth(model, images, labels, gradients, 0.02, 0)
        values = [
            attack.points,
            attack.steps_to_success,
            attack.best_margin,
            gradients,
            growth,
            along_random.T,
        ]
        return [*values, _predict_logits(model, images), _momentum_examples(model, images, labels, 0.1, 3)]

    with max_batch(2):
        together = measure(model, images, labels)
    for n in range(5):
        for values, alone in zip(
            together, measure(model.for_rows([n]), images[n : n + 1], labels[n : n + 1]), strict=True
        ):
            torch.testing.assert_close(values[n : n + 1], alone)


def one_step_transfers_to_the_same_model() -> None:
    """After one step MI-FGSM is the white-box attack, so both succeed on the same images."""
    model = load_model("builtin:shapes-resnet")
    images = torch.rand(4, *model.input_size, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(1)
    result = gradient_masking_checks(
        model, images, labels, eps=0.0015, steps=1, max_queries=1, models=("builtin:shapes-resnet",), seed=0
    )
    assert result.numbers[-1] == {"white box": 0.5, "builtin:shapes-resnet": 0.5}
    assert result.names_before == tuple(map(model.class_name, labels.tolist()))
    assert result.names_after == tuple(map(model.class_name, model(result.adversarial).argmax(1).tolist()))


def measures_what_masks_gradients() -> None:
    """Verdicts on masked linear models, the numbers behind them, and the attacks that they come from."""
    identifies_how_a_linear_model_is_masked()
    numbers_on_a_linear_model_have_a_closed_form()
    attacks_by_hand()
    rows_have_classifiers_of_their_own()
    one_step_transfers_to_the_same_model()
    verdicts_on_written_out_measurements()


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
    invariants=[
        PixelRange(field="adversarial"),
        UnitRange(field="success_by_steps"),
        UnitRange(field="success_by_eps"),
    ],
    relations=[
        InvariantTo("logit_shift", fields=("adversarial", "success_by_eps", "success_by_steps")),
        Monotone("eps", values=(0.001, 0.01, 0.1), measure="success_by_steps"),
    ],
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
    oracle=measures_what_masks_gradients,
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
        int, Field(ge=1, le=1_000_000, description="queries per image of the black-box attack")
    ] = 500,
    models: ModelURIs = (),
    seed: Seed = None,
) -> GradientMasking:
    """Gradient masking checks: whether an attack fails because the model hides its gradients.

    x <- clip(P(x + 2.5 r / steps sign(dL/dx))),  L the cross-entropy of ``labels``, in linf balls of radius r

    is the white-box attack whose failure could be mistaken for robustness. Nine checks look for behavior
    that a model with useful gradients does not show. Suspicious are:

    "deterministic": different logits for the same image;
    "gradient exists": a gradient that is zero or not finite;
    "loss not saturated": logits so far apart that softmax rounds to 1, or a ratio of logits (DLR) that
    succeeds more often than the cross-entropy;
    "gradient ascends": a gradient along which the logits' margin grows less than along random directions;
    "many steps beat one": one step of length eps that succeeds where ``steps`` do not;
    "more steps help": success and margin that do not rise with the steps;
    "unbounded attack succeeds": at r = 1, where the ball holds every image, an image that is not broken, or
    a larger ball with fewer successes;
    "white box beats black box": ``square``, which uses no gradient, succeeds where the attack does not;
    "white box beats transfer": so do examples computed on other ``models`` by MI-FGSM.

    Rates are over the images that the model classifies as their ``labels``; 5 % of them or fewer count as
    chance. A defense with its own backward pass (``defended:``) is checked with it. No list of checks is
    complete: a model that passes may still mask its gradients.

    Returns:
        ``checks`` with verdict ("pass", "suspicious", "inconclusive"), reason and numbers; ``masked`` whether
        any is suspicious; ``success_by_steps`` (steps + 1,), ``success_by_eps`` (E,) at ``radii``.

    Raises:
        InputError: no image is classified correctly.
        ModelError: no gradient flows to the images.

    Example::
        from phosphene import run

        result = run("gradient_masking_checks", images="builtin:scenes/2", steps=4, max_queries=20)
        result.masked, result.verdicts

    Source: Athalye et al. 2018, section 3.1; Carlini et al. 2019, sections 3 to 5.
    """
    others = load_compatible_models(model, models)
    first, second = (_predict_logits(model, images) for _ in range(2))
    correct = first.argmax(1) == labels
    if not correct.any():
        raise InputError(
            f"{model.name} classifies none of the images as its label: there is nothing to attack"
        )
    x, y, model = images[correct], labels[correct], model.for_rows(correct.nonzero()[:, 0])
    loss_gradients, margin_gradients = (_gradients(model, x, y, loss) for loss in (cross_entropy, margin))
    radii = sorted({min(1.0, factor * eps) for factor in _RADII} | {1.0})
    by_radius = {
        radius: white_box_attack(model, x, y, cross_entropy, radius, steps)
        for radius in progress_bar(radii, "attacking in larger balls")
    }
    white_box = by_radius[eps]
    single_step = white_box_attack(model, x, y, cross_entropy, eps, 1, step_size=eps)
    by_ratio = white_box_attack(model, x, y, difference_of_logits_ratio, eps, steps)
    queried = [
        square(model.for_rows(rows), x[rows], y[rows], eps=eps, max_queries=max_queries, seed=seed)
        for rows in _batches(model, x)
    ]
    black_box = torch.cat([result.success for result in queried])
    transfer = {
        other.name: _transfer_success(other.for_rows(correct.nonzero()[:, 0]), model, x, y, eps, steps)
        for other in others
    }
    growth = _margin_growth(model, x, y, margin_gradients, _STEP * eps, seed or 0)
    by_gradient = {"white box": white_box.success}
    checks = [
        check_deterministic(first, second),
        check_gradient_exists(loss_gradients, margin_gradients),
        check_loss_not_saturated(loss_gradients, margin_gradients, white_box, by_ratio),
        check_gradient_ascends(*growth),
        check_beats_weaker_attack(
            "many steps beat one", {f"{steps} steps": white_box.success}, {"one step": single_step.success}
        ),
        check_more_steps_help(white_box),
        check_unbounded_attack_succeeds({r: attack.success for r, attack in by_radius.items()}),
        check_beats_weaker_attack("white box beats black box", by_gradient, {"square": black_box}),
        check_beats_weaker_attack("white box beats transfer", by_gradient, transfer),
    ]
    examples = slice(_EXAMPLES)
    predictions = _predict_logits(model, white_box.points).argmax(1)[examples]
    by_steps = [white_box.success_rate_after(count) for count in range(steps + 1)]
    by_eps = [attack.success.cpu().double().mean() for attack in by_radius.values()]
    return GradientMasking(
        names=tuple(check.name for check in checks),
        verdicts=tuple(check.verdict for check in checks),
        reasons=tuple(check.reason for check in checks),
        numbers=tuple(check.numbers for check in checks),
        eps=eps,
        success_by_steps=torch.stack(by_steps).to(images),
        radii=tuple(by_radius),
        success_by_eps=torch.stack(by_eps).to(images),
        images=x[examples],
        adversarial=white_box.points[examples],
        names_before=tuple(map(model.class_name, y[examples].tolist())),
        # equivalent mutants: a name of a class by its number, also as a tensor
        names_after=tuple(map(model.class_name, predictions.tolist())),
    )


def white_box_attack(
    model: AnyModel,
    images: Tensor,
    labels: Tensor,
    loss: Loss,
    eps: float,
    steps: int,
    step_size: float | None = None,
) -> AttackTrajectory:
    """Gradient ascent on ``loss`` in an linf ball from the images; an image that is broken stops."""
    step_size = _STEP_FACTOR * eps / steps if step_size is None else step_size
    points, steps_to_success = images.clone(), torch.full_like(labels, steps + 1)
    initial_margin = best_margin = images.new_full((len(images),), -torch.inf)
    for step in range(steps + 1):
        active = (steps_to_success > steps).nonzero()[:, 0]
        if not len(active):
            break
        for rows in active.split(batch_size(model)):
            _, gradient, logits = loss_gradient(model.for_rows(rows), points[rows], labels[rows], loss)
            current_margin = margin(logits, labels[rows])
            best_margin = best_margin.index_copy(0, rows, torch.maximum(best_margin[rows], current_margin))
            success = logits.argmax(1) != labels[rows]
            steps_to_success[rows[success]] = step
            moved = points[rows] + step_size * gradient.sign()
            moved = project(moved, images[rows], eps, "linf")
            is_final = success[:, None, None, None] | (step == steps)
            points[rows] = torch.where(is_final, points[rows], moved)
        initial_margin = best_margin if step == 0 else initial_margin
    return AttackTrajectory(points, steps_to_success, steps, initial_margin, best_margin)


def _predict_logits(model: AnyModel, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.for_rows(rows)(images[rows]) for rows in _batches(model, images)])


def _batches(model: AnyModel, images: Tensor) -> tuple[Tensor, ...]:
    """Indices of the images of each batch."""
    return torch.arange(len(images)).split(batch_size(model))


def _gradients(model: AnyModel, images: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """The gradients at the images, NaN and infinity included."""
    batches = _batches(model, images)
    return torch.cat(
        [raw_gradient(model.for_rows(rows), images[rows], labels[rows], loss)[0] for rows in batches]
    )


def _margin_growth(
    model: AnyModel, images: Tensor, labels: Tensor, gradients: Tensor, step: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Growth of the margin over a step along the gradient's signs (N,) and along random signs (D, N).

    And the growth along the gradient that it predicts to first order, (N,).
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (_DIRECTIONS, 1, *images.shape[1:])
    directions = torch.randint(2, shape, generator=generator).to(images) * 2 - 1
    initial = margin(_predict_logits(model, images), labels)

    def growth(direction: Tensor) -> tuple[Tensor, Tensor]:
        moved = (images + step * direction).clamp(0, 1)
        predicted = ((moved - images) * gradients.nan_to_num()).sum((1, 2, 3))
        return margin(_predict_logits(model, moved), labels) - initial, predicted

    along_gradient, predicted = growth(gradients.nan_to_num().sign())
    along_random = torch.stack([growth(direction)[0] for direction in directions])
    return along_gradient, along_random, predicted


def _transfer_success(
    surrogate: AnyModel, model: AnyModel, images: Tensor, labels: Tensor, eps: float, steps: int
) -> Tensor:
    """(N,) bool, whether the model misclassifies examples computed on the surrogate."""
    surrogate.require_gradients()
    with surrogate.guard():
        examples = torch.cat(
            [
                _momentum_examples(surrogate.for_rows(rows), images[rows], labels[rows], eps, steps)
                for rows in _batches(surrogate, images)
            ]
        )
    return _predict_logits(model, examples).argmax(1) != labels


def _momentum_examples(model: AnyModel, images: Tensor, labels: Tensor, eps: float, steps: int) -> Tensor:
    """MI-FGSM (Dong et al. 2018) on the images that the model classifies correctly; the others unchanged.

    g <- g + gradient / mean|gradient|,  x <- clip(P(x + 2.5 eps / steps sign(g)))
    """
    step_size = _STEP_FACTOR * eps / steps
    _, gradient, logits = loss_gradient(model, images, labels, cross_entropy)
    correct = logits.argmax(1).eq(labels).nonzero()[:, 0]
    x, y, gradient = images[correct], labels[correct], gradient[correct]
    x_adv, momentum = x, torch.zeros_like(x)
    for step in progress_bar(range(steps), "MI-FGSM"):
        if not len(x):
            break
        if step:
            _, gradient, _ = loss_gradient(model, x_adv, y, cross_entropy)
        scale = gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)
        momentum = momentum + gradient / scale
        x_adv = project(x_adv + step_size * momentum.sign(), x, eps, "linf")
    return images.index_copy(0, correct, x_adv)


@hookimpl
def phosphene_methods():
    return [gradient_masking_checks]
