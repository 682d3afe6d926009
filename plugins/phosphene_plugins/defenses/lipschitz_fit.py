"""Training for a margin: a network whose layers lengthen nothing, so that its answers can be proven."""

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

from ._spectral_layers import Layers, UnitNorms
from ._training_evaluation import Batch, FallingRate, HeldOut, LabelsFrom, Trial
from .lipschitz import bound_of

#: The bound is taken so much larger where it proves something: norms are 1 up to rounding.
_ROUNDING = 1 + 1e-4


def is_training_on_the_exact_distance_of_a_linear_model() -> None:
    """A linear model's loss is log(1 + exp(-(m - sqrt(2) L eps) / (L eps))), L = |W|_2 / min std."""
    linear = nn.Linear(4, 2).double()
    linear.weight.data = torch.tensor([[0.4, -0.3, 0.2, -0.1], [-0.2, 0.1, 0.3, 0.2]], dtype=torch.float64)
    linear.bias.data = torch.tensor([0.1, -0.1], dtype=torch.float64)
    weight, eps = linear.weight.detach().clone(), 0.2
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 2, 2), std=[0.5])
    random = torch.Generator().manual_seed(0)
    images = torch.rand(3, 1, 2, 2, generator=random, dtype=torch.float64)
    margin = images.flatten(1) @ (weight[1] - weight[0]) / 0.5 - 0.2
    unit = float(torch.linalg.matrix_norm(weight, 2)) / 0.5 * eps
    found = lipschitz_fit(
        model, TensorDataset(images, ["1", "1", "0"]), eps=eps, steps=1, batch=2, held_out=0.34, seed=0
    )
    torch.testing.assert_close(found.losses[0], F.softplus(-(margin[:2] - math.sqrt(2) * unit) / unit).mean())


@method(
    family="defenses",
    title="Lipschitz-margin training",
    references=[
        Reference(
            key="tsuzuku2018",
            title="Lipschitz-Margin Training: Scalable Certification of Perturbation Invariance",
            authors="Tsuzuku, Sato, Sugiyama",
            year=2018,
            url="https://arxiv.org/abs/1802.04034",
        ),
        Reference(
            key="miyato2018",
            title="Spectral Normalization for Generative Adversarial Networks",
            authors="Miyato, Kataoka, Koyama, Yoshida",
            year=2018,
            url="https://arxiv.org/abs/1802.05957",
        ),
    ],
    invariants=[PixelRange(field="previews")],
    needs=["gradients", "dataset", "training"],
    cost=Cost(
        forward=2 * param.steps * param.batch + 118 * minimum(64, ceil(param.held_out * size.dataset)) + 83,
        backward=param.steps * param.batch + 90 * minimum(64, ceil(param.held_out * size.dataset)) + 60,
    ),
    batch_independent=False,
    tags=["training", "certificate"],
    oracle=is_training_on_the_exact_distance_of_a_linear_model,
    quick={"steps": 2, "batch": 2, "held_out": 0.2},
    demo={"dataset": "builtin:scenes/64", "eps": 1e-5, "lr": 1e-4, "steps": 24, "batch": 16, "held_out": 0.2},
)
def lipschitz_fit(
    model: Model,
    dataset: Dataset,
    *,
    layers: Annotated[Layers, Field(description="weights over their norm, or orthogonal ones")] = "spectral",
    eps: Annotated[float, Field(gt=0, le=100, description="radius of the ball to be proven (l2)")] = 36 / 255,
    steps: Annotated[int, Field(ge=1, le=1_000_000, description="steps of Adam")] = 2000,
    batch: Batch = 64,
    lr: FallingRate = 1e-3,
    labels: LabelsFrom = "truth",
    held_out: HeldOut = 0.1,
    seed: Seed = None,
) -> TrainedModel:
    """Train a copy of the model so that the product of its layers' norms proves its answers in an l2 ball.

    min_theta E  CE(z^ / (L e), y),   z^_y = z_y,  z^_k = z_k + sqrt(2) L e  for k != y,   W -> W / |W|_2

    with L as ``lipschitz`` has it: z^ are the worst logits within ``eps`` = e, so the loss is small where the
    answer is proven. Convolutions, linear layers and batch norms are used divided by their norms: L is then a
    number (1 / min std, and what pooling and branches bring), and the network cannot make its margins wider
    by making everything larger. In units of L e, its scale, the logits have a gradient at any depth.
    ``layers`` "orthogonal" makes each weight, as a matrix (O, I h w), orthogonal before: all directions keep
    their length, not the longest alone. Adam goes on from the weights that the model has, in eval mode, so
    that batch norm keeps its statistics; "spectral" plain chains begin by saying what they said, networks
    with branches begin anew. Pictures (N, C, H, W) in [0, 1]. What comes out is the same kind of network with
    other weights.

    ``curves`` are the shares of pictures held out that are right, that are under PGD-10 (l2), and that are
    *proven*: right whatever happens in the ball. ``note`` says L before and after. Networks that the bound
    has no rule for are refused by the operation's name (ModelError), a layer that is all zero by its own.
    DivergenceError if the loss is no longer finite, InputError where no classes are known.

    Source: Tsuzuku et al. 2018, sections 3 and 4; the norms' gradient Miyato et al. 2018.
    """
    wanted = classes_of(model, dataset, labels)
    trained = trainable(model)
    count, held = split(dataset, held_out)
    trial = Trial(model, trained, dataset, held, wanted, eps=eps, norm="l2")
    norms = UnitNorms(trained, trial.images, layers)
    unit = norms.bound * eps

    def loss(images: Tensor, places: Sequence[int], share: float) -> Tensor:
        norms.iterate()
        y, logits = wanted(places), trained(images)
        worst = logits + math.sqrt(2) * unit * (1 - F.one_hot(y, logits.shape[1]))
        return F.cross_entropy(worst / unit, y, reduction="none")

    def watch() -> dict[str, float]:
        norms.settle()
        with torch.no_grad():
            logits = torch.cat([trained(part) for part in trial.images.split(trial.at_once)]).double()
        own = F.one_hot(trial.labels, logits.shape[1]).bool()
        margin = logits[own] - logits.masked_fill(own, -torch.inf).amax(1)
        proven = margin > math.sqrt(2) * unit * _ROUNDING
        return trial() | {"proven": float(proven.double().mean())}

    course = train(
        trained.module, dataset, loss, torch.optim.Adam(norms.parameters(), lr), steps=steps,
        batch=batch, seed=seed or 0, count=count, at_once=batch_size(model),
        schedule=lambda share: 1 - share, watch=watch,
    )  # fmt: skip
    norms.release()
    after = bound_of(trained, trial.images)
    note = f"L = {norms.before:.3g} -> {after:.3g}, proven within {eps:.3g} (l2)"
    return TrainedModel.of("defenses.lipschitz_fit", trained, model, course, note=note, **trial.shown())


@hookimpl
def phosphene_methods():
    return [lipschitz_fit]
