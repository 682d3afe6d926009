"""Robust accuracy: accuracy against the radius under several attacks, and under the worst of them."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from phosphene import (
    Fold,
    InputError,
    ModelError,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    method,
    report_progress,
)
from phosphene.attacks import Norm
from phosphene.data import Batch, Rows, State
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import InvariantTo
from phosphene.targets import Objective
from phosphene.testing import linear_model
from phosphene.training import class_indices, label_reader

from ..attacks._objectives import (
    ObjectiveText,
    check_objective_text,
    classifier_of,
    parse_objective,
    predict_each,
)
from ._attack_runner import AttackRunner, make_runner
from ._robustness_report import RobustnessReport

#: Relative tolerance of a distance: rounding may place an example outside its ball.
# equivalent mutants: the attacks stay in their balls, but for rounding
_ROUNDING = 1e-5


def _check_target(value: object) -> object:
    """The value of ``target``; ValueError for a text that is neither a choice nor an objective."""
    if value not in ("label", "predicted"):
        try:
            check_objective_text(value)
        except ValueError as error:
            raise ValueError(f"{str(error).replace('should be', 'should be label, predicted or')}") from None
    return value


def share_of_margins_beyond_eps_on_a_linear_model() -> None:
    """An image is robust to eps under a linear model where (z_y - z_k) / ||w_k - w_y||_q is larger."""
    model = linear_model()
    linear: Any = model.module[1]  # type: ignore[index]
    normal = (linear.weight[1] - linear.weight[0]).detach().view(1, 1, 2, 2)
    gray = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    boundary = gray - normal * ((normal * gray).sum() / normal.square().sum())
    norms: list[tuple[Norm, float]] = [("linf", 1.0), ("l2", 2.0)]
    for norm, dual in norms:
        # Distances to the boundary on the side of class 0; the last image is misclassified.
        margins = torch.tensor([0.01, 0.03, 0.05, 0.07, -0.01], dtype=torch.float64)[:, None, None, None]
        images = boundary - normal * (margins * normal.norm(dual) / normal.square().sum())
        report = robust_accuracy(
            model, TensorDataset(images, ["0"] * 5), attacks=["pgd", "fab"], eps=[0.02, 0.06], norm=norm,
            params={"pgd": {"step_size": 0.01}, "fab": {"steps": 5}}, seed=0,
        )  # fmt: skip
        for attack in ("pgd", "fab", None):
            accuracies = [report.accuracy(eps, attack) for eps in (0, 0.02, 0.06)]
            assert accuracies == [0.8, 0.6, 0.2], (norm, attack)
        nearest = (
            (report.adversarial - report.images).flatten(1).norm(math.inf if norm == "linf" else 2, dim=1)
        )
        torch.testing.assert_close(nearest, report.radii.amin(0)[: len(nearest)])
        torch.testing.assert_close(report.radius("fab")[:4], margins[:4].flatten(), rtol=2e-3, atol=0)
    # Of equal distances the first attack counts; the last two images are not broken and misclassified.
    images = boundary - normal * (margins * normal.norm(1) / normal.square().sum())
    options: dict[str, Any] = {"attacks": ["fgsm", "pgd"], "eps": [0.04], "examples": 9, "seed": 0}
    report = robust_accuracy(model, TensorDataset(images, ["0"] * 5), **options)
    assert report.broken_by == ("fgsm", "fgsm", "", "", "") and report.counts == (5, 5)
    # Without labels the predicted class is correct. The budget is enough for two images.
    options |= {"attacks": ["pgd"], "params": {"pgd": {"steps": 10}}, "target": "predicted", "budget": 95}
    report = robust_accuracy(model, TensorDataset(images), **options)
    assert report.correct.all() and report.counts == (2,), report.counts
    assert report.success.tolist() == [[True, True, False, False, False]]
    assert robust_accuracy(model, TensorDataset(images), **options | {"budget": 1}).counts == (1,)
    report = robust_accuracy(model, TensorDataset(images), **options | {"budget": 1000})
    assert report.success.tolist() == [[True, True, False, False, True]]
    # With an objective it is correct where that holds; the largest ball has no image left to attack.
    options = {"attacks": ["fgsm"], "eps": [0.04, 0.1, 0.2], "target": "contrast:0,1", "seed": 0}
    report = robust_accuracy(model, TensorDataset(images), **options)
    assert report.success.tolist() == [report.correct.tolist()] == [[True, True, True, True, False]]
    distances = torch.tensor([[0.04, 0.04, 0.1, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(report.radii[:, :4], distances)


def attacks_without_gradients_are_refused_before_the_first_one() -> None:
    """A network without gradients is attacked by Square alone; with FGSM as well, Square does not run."""
    passes = itertools.count()
    plain = linear_model()
    model = load_model(
        lambda x: (next(passes), plain(x).detach())[1], input_size=(1, 2, 2), classes=["0", "1"]
    )
    dataset = TensorDataset(torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64))
    options: dict[str, Any] = {"target": "predicted", "params": {"square": {"max_queries": 99}}, "seed": 0}
    assert robust_accuracy(model, dataset, attacks=["square"], eps=[1e-4], **options).correct.all()
    before = next(passes)
    assert before < 150  # all images in one batch
    try:
        raise AssertionError(robust_accuracy(model, dataset, attacks=["square", "fgsm"], **options).lines())
    except ModelError:
        assert next(passes) - before < 99


def accuracy_is_that_of_the_margins() -> None:
    """On a linear model that of the distances to its boundary; networks without gradients."""
    share_of_margins_beyond_eps_on_a_linear_model()
    attacks_without_gradients_are_refused_before_the_first_one()


def _attack_names(attacks: Any) -> Any:
    """The names of a mapping from attacks to no parameters; another value unchanged."""
    if not isinstance(attacks, Mapping):
        return attacks
    if any(attacks.values()):
        raise ValueError(f"the parameters of attacks are set by params={dict(attacks)}")
    return list(attacks)


@method(
    family="robustness",
    references=[
        Reference(
            key="carlini2019",
            title="On Evaluating Adversarial Robustness",
            authors="Carlini, Athalye, Papernot, Brendel, Rauber, Tsipras, Goodfellow, Madry, Kurakin",
            year=2019,
            url="https://arxiv.org/abs/1902.06705",
        )
    ],
    relations=[InvariantTo("logit_shift", fields=("adversarial", "radii"))],
    needs=["dataset"],
    oracle=accuracy_is_that_of_the_margins,
    quick={
        "attacks": ["pgd", "fgsm"],
        "eps": [0.05, 0.5],
        "params": {"pgd": {"steps": 2}},
        "pictures": 3,
        "budget": 100,
        "examples": 2,
    },
    demo={
        "attacks": ["fgsm", "pgd", "fab"],
        "eps": [0.5 / 255, 1 / 255, 2 / 255, 4 / 255],
        "params": {"fab": {"steps": 6, "candidates": 3}},
        "pictures": 16,
    },
)
def robust_accuracy(
    model: Model,
    dataset: Dataset,
    *,
    attacks: Annotated[
        list[str],
        BeforeValidator(_attack_names),
        Field(min_length=1, description="names of untargeted fixed-radius or minimum-norm attacks"),
    ] = ["fgsm", "pgd", "apgd"],  # noqa: B006
    eps: Annotated[
        list[Annotated[float, Field(gt=0, le=1000)]],
        Field(min_length=1, max_length=100, description="radii of the balls, pixels in [0, 1]"),
    ] = [1 / 255, 2 / 255, 4 / 255, 8 / 255],  # noqa: B006
    norm: Annotated[Norm, Field(description="norm of the balls")] = "linf",
    params: Annotated[
        dict[str, dict[str, Any]], Field(description="parameters of the attacks, by the attack's name")
    ] = {},  # noqa: B006
    target: Annotated[
        Literal["label", "predicted"] | ObjectiveText,
        BeforeValidator(_check_target),
        Field(description="what is correct: the data set's label, the predicted class, or an objective"),
    ] = "label",
    pictures: Annotated[
        int, Field(ge=1, description="largest number of the data set's images to attack")
    ] = 200,
    budget: Annotated[
        int, Field(ge=1, description="passes of one attack; an expensive one runs on fewer images")
    ] = 100_000,
    examples: Annotated[int, Field(ge=1, le=20, description="images in the result")] = 3,
    seed: Seed = None,
) -> RobustnessReport:
    """Robust accuracy against eps under several attacks, and under the worst attack for each image.

    accuracy(eps) = share of images with r > eps,  r = min over the attacks of ||x' - x||, 0 if f(x) != y

    x' being the adversarial examples. A fixed-radius attack runs at each radius, from the smallest on, on
    the images that it has not broken yet: an example in a ball is one in every larger ball, so accuracy
    never rises with eps. A minimum-norm attack (``deepfool``, ``carlini_wagner``, ``fab``) runs once for
    all radii. All attacks get the same ``norm`` and seed; other parameters are set by ``params``, as in
    ``{"apgd": {"steps": 20}}``. ``auto_attack`` is an attack, too.

    With an objective as ``target`` ("region:person", "box:person", "similar:dog.png", "contrast:tabby,lynx")
    an image is correct where the objective holds, and an attack succeeds where it does not any more. The
    region or box is the one of each image without attack; an image without one is not correct.

    These accuracies are upper bounds: accuracy under a better attack may be lower. An attack runs on as many
    images as ``budget`` allows, at least one; the table has their number. The worst case is over all
    images. An interrupted run with an ``out`` resumes.

    Returns:
        ``accuracy(eps, attack)`` and ``radius(attack)``; ``correct`` (P,), ``success`` (A, P) and ``radii``
        (A, P) by attack and image; ``lines()`` is a Markdown table.

    Raises:
        InputError: the data set has no labels, a method is no such attack or does not support the norm, or
            ``params`` names an attack that is not run. All are raised before any attack runs.

    Example::
        from phosphene import run

        attacks = {"attacks": ["fgsm", "pgd"], "eps": [1 / 255, 4 / 255]}
        report = run("robust_accuracy", dataset="builtin:scenes/4", **attacks)
        report.accuracy(4 / 255, "pgd")  # under one attack
        report.accuracy(4 / 255)  # under the worst of both

    Source: Carlini et al. 2019, sections 4 and 5.
    """
    assert seed is not None
    names, radii = tuple(dict.fromkeys(attacks)), tuple(sorted({*eps}))
    if unused := params.keys() - {*names}:
        raise InputError(f"params names {sorted(unused)[0]!r}, which is not among attacks={attacks}")
    objective = None if target in ("label", "predicted") else parse_objective(target, model)
    if target == "label":
        label_reader(model, dataset)  # refuses a data set without classes
    count = min(pictures, len(dataset))
    runners = [make_runner(name, params.get(name, {}), radii, norm, seed, model) for name in names]

    images = dataset.read(range(min(examples, count))).to(model.device, model.dtype)
    # How many images each attack runs on.
    costs = [runner.passes(model, images[:1]) or 1 for runner in runners]
    counts = tuple(max(1, min(count, budget // cost)) for cost in costs)

    labels, correct = _Labels(model, objective, target == "label").run(dataset, batch_size(model), count)
    success = torch.zeros(len(runners), count, dtype=torch.bool)
    distances = torch.zeros(len(runners), count, dtype=model.dtype)
    adversarial, broken_by, nearest = images.clone(), [""] * len(images), [math.inf] * len(images)
    for a, (runner, stop) in enumerate(zip(runners, counts, strict=True)):
        fold = _AttackDistances(model, runner, norm, objective, labels, correct, len(images), runner.name)
        attacked = fold.run(dataset, batch_size(model), stop)
        success[a, :stop], distances[a, :stop] = attacked["success"].tensor(), attacked["distances"].tensor()
        for n, example in enumerate(attacked["adversarial"].tensor()):
            # Of equal distances the first attack counts.
            if success[a, n] and distances[a, n] < nearest[n]:
                adversarial[n], broken_by[n], nearest[n] = example, runner.name, float(distances[a, n])
    return RobustnessReport(
        model=model.name,
        attacks=tuple(runner.name for runner in runners),
        norm=norm,
        eps=radii,
        correct=correct.to(model.device),
        success=success.to(model.device),
        radii=distances.to(model.device),
        counts=counts,
        images=images,
        adversarial=adversarial,
        broken_by=tuple(broken_by),
    )


@dataclass
class _Labels(Fold[tuple[Tensor, Tensor]]):
    """What is correct of each image (P,), and whether it is predicted (P,).

    The data set's classes where ``truth``, else the predicted ones; with an ``objective`` class 1.
    """

    title = "predictions"
    model: Model
    objective: Objective | None
    truth: bool

    def start(self) -> State:
        return {"labels": Rows(), "correct": Rows()}

    @torch.no_grad()
    def update(self, state: State, batch: Batch) -> State:
        images = batch.images.to(self.model.device, self.model.dtype)
        predictions = predict_each(classifier_of(self.model, self.objective, images), images)
        if self.objective is not None:
            labels = torch.ones_like(predictions)
        elif self.truth:
            labels = class_indices(self.model, batch)
        else:
            labels = predictions
        state["labels"].write(batch.indices[0], labels)
        state["correct"].write(batch.indices[0], predictions.eq(labels))
        return state

    def finish(self, state: State) -> tuple[Tensor, Tensor]:
        return state["labels"].tensor(), state["correct"].tensor()


@dataclass
class _AttackDistances(Fold[State]):
    """One attack of the correctly classified images: ``success`` (n,), and ``distances`` (n,), 0 without it.

    ``adversarial`` (E, C, H, W) are the examples of the first ``examples`` images, or these themselves.
    """

    model: Model
    runner: AttackRunner
    norm: Norm
    objective: Objective | None
    labels: Tensor
    correct: Tensor
    examples: int
    title: str
    # equivalent mutants: how many batches a shard has changes no number
    shard_batches = 1  # attacks take long

    def start(self) -> State:
        return {"success": Rows(), "distances": Rows(), "adversarial": Rows()}

    def update(self, state: State, batch: Batch) -> State:
        first, indices = batch.indices[0], list(batch.indices)
        images = batch.images.to(self.model.device, self.model.dtype)
        labels = self.labels[indices].to(self.model.device)
        remaining = self.correct[indices].to(self.model.device)
        success = torch.zeros_like(remaining)
        distances, adversarial = images.new_zeros(len(images)), images.clone()
        classifier = classifier_of(self.model, self.objective, images)
        for radius in self.runner.radii:
            rows = (remaining & ~success).nonzero()[:, 0]
            if not len(rows):
                break
            with report_progress(False):  # one progress bar for the attack, not one for each of its batches
                # Image by image where each has a classifier of its own.
                parts = [rows[part] for part in _parts(classifier, rows)]
                results = [
                    self.runner.run(classifier.for_rows(part), images[part], labels[part], radius)
                    for part in parts
                ]
            result = results[0] if len(results) == 1 else type(results[0]).concatenate(results)
            distance = result.distance(self.norm)
            # equivalent mutants: the attacks stay in their balls, but for rounding
            broken = result.success & (distance <= radius * (1 + _ROUNDING))
            success[rows[broken]] = True
            distances[rows[broken]] = distance[broken].clamp(max=radius)
            adversarial[rows[broken]] = result.adversarial[broken]
        state["success"].write(first, success)
        state["distances"].write(first, distances)
        if first < self.examples:
            state["adversarial"].write(first, adversarial[: self.examples - first])
        return state


def _parts(classifier: Model, values: Tensor) -> tuple[Tensor, ...]:
    """Indices of the rows that are passed through a classifier at once: all, or single ones."""
    rows = torch.arange(len(values), device=values.device)
    return rows.split(1) if classifier.row_by_row else (rows,)


@hookimpl
def phosphene_methods():
    return [robust_accuracy]
