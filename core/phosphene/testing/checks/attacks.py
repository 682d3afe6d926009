"""Checks of attacks: honest predictions, labels that matter, success, a loss that rises, larger radii."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import PhospheneError
from ...results import AdversarialExamples
from ..candidates import larger_parameters
from ..cases import MOST_PASSES, Case, declared_cost, properties_of
from ..observation import Observation
from .base import register_check, result_of

if TYPE_CHECKING:
    from ...models import Model
    from .base import AnyMethod


def _no_attack(method: AnyMethod) -> str | None:
    return None if issubclass(method.result, AdversarialExamples) else "it is no attack"


def _no_labels(method: AnyMethod) -> str | None:
    return _no_attack(method) or (None if method.spec.input("labels") else "it takes no labels")


def _no_eps(method: AnyMethod) -> str | None:
    return _no_attack(method) or (None if "eps" in method.spec.params.model_fields else "it has no eps")


def logits_of(model: Model, images: Tensor) -> Tensor:
    """The model's logits without gradients, in eval mode."""
    with model.guard(), torch.no_grad():
        return model(images)


@register_check(
    "observation",
    "What is reported for the images before the attack is the model's prediction of them.",
    "before, confidence_before and names_before are those of the unchanged images",
    _no_attack,
)
def honest_before(method: AnyMethod, run: Observation) -> None:
    result = run.result
    for name in ("images", "labels"):
        if (declared := method.spec.input(name)) is not None and declared.name in run.tensors_before:
            passed = run.tensors_before[declared.name]
            assert torch.equal(getattr(result, name).to(passed), passed), f"{name} are not those passed in"
    logits, views = run.logits(method, result.images), run.attacked_models(method)
    top = logits.topk(min(2, logits.shape[1])).values
    clear = (top[:, 0] - top[:, -1] > 1e-5 * top[:, 0].abs()) if top.shape[1] > 1 else top[:, 0] == top[:, 0]
    confidence = (views or [run.model])[0].to_probabilities(logits, result.images).amax(1)
    for n in clear.nonzero().flatten().tolist():
        predicted = int(logits[n].argmax())
        assert int(result.before[n]) == predicted, (
            f"image {n}: before is class {int(result.before[n])}, the model predicts {predicted}"
        )
        name = (run.model if views is None else views[n]).class_name(predicted)
        assert result.names_before[n] == name, (
            f"image {n}: names_before is {result.names_before[n]!r}, not {name!r}"
        )
        reported = float(result.confidence_before[n])
        assert abs(reported - float(confidence[n])) < 1e-3, (
            f"image {n}: confidence_before is {reported:.4f}, the model's is {float(confidence[n]):.4f}"
        )


@register_check(
    "observation",
    "The queries of a black-box attack are the images that it passed through the model.",
    "count every image that is passed, also those whose change is not accepted",
    _no_attack,
)
def counts_its_queries(method: AnyMethod, run: Observation) -> None:
    if run.result.queries is None:
        return
    reported, passed = float(run.result.queries.sum()), run.passes.forward
    # The predictions before and after the attack, and of the start, need not be counted.
    least = passed - 4 * run.case.count
    assert 0.9 * least <= reported <= passed, f"{reported:.0f} queries are reported, {passed} images passed"


@register_check(
    "method",
    "What a field ``before`` has for the images are the classes that the model predicts for them.",
    "the prediction before the change: of the images, not of the changed ones",
    lambda method: (
        "its result has no field before"
        if "before" not in getattr(method.result, "__dataclass_fields__", {})
        else "the check honest_before tests it"
        if issubclass(method.result, AdversarialExamples)
        else None
        if method.spec.input("model") and method.spec.input("images")
        else "it takes no images of a model"
    ),
    exemptible=True,
)
def predictions_before_are_of_the_images(method: AnyMethod) -> None:
    name = str(getattr(method.spec.input("images"), "name", ""))
    schemas = {n: s for n, s in properties_of(method.spec.params_schema).items() if n != method.seed}
    ends = [{n: s[end]} for n, s in schemas.items() for end in ("minimum", "maximum") if end in s]
    for params in ({}, *ends):
        case = Case("fragile", "noise", count=6, params=params)
        model, cost = case.model(), declared_cost(method, case)
        if cost is not None and sum(cost) > MOST_PASSES:
            continue
        if (result := result_of(method, case, model)) is None:
            continue
        logits, before = logits_of(model, case.inputs(method, model)[name]), result.before
        if not isinstance(before, Tensor) or tuple(before.shape) != (6,) or before.is_floating_point():
            return
        wrong = before.ne(logits.argmax(1)).nonzero().flatten().tolist()
        assert not wrong, (
            f"image {wrong[0]}: before is class {int(before[wrong[0]])}, the model predicts "
            f"{int(logits[wrong[0]].argmax())}{f', with {params}' if params else ''}"
        )


#: The number of images of an attack's trial.
COUNT = 4


def _strong_parameters(method: AnyMethod, case: Case, factor: float = 16) -> dict[str, Any]:
    """Parameters with which an attack should succeed: more steps, and a radius of many times the default."""
    params = larger_parameters(method, case, limit=1500)
    schema = properties_of(method.spec.params_schema).get("eps", {})
    usual = params.get("eps", schema.get("default"))
    if isinstance(usual, (int, float)):
        value = min(factor * usual, schema.get("maximum", schema.get("exclusiveMaximum", 1e9) * 0.999))
        params["eps"] = max(value, schema.get("minimum", 0))
    return params


def _attack(
    method: AnyMethod, case: Case, labels: Tensor | None = None, images: Tensor | None = None
) -> tuple[Any, Model] | None:
    """An attack's result on the case's images, labeled as the model predicts them, and the model."""
    model = case.model()
    inputs = case.inputs(method, model)
    if images is not None:
        inputs[_images(method)] = images
    if (declared := method.spec.input("labels")) is not None:
        predicted = logits_of(model, inputs[_images(method)]).argmax(1)
        inputs[declared.name] = predicted if labels is None else labels
    try:
        return method(**(inputs | case.arguments(method))), model
    except PhospheneError:
        return None


def _images(method: AnyMethod) -> str:
    declared = method.spec.input("images")
    return declared.name if declared is not None else "images"


def _trial_cases(method: AnyMethod) -> list[Case]:
    cases = [Case(network, "noise", count=COUNT) for network in ("fragile", "functional", "shapes-vgg")]
    return [replace(case, params=_strong_parameters(method, case)) for case in cases]


@register_check(
    "method",
    "With a large radius and enough steps, it fools a network for some of several images.",
    "the loss, its sign, and where the best perturbation is stored",
    _no_attack,
    exemptible=True,
)
def attack_succeeds(method: AnyMethod) -> None:
    answered = 0
    for case in _trial_cases(method):
        if (run := _attack(method, case)) is None:
            continue
        answered += 1
        result, model = run
        after = logits_of(model, result.adversarial).argmax(1)
        truth = after.eq(result.labels) if result.targeted else after.ne(result.labels)
        if truth.any() or (result.targeted and result.success.any()):
            return
    assert not answered, (
        f"no adversarial example in {answered * COUNT} images of {answered} networks, with the parameters "
        f"{_trial_cases(method)[0].params}"
    )


@register_check(
    "method",
    "It reports that a network returns probabilities, whose gradient can vanish, instead of logits.",
    "AdversarialExamples.from_logits and attacks.build_result set output_activation",
    _no_attack,
)
def probabilities_are_reported(method: AnyMethod) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = result_of(method, Case("probabilities", "noise"))
    if result is not None:
        assert result.output_activation == "sigmoid", (
            f"output_activation is {result.output_activation!r} for a network that ends in a sigmoid"
        )


@register_check(
    "method",
    "The loss of the label is larger for adversarial examples than for the images; of a target, smaller.",
    "the sign of the step: away from a label, towards a target class",
    _no_labels,
    exemptible=True,
)
def attack_moves_the_loss(method: AnyMethod) -> None:
    for targeted in (False, True):
        if targeted and "targeted" not in method.spec.params.model_fields:
            continue
        for case in _trial_cases(method)[:1]:
            params = dict(case.params) | ({"targeted": True} if targeted else {})
            case = replace(case, params=params)
            model = case.model()
            images = case.inputs(method, model)[_images(method)]
            labels = logits_of(model, images).argsort(1, descending=True)[:, 1] if targeted else None
            if (run := _attack(method, case, labels)) is None:
                continue
            result, model = run
            change = F.cross_entropy(
                logits_of(model, result.adversarial), result.labels, reduction="none"
            ) - F.cross_entropy(logits_of(model, result.images), result.labels, reduction="none")
            sign = -1 if result.targeted else 1
            mean = float(change.double().mean())
            assert sign * mean >= -1e-4, (
                f"the mean cross-entropy of the {'target' if result.targeted else 'label'} "
                f"{'rose' if mean > 0 else 'fell'} by {abs(mean):.3g}"
            )


@register_check(
    "method",
    "Other labels return another result, of targeted attacks too.",
    "the labels that were passed in, not the predicted classes",
    lambda method: (
        None
        if method.spec.input("labels") and method.spec.input("images")
        else "it takes no labels of images"
    ),
    exemptible=True,
)
def labels_matter(method: AnyMethod) -> None:
    for targeted in (False, True) if "targeted" in method.spec.params.model_fields else (None,):
        params = {} if targeted is None else {"targeted": targeted}
        compared = 0
        for case in _trial_cases(method):
            results = _results_of_labels(method, replace(case, params={**case.params, **params}))
            compared += max(0, len(results) - 1)
            if any(not _same_answer(results[0], result) for result in results[1:]):
                break
        else:
            where = f" with targeted={targeted}" if targeted else ""
            assert not compared, f"the result was the same for other labels{where}, {compared} times"


def _results_of_labels(method: AnyMethod, case: Case) -> list[Any]:
    """Results with the predicted classes as labels, with the second and with the last ones."""
    model = case.model()
    order = logits_of(model, case.inputs(method, model)[_images(method)]).argsort(1, descending=True)
    # An attack that is successful at once has no direction: its target is never the predicted class.
    ranks = (1, -1) if case.params.get("targeted") else (0, 1, -1)
    runs = [_attack(method, case, order[:, min(rank, order.shape[1] - 1)]) for rank in ranks]
    return [run[0] for run in runs if run is not None]


def _same_answer(first: Any, second: Any) -> bool:
    """Whether two results are the same but for the labels that they repeat."""
    if isinstance(first, AdversarialExamples):
        return torch.equal(first.adversarial, second.adversarial)
    fields = [(name, value) for name, value in first.fields() if name not in ("labels", "names_label")]
    return all(_equal(value, getattr(second, name)) for name, value in fields)


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return isinstance(first, Tensor) is isinstance(second, Tensor) and repr(first) == repr(second)


@register_check(
    "method",
    "A larger eps does not perturb less or fool less, on average.",
    "where eps enters: the step, the projection, their units (pixels in [0, 1])",
    _no_eps,
    exemptible=True,
)
def larger_eps_perturbs_more(method: AnyMethod) -> None:
    base = Case("fragile", "noise", count=COUNT)
    sizes, rates = [], []
    for factor in (0.25, 4.0):
        case = replace(base, params=_strong_parameters(method, base, factor))
        if (run := _attack(method, case)) is None:
            return
        result, model = run
        changed = (result.adversarial - result.images).flatten(1).double()
        sizes.append(float(changed.abs().mean()))
        after = logits_of(model, result.adversarial).argmax(1)
        rates.append(
            float((after.eq(result.labels) if result.targeted else after.ne(result.labels)).double().mean())
        )
    assert sizes[1] >= 0.99 * sizes[0] or rates[1] > rates[0], (
        f"the mean change of a pixel is {sizes[0]:.3g} with a small eps and {sizes[1]:.3g} with 16 times that"
    )
    assert rates[1] >= rates[0] - 0.25, (
        f"{rates[0]:.0%} succeed with a small eps, {rates[1]:.0%} with 16 times as much"
    )


@register_check(
    "method",
    "Where no small perturbation succeeds, it uses at least a part of the radius eps.",
    "the unit of eps (pixels in [0, 1]), the size of a step",
    _no_eps,
    exemptible=True,
)
def uses_its_radius(method: AnyMethod) -> None:
    case = Case("robust", "noise", count=2)
    case = replace(case, params=_strong_parameters(method, case, 0.25))
    model = case.model()
    images = 0.25 + 0.5 * case.inputs(method, model)[_images(method)]
    if (run := _attack(method, case, images=images)) is None:
        return
    result, _ = run
    unchanged = torch.equal(result.adversarial, result.images)
    if bool(result.success.any()) or unchanged:  # an attack that fails may return the images
        return
    params = method.validate(case.arguments(method))
    norm = _norm(params)
    norms = ("l2", "linf") if norm is None else (norm,)
    sizes = (result.adversarial - result.images).abs()
    sizes = sizes[sizes != 0].double()
    if "norm" not in params and float(sizes.max()) < 1.001 * float(sizes.median()):
        norms = ("linf",)  # every pixel is changed by as much: a step along the sign of the gradient
    share = max(float(result.distance(norm).max()) for norm in norms) / params["eps"]
    assert share >= 0.3, f"the largest perturbation is {share:.1%} of eps={params['eps']:.3g}"


def _norm(params: Mapping[str, Any]) -> str | None:
    """The norm that the parameters name; None if they name none, or another than l1, l2 and linf."""
    name = f"l{str(params.get('norm')).lower().removeprefix('l')}"
    return name if name in ("l1", "l2", "linf") else None


#: Names of a parameter that is the radius of a ball, and the smallest default that is no numerical constant.
RADIUS, SMALLEST_RADIUS = ("eps", "epsilon", "radius"), 1e-3


def _radius(method: AnyMethod) -> str | None:
    """The parameter that is the radius of the ball, if the method has one."""
    for name, schema in properties_of(method.spec.params_schema).items():
        usual = method.spec.quick.get(name, schema.get("default"))
        if name in RADIUS and isinstance(usual, (int, float)) and usual >= SMALLEST_RADIUS:
            return name
    return None


@register_check(
    "method",
    "Adversarial examples lie within the radius of the images, in the norm that is named.",
    "the projection onto the ball after every step, and its norm",
    lambda method: _no_attack(method) or (None if _radius(method) else "it has no radius"),
    exemptible=True,
)
def stays_within_its_radius(method: AnyMethod) -> None:
    name, schemas = str(_radius(method)), properties_of(method.spec.params_schema)
    usual = method.spec.quick.get(name, schemas[name].get("default"))
    for network in ("robust", "functional"):
        base = Case(network, "noise", count=2)
        params = larger_parameters(method, base, limit=600) | {name: max(usual / 4, _smallest(schemas[name]))}
        for norm in schemas["norm"].get("enum", [None]) if "norm" in schemas else [None]:
            case = replace(base, params=params | ({} if norm is None else {"norm": norm}))
            if (run := _attack(method, case)) is not None:
                _assert_within_radius(run[0], method.validate(case.arguments(method)), name)


def _smallest(schema: dict[str, Any]) -> float:
    """The smallest value that a parameter's bounds allow, up to a margin where they exclude it."""
    return schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1e-3)


def _assert_within_radius(result: Any, params: dict[str, Any], name: str) -> None:
    # Without a norm the largest change of a pixel is measured, which no other norm is smaller than.
    norm, radius = _norm(params) or "linf", params[name]
    distances = result.distance(norm)
    worst = int(distances.argmax())
    rounding = 1e-6 * result.images[0].numel() ** (1 / float(norm.removeprefix("l")))
    assert float(distances[worst]) <= 1.01 * radius + rounding, (
        f"image {worst} is changed by {float(distances[worst]):.4g} in {norm}, {name} is {radius:.4g}"
    )
