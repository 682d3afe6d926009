"""Training with interval bounds: a network that is proven, not only observed, to withstand a box."""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, TensorDataset, batch_size, hookimpl, load_model, method
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import Cost, PixelRange, ceil, minimum, param, size
from phosphene.training import TrainedModel, classes_of, split, train, trainable

from ._training_evaluation import Batch, FallingRate, HeldOut, LabelsFrom, Trial
from .interval_bounds import margins


def is_training_on_the_exact_margin_of_a_linear_model() -> None:
    """With kappa 0 a linear model's loss is log(1 + exp(-(m - eps |w|_1))), w = w_own - w_other."""
    linear = nn.Linear(4, 2).double()
    linear.weight.data = torch.tensor([[0.4, -0.3, 0.2, -0.1], [-0.2, 0.1, 0.3, 0.2]], dtype=torch.float64)
    linear.bias.data = torch.tensor([0.1, -0.1], dtype=torch.float64)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 2, 2))
    random = torch.Generator().manual_seed(0)
    images = 0.3 + 0.4 * torch.rand(3, 1, 2, 2, generator=random, dtype=torch.float64)
    apart = (linear.weight[1] - linear.weight[0]).detach()
    margin = images.flatten(1) @ apart - 0.2 - 0.1 * apart.abs().sum()
    found = interval_bounds_fit(
        model, TensorDataset(images, ["1", "1", "0"]), eps=0.1, kappa=0.0, warm_up=0.0, steps=1, batch=2,
        held_out=0.34, seed=0,
    )  # fmt: skip
    torch.testing.assert_close(found.losses[0], F.softplus(-margin[:2]).mean())


@method(
    family="defenses",
    title="Training with interval bounds",
    references=[
        Reference(
            key="gowal2018",
            title="On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models",
            authors="Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann, Kohli",
            year=2018,
            url="https://arxiv.org/abs/1810.12715",
        )
    ],
    invariants=[PixelRange(field="previews")],
    needs=["gradients", "dataset", "training"],
    cost=Cost(
        forward=3 * param.steps * param.batch + 117 * minimum(64, ceil(param.held_out * size.dataset)) + 80,
        backward=2 * param.steps * param.batch + 90 * minimum(64, ceil(param.held_out * size.dataset)) + 60,
    ),
    batch_independent=False,
    tags=["training", "certificate"],
    oracle=is_training_on_the_exact_margin_of_a_linear_model,
    quick={"steps": 2, "batch": 2, "held_out": 0.2},
    demo={"dataset": "builtin:scenes/64", "eps": 3e-8, "lr": 1e-4, "steps": 24, "batch": 16, "held_out": 0.2},
)
def interval_bounds_fit(
    model: Model,
    dataset: Dataset,
    *,
    eps: Annotated[float, Field(gt=0, le=1, description="radius of the box to be proven (linf)")] = 2 / 255,
    kappa: Annotated[float, Field(ge=0, le=1, description="weight of the plain loss at the end")] = 0.5,
    warm_up: Annotated[
        float, Field(ge=0, le=1, description="share of the steps in which the box grows and kappa falls")
    ] = 0.5,
    steps: Annotated[int, Field(ge=1, le=1_000_000, description="steps of Adam")] = 2000,
    batch: Batch = 64,
    lr: FallingRate = 5e-4,
    labels: LabelsFrom = "truth",
    held_out: HeldOut = 0.1,
    seed: Seed = None,
) -> TrainedModel:
    """Train a copy of the model so that interval bounds prove its answers in a box around each picture.

    min_theta E  k CE(z, y) + (1 - k) CE(z^, y),   z^_y = 0,  z^_k = -min_{|d| <= e} (z_y - z_k)  for k != y

    with z^ the worst logits that ``interval_bounds`` allows, the last linear layer folded in. Over a share
    ``warm_up`` of the steps e grows from 0 to ``eps`` and k falls from 1 to ``kappa``: bounds of a network
    that was not trained for them are so wide that nothing can be learned from them. Adam goes on from the
    weights that the model has, in eval mode, so that batch norm keeps its statistics; pictures (N, C, H, W)
    in [0, 1].

    Small, shallow networks take to it; with depth the price in accuracy grows. ``curves`` are the shares of
    pictures held out that are right, that are under PGD-10, and that are *proven*: right whatever happens in
    the box. Networks that bounds have no rule for are refused by the operation's name (ModelError).
    DivergenceError if the loss is no longer finite, InputError where no classes are known.

    Source: Gowal et al. 2018, sections 3 and 4.
    """
    wanted = classes_of(model, dataset, labels)
    trained = trainable(model)
    count, held = split(dataset, held_out)
    trial = Trial(model, trained, dataset, held, wanted, eps=eps)

    def loss(images: Tensor, places: Sequence[int], share: float) -> Tensor:
        y, grown = wanted(places), min(1.0, share / warm_up) if warm_up else 1.0
        plain = F.cross_entropy(trained(images), y, reduction="none")
        least = margins(trained, images, y, grown * eps, images.dtype)
        worst = (-least).scatter(1, y[:, None], 0.0)
        k = 1 - grown * (1 - kappa)
        return k * plain + (1 - k) * F.cross_entropy(worst, y, reduction="none")

    def watch() -> dict[str, float]:
        with torch.no_grad():
            parts = zip(trial.images.split(trial.at_once), trial.labels.split(trial.at_once), strict=True)
            proven = torch.cat([(margins(trained, i, y, eps) > 0).all(1) for i, y in parts])
        return trial() | {"proven": float(proven.double().mean())}

    course = train(
        trained.module, dataset, loss, torch.optim.Adam(trained.module.parameters(), lr), steps=steps,
        batch=batch, seed=seed or 0, count=count, at_once=batch_size(model),
        schedule=lambda share: 1 - share, watch=watch,
    )  # fmt: skip
    name, note = "defenses.interval_bounds_fit", f"proven within {_written(eps)}"
    return TrainedModel.of(name, trained, model, course, note=note, **trial.shown())


def _written(eps: float) -> str:
    levels = 255 * eps
    return f"{levels:.3g}/255" if math.isclose(levels, round(levels, 2), rel_tol=1e-6) else f"{eps:.3g}"


@hookimpl
def phosphene_methods():
    return [interval_bounds_fit]
