"""Evaluation of ensembles of weak defenses: accuracy of the average and of each member under PGD."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Model as AnyModel
from phosphene import Reference, batch_size, hookimpl, method, progress_bar
from phosphene.attacks import Norm, project, random_point, steepest
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Agrees, Cost, InvariantTo, Monotone, PixelRange, UnitRange, length, param, size
from phosphene.targets import Contrast, ObjectiveClassifier
from phosphene.testing import linear_model

from ..attacks._gradients import loss_gradient
from ..attacks._losses import cross_entropy
from ..models._ensembles import (
    MeanOf,
    ModelURIs,
    average_logits,
    average_models,
    load_compatible_models,
)
from ._ensemble_report import EnsembleReport


def ensemble_of_orthogonal_linear_members_has_the_sum_of_their_margins() -> None:
    """An attack lowers the average margin of two orthogonal linear members by what it lowers both.

    That is 0.1 each. Their margins are 0.06 and 0.16 on the first image, 0.06 and 0.08 on the second; on the
    third the second member is wrong, on the fourth the first one, so these images are not attacked alone.
    """
    members = []
    for row in ([1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, -1.0]):
        members.append(linear_model(torch.stack([torch.zeros(4), torch.tensor(row)]).view(2, 1, 2, 2)))
    images = torch.full((4, 1, 2, 2), 0.5)
    images[:, 0, 0] = torch.tensor([[0.56, 0.66], [0.56, 0.58], [0.61, 0.4], [0.4, 0.61]])
    labels = torch.tensor([1, 1, 1, 1])
    report = _evaluate(
        members, images, labels, "logits", eps=0.05, step_size=0.02, steps=6, norm="linf", eot_samples=1,
        seed=0,
    )  # fmt: skip
    assert report.accuracy.tolist() == [
        [0.75, 0.75, 1],
        [0.25, 0.75, 0.75],
        [0.75, 0.5, 0.75],
        [0.25, 0.5, 0.25],
    ]
    assert report.worst_transfer_accuracy == 0.5 and report.ensemble_accuracy == 0.25
    assert report.success.tolist() == [False, True, True, True]
    # The same of the objective "1 rather than 0", by members in the other order, one in training mode.
    members[1].module.add_module("dropout", nn.Dropout())
    members[1].module.train()
    views = [ObjectiveClassifier.of_images(member, Contrast(1, 0), images) for member in members[::-1]]
    same = _evaluate(
        views, images, labels, "logits", eps=0.05, step_size=0.02, steps=6, norm="linf", eot_samples=1,
        seed=0,
    )  # fmt: skip
    assert torch.equal(same.accuracy, report.accuracy[[0, 2, 1, 3]][:, [1, 0, 2]])
    assert same.worst_transfer_accuracy == 0.5
    # In l2, on averaged logits, along the sum of the weights; on probabilities along their weighted sum.
    members[1] = linear_model(torch.tensor([[0.0, 0, 0, 0], [0, 9.0, 0, -9.0]]).view(2, 1, 2, 2))
    images = images[:1]
    averages: dict[MeanOf, list[float]] = {"logits": [1.0, 9.0, -1.0, -9.0], "probabilities": []}
    for mean_of, direction in averages.items():
        report = _evaluate(
            members, images, labels[:1], mean_of, eps=0.02, step_size=0.05, steps=30,
            norm="l2", eot_samples=1, seed=0,
        )  # fmt: skip
        moved = (images - report.adversarial).flatten()
        if not direction:
            x = report.adversarial.clone().requires_grad_()
            probability = torch.stack([member(x).softmax(1)[0, 1] for member in members]).sum()
            (gradient,) = torch.autograd.grad(probability, x)
            direction = gradient.flatten().tolist()
        unit = torch.tensor(direction) / torch.tensor(direction).norm()
        torch.testing.assert_close(moved, 0.02 * unit, rtol=0, atol=1e-4)
    wrong = _evaluate(
        members, images, 1 - labels[:1], "logits", eps=0.02, step_size=0.05, steps=2, norm="l2",
        eot_samples=1, seed=0,
    )  # fmt: skip
    assert torch.equal(wrong.adversarial, images) and not wrong.accuracy.any()
    images = torch.tensor([[[[0.56, 0.66], [0.5, 0.5]]], [[[0.56, 0.58], [0.5, 0.5]]]])
    model = linear_model(torch.tensor([[0.0, 0.0, 0.0, 0.0], [4.0, -3.0, 2.0, -1.0]]).view(2, 1, 2, 2))
    labels = model(images).argmax(1)
    report = ensemble_evaluation(model, images, labels, eps=0.05, step_size=0.02, steps=6, seed=0)
    starts = [
        ensemble_evaluation(model, images, labels, eps=0.05, step_size=1e-4, steps=1, seed=seed).adversarial
        for seed in (0, 1)
    ]
    assert not torch.equal(*starts)
    signs = (1 - 2 * labels[:, None]) * torch.tensor([1.0, -1.0, 1.0, -1.0])
    torch.testing.assert_close(report.adversarial, images + 0.05 * signs.view_as(images))
    accuracy = (model(report.adversarial).argmax(1) == labels).float().mean()
    assert report.accuracy.tolist() == [[1, 1], [accuracy, accuracy], [accuracy, accuracy]]


@method(
    family="robustness",
    references=[
        Reference(
            key="he2017",
            title="Adversarial Example Defenses: Ensembles of Weak Defenses are not Strong",
            authors="He, Wei, Chen, Carlini, Song",
            year=2017,
            url="https://arxiv.org/abs/1706.04701",
        )
    ],
    invariants=[PixelRange(field="adversarial"), UnitRange(field="accuracy")],
    relations=[
        Agrees(
            "attacks.pgd",
            where={"steps": 3, "step_size": 0.01, "eps": 0.02},
            other={"steps": 3, "step_size": 0.01, "eps": 0.02},
            fields=("adversarial",),
        ),
        InvariantTo("logit_shift", fields=("adversarial", "accuracy")),
        Monotone("eps", values=(0.001, 0.01, 0.1), measure="accuracy", falls=True, where={"step_size": 0.1}),
    ],  # fmt: skip
    needs=["gradients"],
    # Each member is attacked alone and within the ensemble, and classifies the images and all examples.
    cost=Cost(
        forward=size.images
        * (1 + length(param.models))
        * (2 * (param.steps * param.eot_samples + 1) + 3 + length(param.models)),
        backward=size.images * (1 + length(param.models)) * 2 * param.steps * param.eot_samples,
    ),
    tags=["evaluation"],
    batch_independent=False,
    oracle=ensemble_of_orthogonal_linear_members_has_the_sum_of_their_margins,
    exempt={"parameters_matter": "eot_samples matters only for networks that draw random numbers"},
    quick={"models": (), "steps": 2, "eot_samples": 1},
    demo={
        "models": ("defended:bit_depth(bits=3)|builtin:shapes-vgg",),
        "images": "builtin:scenes/12",
        "eps": 4 / 255,
        "steps": 8,
    },
)
def ensemble_evaluation(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    models: ModelURIs = (),
    mean_of: MeanOf = "probabilities",
    eps: Annotated[float, Field(gt=0, le=1000, description="radius of the ball, pixels in [0, 1]")] = 8 / 255,
    step_size: Annotated[float, Field(gt=0, le=1000, description="step size of PGD")] = 1 / 255,
    steps: Annotated[int, Field(ge=1, le=10_000, description="number of PGD steps")] = 40,
    norm: Annotated[Norm, Field(description="norm of the ball")] = "linf",
    eot_samples: Annotated[
        int, Field(ge=1, le=1000, description="passes that a gradient is averaged over, for random members")
    ] = 1,
    seed: Seed = None,
) -> EnsembleReport:
    """Ensemble of weak defenses: accuracy of the average of several models and of each member under PGD.

    p(x) = 1/M sum_i p_i(x),   x <- clip(P(x + step_size d)),  d the steepest ascent direction of -log p_y

    with p_i the probabilities of the members, ``model`` and ``models``, each behind its own defense
    (``defended:jpeg()|builtin:shapes-vgg``); ``mean_of`` "logits" averages logits. PGD from a random point
    of the ball attacks each member alone, and the ensemble through all members and their defenses at once.
    Examples computed on the members are also evaluated on the ensemble: this transfer accuracy overestimates
    its robustness, because an example that crosses one member's decision boundary need not cross the
    others'.

    Accuracy counts images that are misclassified without attack as errors. As always, a failed attack is no
    proof of robustness.

    Returns:
        ``accuracy`` (M + 2, M + 1), by examples (row) and classifier (column); ``member_accuracy`` (M,),
        ``transfer_accuracy`` (M,), ``ensemble_accuracy``; ``adversarial`` (N, C, H, W) computed on the
        ensemble.

    Raises:
        ModelError: a model has other classes or lets no gradient through.
        InputError: a model has another input size.

    Example::
        from phosphene import run

        others = ["defended:bit_depth(bits=3)|builtin:shapes-vgg"]
        result = run("ensemble_evaluation", images="builtin:scenes/2", models=others, steps=2)
        result.accuracy.shape  # (4, 3)

    Source: He et al. 2017, section 4.
    """
    members = [model, *load_compatible_models(model, models)]
    for other in members[1:]:
        other.require_gradients()
    return _evaluate(
        members, images, labels, mean_of, eps=eps, norm=norm, step_size=step_size, steps=steps,
        eot_samples=eot_samples, seed=seed or 0,
    )  # fmt: skip


def _evaluate(
    members: Sequence[AnyModel],
    images: Tensor,
    labels: Tensor,
    mean_of: MeanOf,
    *,
    eps: float,
    norm: Norm,
    step_size: float,
    steps: int,
    eot_samples: int,
    seed: int,
) -> EnsembleReport:
    max_batch = batch_size(members[0])

    batches = torch.arange(len(images)).split(max_batch)

    def ensemble(rows: Tensor) -> AnyModel:
        return average_models([member.for_rows(rows) for member in members], mean_of)

    def pgd_examples(classifier: Callable[[Tensor], AnyModel]) -> Tensor:
        """PGD on the images that the model classifies correctly; the others are returned unchanged."""
        examples = []
        for rows in batches:
            batch, y, model = images[rows], labels[rows], classifier(rows)
            # One seed for every batch: the result does not depend on the batch size.
            start = random_point(batch, eps, norm, torch.Generator().manual_seed(seed))
            with torch.no_grad():
                correct = model(batch).argmax(1).eq(y).nonzero()[:, 0]
            x, y, x_adv = batch[correct], y[correct], start[correct]
            for _ in progress_bar(range(steps), "PGD"):
                if not len(x):
                    break
                _, gradient, _ = loss_gradient(model, x_adv, y, cross_entropy, eot_samples=eot_samples)
                x_adv = project(x_adv + step_size * steepest(gradient, norm), x, eps, norm)
            examples.append(batch.index_copy(0, correct, x_adv))
        return torch.cat(examples)

    def classify(batch: Tensor) -> Tensor:
        """(M + 1, N) bool, which images each member and, last, the ensemble classifies correctly."""
        with torch.no_grad():
            logits = [
                torch.cat([member.for_rows(rows)(batch[rows]) for rows in batches]) for member in members
            ]
        logits.append(average_logits(logits, mean_of))
        return torch.stack([z.argmax(1).to(labels.device) == labels for z in logits])

    with ExitStack() as stack:
        for member in members:
            # equivalent mutants: for networks in training mode
            stack.enter_context(member.guard())
        attacked = progress_bar([*(member.for_rows for member in members), ensemble], "attacking")
        examples = [pgd_examples(classifier) for classifier in attacked]
        correct = torch.stack([classify(batch) for batch in (images, *examples)])
    return EnsembleReport(
        names=tuple(member.name for member in members),
        accuracy=correct.cpu().double().mean(2).to(images),
        worst_transfer_accuracy=float(correct[1:-1, -1].all(0).cpu().double().mean()),
        images=images,
        adversarial=examples[-1],
        success=~correct[-1, -1],
    )


@hookimpl
def phosphene_methods():
    return [ensemble_evaluation]
