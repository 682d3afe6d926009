"""Universal adversarial perturbation: one perturbation that changes the predicted class of most images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from phosphene import (
    InputError,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    method,
    methods,
    report_progress,
    resumable,
)  # fmt: skip
from phosphene.attacks import l2_norm
from phosphene.results import AdversarialExamples
from phosphene.roles import Dataset, Model
from phosphene.spec import Cost, Equivariant, InvariantTo, PixelRange, param, size
from phosphene.testing import linear_model

from ._objectives import ObjectiveText, classifier_of, parse_objective
from ._oracle_models import LinearCase, constant_model, five_classes
from ._parameters import Eps, HeldOut
from ._perturbation_evaluation import eligible_rows, evaluate_change, predict_classes, training_count
from ._universal_result import UniversalPerturbation

UniversalNorm: TypeAlias = Literal["linf", "l2"]
#: The largest number of passes for each step that an inner attack may take.
_MAX_PASSES = 16


def is_the_corner_of_the_ball_on_a_linear_model() -> None:
    """On two classes it is eps sign(w), and fools every image whose margin is below eps ||w||_1."""
    model = linear_model()
    weight, _ = (p.detach() for p in model.module.parameters())
    normal = (weight[1] - weight[0]).view(1, 1, 2, 2)
    # All of class 0, with margins of these multiples of eps ||w||_1; gray, so that nothing is clipped.
    margins = torch.tensor([0.2, 0.5, 0.9, 1.5], dtype=torch.float64)[:, None, None, None]
    base = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    base = base - normal * ((normal * base).sum() / normal.square().sum())
    images = base - normal * (margins * 0.1 * normal.abs().sum() / normal.square().sum())
    result = universal(model, TensorDataset(images), eps=0.1, held_out=0)
    torch.testing.assert_close(result.perturbation, 0.1 * normal[0].sign())
    torch.testing.assert_close(result.adversarial, (result.images + result.perturbation).clamp(0, 1))
    assert result.fooling_rate == 0.75 and result.held_out_rate is None
    # The same with an objective, whatever the images in which it does not hold.
    both = torch.cat([2 * base - images[:3], images])
    result = universal(model, TensorDataset(both), eps=0.1, objective="contrast:0,1", held_out=0)
    torch.testing.assert_close(result.perturbation, 0.1 * normal[0].sign())
    assert result.fooling_rate == 0.75
    # The step of the first image, 0.1, would fool the second one if its pixels could exceed 1.
    first = base - 0.1 * normal * (normal.abs().sum() / normal.square().sum())
    second = torch.tensor([1.0, 1.0, 0.2, 0.2], dtype=torch.float64).view(1, 1, 2, 2)
    pair = TensorDataset(torch.cat([first, second]))
    assert universal(model, pair, eps=0.5, epochs=1, held_out=0).perturbation.abs().max() > 0.15
    # Without any change of class it stays zero, in the numbers of the model.
    gray = TensorDataset(torch.full((1, 3, 2, 3), 0.5))
    result = universal(constant_model(), gray, held_out=0, epochs=2)
    torch.testing.assert_close(result.perturbation, torch.zeros(3, 2, 3, dtype=torch.float64))
    case = five_classes(11)
    images = (4 * (case.images - 0.5) + 0.5).clamp(0, 1).float()
    case = replace(case, images=images.double(), labels=case.model(images.double()).argmax(1))
    # Without held-out images the first six are returned.
    returned = universal(case.model, TensorDataset(images), eps=0.1, epochs=1, steps=1, held_out=0).images
    torch.testing.assert_close(returned, case.images[:6])
    assert training_count(TensorDataset(images), 0.99) == 1
    cases: list[tuple[UniversalNorm, float, float]] = [
        ("linf", 0.008, 0.9),
        ("linf", 0.008, 0.25),
        ("l2", 0.5, 0.9),
        ("l2", 0.2, 0.2),
        ("l2", 0.3, 0.5),
    ]
    for norm, eps, target_rate in cases:
        _equals_algorithm_1(case, norm, eps, target_rate)


def _equals_algorithm_1(case: LinearCase, norm: UniversalNorm, eps: float, target_rate: float) -> None:
    """The result on 11 images, of which 3 are held out, is that of algorithm 1 in a plain loop."""
    v, images, y = torch.zeros_like(case.images[0]), case.images[:8], case.labels

    def fooled(images: Tensor, labels: Tensor) -> Tensor:
        return case.model((images + v).clamp(0, 1)).argmax(1) != labels

    for epoch in range(3):
        if epoch and fooled(images, y[:8]).double().mean() >= target_rate:
            break
        for begin in range(0, 8, 3):
            points, labels = (images[begin : begin + 3] + v).clamp(0, 1), y[:8][begin : begin + 3]
            attacked = methods["attacks.deepfool"](case.model, points, labels, norm=norm, steps=2)
            for image, label, r in zip(images[begin:], labels, attacked.adversarial - points, strict=False):
                if not fooled(image[None], label):
                    v = v + r
                    v = v.clamp(-eps, eps) if norm == "linf" else v * min(1, eps / float(v.norm()))
    result = universal(
        case.model, TensorDataset(case.images.float()), eps=eps, norm=norm, target_rate=target_rate, epochs=3,
        steps=2, batch=3, held_out=0.3,
    )  # fmt: skip
    torch.testing.assert_close(result.perturbation, v)
    assert result.fooling_rate == float(fooled(images, y[:8]).double().mean())
    assert result.held_out_rate == float(fooled(case.images[8:], y[8:]).double().mean())
    torch.testing.assert_close(result.images, case.images[8:])
    torch.testing.assert_close(result.adversarial, (case.images[8:] + v).clamp(0, 1))
    changed = [a != b for a, b in zip(result.names_before, result.names_after, strict=True)]
    assert changed == fooled(case.images[8:], y[8:]).tolist()


@method(
    family="attacks",
    title="Universal perturbation",
    references=[
        Reference(
            key="moosavi2017",
            title="Universal adversarial perturbations",
            authors="Moosavi-Dezfooli, Fawzi, Fawzi, Frossard",
            year=2017,
            url="https://arxiv.org/abs/1610.08401",
        )
    ],
    invariants=[PixelRange(field="adversarial")],
    relations=[
        InvariantTo("normalization", fields=("perturbation",)),
        InvariantTo("logit_shift", fields=("perturbation",)),
        Equivariant("hflip", fields=("perturbation",)),
    ],
    needs=["gradients", "dataset"],
    # For each image the passes of the inner attack at most and one where the perturbation has changed since,
    # and one for all images after every epoch.
    cost=Cost(
        forward=size.dataset * (param.epochs * (_MAX_PASSES * param.steps + (_MAX_PASSES + 2)) + 2),
        backward=size.dataset * param.epochs * (_MAX_PASSES * param.steps + _MAX_PASSES),
    ),
    tags=["white-box", "fixed-radius"],
    oracle=is_the_corner_of_the_ball_on_a_linear_model,
    exempt={
        "independent_of_the_dataset_order": "the images change the perturbation one after the other",
        "cost_is_near_the_work": "it is the bound of every inner attack; deepfool stops at the boundary",
    },
    quick={"epochs": 1, "steps": 2},
    demo={"dataset": "builtin:scenes/32", "eps": 0.2, "attack": "pgd", "epochs": 3},
)
def universal(
    model: Model,
    dataset: Dataset,
    *,
    attack: Annotated[
        str, Field(description="name of the inner attack that finds each image's perturbation")
    ] = "deepfool",
    eps: Eps = 10 / 255,
    norm: Annotated[UniversalNorm, Field(description="norm in which the ball is measured")] = "linf",
    target_rate: Annotated[
        float, Field(gt=0, le=1, description="fooling rate of the training images at which it stops")
    ] = 0.8,
    epochs: Annotated[
        int, Field(ge=1, le=1000, description="largest number of passes over the training images")
    ] = 5,
    objective: Annotated[
        ObjectiveText | None,
        Field(description="objective to change, as 'region:person'; None: the predicted class"),
    ] = None,
    steps: Annotated[
        int, Field(ge=1, le=10_000, description="largest number of steps of the inner attack")
    ] = 10,
    batch: Annotated[
        int, Field(ge=1, le=1000, description="number of images attacked at once (in the paper 1)")
    ] = 8,
    held_out: HeldOut = 0.25,
) -> UniversalPerturbation:
    """Universal adversarial perturbation (UAP): one perturbation that fools the model on most images.

    v <- P(v + r),  r the smallest change for which x + v + r has another predicted class than x

    for every training image x whose predicted class v does not change, with P the projection onto the ball
    of radius ``eps``; again over all images until the fooling rate reaches ``target_rate``. The r of
    ``batch`` images are computed at once, for the same v, and added one after another, each only if its image
    is still not fooled. r comes from ``attack``, any registered attack that takes a model, images and
    labels; it receives ``norm``, ``eps`` and ``steps`` where it has such parameters. The last images of the
    data set, a fraction ``held_out``, are not trained on. An interrupted run can be resumed.

    With an ``objective`` ("region:person", "box:person", "similar:dog.png", "contrast:tabby,lynx") v changes
    its sign in the images in which it holds; the others are not attacked and not counted. The region or box
    is the one of each image without v. For a detector the default is the box of the highest score.

    Returns:
        UniversalPerturbation with ``perturbation`` (C, H, W), ``fooling_rate`` on the training images,
        ``held_out_rate``, and some images (P, C, H, W) with and without it.

    Raises:
        InputError: the inner attack takes other inputs, returns another result or needs too many passes, or
            the objective holds in none of the training images.
        UnknownName: there is no such attack.
        ModelError: no gradient flows from the model's logits to the images.

    Example::
        from phosphene import run

        result = run("universal", dataset="builtin:scenes/8", steps=2, epochs=1)
        result.perturbation.shape  # (3, 64, 64)

    Source: Moosavi-Dezfooli et al. 2017, algorithm 1.
    """
    find_example = _inner_attack(attack, {"norm": norm, "eps": eps, "steps": steps})
    count = training_count(dataset, held_out)
    batches = [
        (epoch, range(start, min(start + batch, count)))
        for epoch in range(epochs)
        for start in range(0, count, batch)
    ]
    state = {"perturbation": torch.zeros_like(dataset.read([0])[0]).to(model.device, model.dtype)}
    criterion = parse_objective(objective, model)
    predictions = predict_classes(model, dataset, objective=criterion)
    counted = (
        range(count) if criterion is None else eligible_rows(predictions[:count], criterion, model).tolist()
    )

    for epoch, indices in resumable(batches, state, "universal perturbation"):
        # equivalent mutants: the first perturbation is zero, which fools no image
        if epoch > 0 and indices.start == 0:
            perturb = _AddPerturbation(state["perturbation"])
            with report_progress(False):
                perturbed = predict_classes(model, dataset, perturb, count, criterion, saved=False)
            if float(perturbed.ne(predictions[:count])[counted].cpu().double().mean()) >= target_rate:
                break
        attacked = [index for index in indices if index in counted]
        if not attacked:
            continue
        images = dataset.read(attacked).to(model.device, model.dtype)
        labels, points = predictions[attacked], (images + state["perturbation"]).clamp(0, 1)
        classifier = classifier_of(model, criterion, images)
        # equivalent mutants: progress changes no result
        with report_progress(False):  # one progress bar for all, not one for each inner attack
            parts = torch.arange(len(images)).split(batch_size(classifier))
            examples = [find_example(classifier.for_rows(rows), points[rows], labels[rows]) for rows in parts]
            changes = torch.cat(examples) - points
        v = state["perturbation"]
        for row, (image, label, r) in enumerate(zip(images, labels, changes, strict=True)):
            own = classifier.for_rows([row])
            if r.any() and (v is state["perturbation"] or _is_class(own, (image + v).clamp(0, 1), label)):
                v = _project(v + r, eps, norm)
        state["perturbation"] = v
    perturb = _AddPerturbation(state["perturbation"])
    evaluation = evaluate_change(model, dataset, count, predictions, perturb, None, criterion)
    return UniversalPerturbation(perturbation=state["perturbation"], **evaluation)


@dataclass(frozen=True)
class _AddPerturbation:
    """Images (N, C, H, W) with the perturbation (C, H, W) added."""

    perturbation: Tensor

    def __call__(self, images: Tensor, indices: Sequence[int]) -> Tensor:
        return (images + self.perturbation).clamp(0, 1)


def _inner_attack(name: str, values: dict[str, Any]) -> Callable[[Model, Tensor, Tensor], Tensor]:
    """An attack as a function of a model, images and labels; InputError for a method that is none."""
    attack = methods[name]
    inputs = [i.role for i in attack.spec.inputs if i.required]
    if inputs != ["model", "images", "labels"] or not issubclass(attack.result, AdversarialExamples):
        raise InputError(
            f"{attack.spec.name} takes {', '.join(inputs) or 'nothing'} and returns {attack.spec.returns}; "
            "the inner attack takes a model, images and labels, and returns AdversarialExamples: "
            "deepfool or pgd"
        )
    params = attack.validate({n: v for n, v in values.items() if n in attack.spec.params.model_fields})
    if attack.spec.cost is not None:
        # equivalent mutants: the passes of an image do not depend on its size
        passes = attack.spec.cost.evaluate(params, images=1, height=1, width=1, dataset=0)
    if attack.spec.cost is None or max(passes) > _MAX_PASSES * values["steps"] + _MAX_PASSES:
        raise InputError(
            f"{attack.spec.name} with steps={values['steps']} takes too many passes for one image; "
            "choose a cheaper inner attack: deepfool or pgd"
        )
    # The function itself: checks and a record of every call would cost more than a small network.
    return lambda model, images, labels: attack.function(model, images, labels, **params).adversarial


def _is_class(model: Model, image: Tensor, label: Tensor) -> bool:
    """Whether an image (C, H, W) has this predicted class."""
    with torch.no_grad():
        return bool(model(image[None]).argmax(1) == label)


def _project(v: Tensor, eps: float, norm: str) -> Tensor:
    """The nearest perturbation (C, H, W) inside the ball."""
    if norm == "linf":
        return v.clamp(-eps, eps)
    return v * (eps / l2_norm(v[None])[0].clamp(min=eps))


@hookimpl
def phosphene_methods():
    return [universal]
