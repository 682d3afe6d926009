"""Checks of methods that train a network: the loss falls, and more steps change the weights."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
import torch.nn.functional as F

from ...data.datasets import TensorDataset
from ...errors import PhospheneError
from ...results import TrainedNetwork
from ...training import TrainedModel, label_reader
from ..candidates import larger_parameters, largest_accepted
from ..cases import Case, make_images, properties_of
from ..networks import image_size, standardize_logits
from ..observation import Observation
from .attacks import logits_of
from .base import register_check, result_of
from .claims import title_of
from .relations import prose_of, text_of

if TYPE_CHECKING:
    from ...models import Model
    from .base import AnyMethod

#: Losses of fewer steps than this say nothing about a trend.
FEWEST_STEPS = 8
#: Forward and backward passes of the longer training.
LIMIT = 3000


def _no_training(method: AnyMethod) -> str | None:
    return None if issubclass(method.result, TrainedNetwork) else "it trains no network"


def _accepted_case(method: AnyMethod) -> Case | None:
    for network in ("gap", "shapes-vgg", "functional", "tokens"):
        case = Case(network, dataset=12)
        if result_of(method, case) is not None:
            return case
    return None


@register_check(
    "method",
    "Training lowers its loss and changes the network's weights.",
    "the sign of the loss, optimizer.step() and zero_grad(), which parameters are optimized",
    _no_training,
    exemptible=True,
)
def training_lowers_the_loss(method: AnyMethod) -> None:
    if (case := _accepted_case(method)) is None:
        return
    # A schedule that makes the task harder may raise the loss in one length of the training.
    complaints: list[str] = []
    for limit in (LIMIT, 3 * LIMIT):
        longer = replace(case, params=larger_parameters(method, case, limit))
        result = result_of(method, longer)
        if result is None:
            continue
        losses = result.losses.double().flatten()
        assert losses.isfinite().all(), f"the losses are not finite: {losses.tolist()[:5]} ..."
        if len(losses) >= FEWEST_STEPS:
            quarter = max(2, len(losses) // 4)
            first, last = float(losses[:quarter].mean()), float(losses[-quarter:].mean())
            falls = last < first or last < float(losses[0])
            rise = 0.0 if 0 < last < 0.9 * first else _rise_of_the_error(method, longer, result)
            if falls and rise <= 1e-3:
                complaints = []
            elif falls:
                complaints.append(f"the cross-entropy of the data set rose by {rise:.3g}")
            else:
                complaints.append(f"the loss went from {first:.4g} to {last:.4g} in {len(losses)} steps")
        shorter = result_of(method, case)
        if shorter is not None and len(shorter.losses) != len(losses):
            weights = [dict(r.network.named_parameters()) for r in (shorter, result)]
            if weights[0].keys() == weights[1].keys() and weights[0]:
                same = [
                    n
                    for n, w in weights[0].items()
                    if w.shape == weights[1][n].shape and torch.equal(w, weights[1][n])
                ]
                assert len(same) < len(weights[0]), (
                    f"all weights are the same after {len(shorter.losses)} and {len(losses)} steps"
                )
        if not complaints:
            return
    assert not complaints, "; ".join(complaints)


@register_check(
    "observation",
    "A trained network is returned in eval mode.",
    "network.eval() after the last step: dropout and batch norm are off in what is saved and used",
    _no_training,
)
def trained_network_is_in_eval_mode(method: AnyMethod, run: Observation) -> None:
    training = [name for name, part in run.result.network.named_modules() if part.training]
    assert not training, f"the network is in train mode: {training[0] or 'all of it'}"


#: Words for a training of a part of the weights.
_PART = (
    r"\bbias|\bheads?\b|\blast\b|\blayers?\b|\bnorm|adapter|fr[eo]ez|\bpart\b|linear probe|\bonly\b|\bnew\b"
)


@register_check(
    "method",
    "A training changes all weights, unless its text names the part that it trains.",
    "which parameters the optimizer holds",
    lambda method: (
        _no_training(method)
        or ("its text names a part of the weights" if re.search(_PART, text_of(method)) else None)
    ),
    exemptible=True,
)
def trains_all_weights(method: AnyMethod) -> None:
    if (case := _accepted_case(method)) is None or not method.spec.input("model"):
        return
    model = case.model()
    before = {n: weight.detach().clone() for n, weight in model.module.named_parameters()}
    if (result := result_of(method, case, model)) is None:
        return
    after = dict(result.network.named_parameters())
    shared = [n for n in before if n in after and after[n].shape == before[n].shape]
    same = [n for n in shared if torch.equal(after[n], before[n])]
    # By numbers of weights: biases are as many tensors, but few numbers.
    unchanged, total = (sum(before[n].numel() for n in names) for names in (same, shared))
    assert 2 * unchanged < max(1, total), (
        f"{len(same)} of {len(shared)} weights are unchanged: {', '.join(same[:5])}"
    )


def _rise_of_the_error(method: AnyMethod, case: Case, result: Any) -> float:
    """By how much the training raised the cross-entropy of its labeled data set; 0 without labels."""
    model, declared = case.model(), method.spec.input("dataset")
    if not isinstance(result, TrainedModel) or declared is None:
        return 0.0
    dataset = case.inputs(method, model)[declared.name]
    try:
        labels = label_reader(model, dataset)(range(len(dataset)))
    except PhospheneError:
        return 0.0
    before, after = (
        float(F.cross_entropy(logits_of(m, dataset.images.to(m.device, m.dtype)).double(), labels))
        for m in (model, result.model())
    )
    return after - before


# --- labels --------------------------------------------------------------------------------------------


def _certain(case: Case, scale: float) -> tuple[Model, TensorDataset]:
    """A network that is certain of a data set's images, whose classes are the predicted ones."""
    model = case.model()
    images = make_images("noise", case.dataset, 3, image_size(model)).to(model.dtype)
    standardize_logits(model, images, scale)
    with torch.no_grad():
        predicted = model(images).argmax(1).tolist()
    return model, TensorDataset(images, list(map(str, predicted)))


def _first_loss(method: AnyMethod, case: Case, model: Model, dataset: TensorDataset) -> float:
    """The loss of the first step. Raises SkipTest where the method refuses the case or has none."""
    name = next(declared.name for declared in method.spec.inputs if declared.role == "dataset")
    result = result_of(method, case, model, **{name: dataset})
    if result is None or not len(result.losses):
        raise SkipTest("it refused the case")
    return float(result.losses[0])


def _trains_on_labels(method: AnyMethod, pattern: str, otherwise: str) -> str | None:
    if (reason := _no_training(method)) is not None:
        return reason
    if not (method.spec.input("model") and any(i.role == "dataset" for i in method.spec.inputs)):
        return "it trains no model on a data set"
    return None if re.search(pattern, title_of(method)) else otherwise


@register_check(
    "method",
    "The loss of smoothed labels is that of (1 - epsilon) one-hot labels plus epsilon / K for all K classes.",
    "epsilon / K on every class, the label's included: F.cross_entropy(..., label_smoothing=epsilon)",
    lambda method: _trains_on_labels(method, r"label smoothing|smooth(ed)? labels", "it smooths no labels"),
    exemptible=True,
)
def smoothed_labels_have_the_usual_loss(method: AnyMethod) -> None:
    properties = properties_of(method.spec.params_schema)
    # A share of the labels, whatever its name: "steps" contains "eps".
    largest = {n: min(s.get("maximum", 2), s.get("exclusiveMaximum", 2)) for n, s in properties.items()}
    shares = [n for n, s in properties.items() if s.get("type") == "number" and largest[n] <= 1]
    named = [n for n in shares if re.search(r"eps|smooth|alpha", n)]
    name = (named or shares)[0] if len(shares) == 1 or named else None
    if name is None or re.search(r"k ?[-−] ?1\b|other classes", prose_of(method)):
        raise SkipTest("its text has another distribution of labels, or no share")
    # Without batch norm, whose statistics of a batch in training are others.
    case = Case("functional", dataset=1, params={name: 0.3})
    model, dataset = _certain(replace(case, dataset=2), 2.0)
    single = TensorDataset(dataset.images[:1], list(dataset.labels([0]) or ()))
    loss = _first_loss(method, case, model, single)
    with torch.no_grad():
        logits = model(single.images)
    label = torch.tensor([model.class_index((single.labels([0]) or ("",))[0])])
    expected = float(F.cross_entropy(logits, label, label_smoothing=0.3))
    assert abs(loss - expected) <= 1e-3 * max(1.0, expected), (
        f"with {name}=0.3 the first loss of one image is {loss:.4f}, that of smoothed labels is "
        f"{expected:.4f}"
    )


@register_check(
    "method",
    "In a mixture of two images the label of the larger share has the larger share.",
    "share * loss(y) + (1 - share) * loss(y'), of share * x + (1 - share) * x'",
    lambda method: _trains_on_labels(method, r"mix-?up|cut-?mix|mixtures? of", "it mixes no images"),
    exemptible=True,
)
def labels_are_mixed_as_the_images(method: AnyMethod) -> None:
    properties = properties_of(method.spec.params_schema)
    if "alpha" not in properties:
        raise SkipTest("it has no parameter alpha of a Beta distribution")
    arguments = Case().arguments(method)
    sizes = {n: largest_accepted(method, arguments, n, 8) for n in properties if re.search(r"batch", n)}
    # Of a small alpha nearly all shares are 0 or 1, so that the network is certain of each mixture.
    least = properties["alpha"].get("minimum", properties["alpha"].get("exclusiveMinimum", 0.0))
    case = Case("functional", dataset=8, params={**sizes, "alpha": max(float(least), 0.02)})
    model, dataset = _certain(case, 12.0)
    losses = []
    for seed in range(8):
        seeded = {} if method.seed is None else {method.seed: seed}
        losses.append(_first_loss(method, replace(case, params={**case.params, **seeded}), model, dataset))
    names = dataset.labels(range(8)) or ()
    labels = torch.tensor([model.class_index(name) for name in names])
    with torch.no_grad():
        logits = model(dataset.images)
    swapped = torch.stack([F.cross_entropy(logits, labels.roll(n)) for n in range(1, 8)]).mean()
    mean, other = sum(losses) / len(losses), float(swapped)
    assert mean < 0.5 * other, (
        f"a network that is certain of its images has a loss of {mean:.3f} with "
        f"alpha={case.params['alpha']:g}, for which hardly any are mixed; "
        f"with the labels of other images it is {other:.3f}"
    )
