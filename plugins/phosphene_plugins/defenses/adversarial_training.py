"""Adversarial training: learn from the worst pictures in a ball around each, not from the pictures."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, TensorDataset, batch_size, hookimpl, load_model, method
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import Cost, PixelRange, ceil, minimum, param, size
from phosphene.training import TrainedModel, classes_of, split, train, trainable

from ..attacks._gradients import cross_entropy
from ..attacks._lp_balls import project, random_point
from ._training_evaluation import UNDER_PGD, Batch, FallingRate, HeldOut, LabelsFrom, Trial, worst


def divergence(logits: Tensor, probabilities: Tensor) -> Tensor:
    """KL(p || softmax(z)) of each picture, (N,)."""
    return F.kl_div(logits.log_softmax(1), probabilities, reduction="none").sum(1)


def is_training_on_the_smaller_margin() -> None:
    """A step on a linear model is one on the margin m - eps |w|_1 of w = w_own - w_other, in closed form."""
    linear = nn.Linear(4, 2).double()
    linear.weight.data = torch.tensor([[0.4, -0.3, 0.2, -0.1], [-0.2, 0.1, 0.3, 0.2]], dtype=torch.float64)
    linear.bias.data = torch.tensor([0.1, -0.1], dtype=torch.float64)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 2, 2))
    random = torch.Generator().manual_seed(0)
    images = 0.3 + 0.4 * torch.rand(5, 1, 2, 2, generator=random, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0, 0])
    dataset = TensorDataset(images, [str(label) for label in labels.tolist()])
    weight, bias = (p.detach().clone().requires_grad_() for p in (linear.weight, linear.bias))
    x, y = images[:4].flatten(1), labels[:4]
    apart = weight[y] - weight[1 - y]
    margin = (apart * x).sum(1) + bias[y] - bias[1 - y] - 0.1 * apart.abs().sum(1)
    want = torch.autograd.grad(F.softplus(-margin).mean(), (weight, bias))
    found = adversarial_training(
        model, dataset, eps=0.1, step_size=0.1, attack_steps=2, steps=1, batch=4, lr=0.5, weight_decay=0.0,
        held_out=0.2, seed=0,
    )  # fmt: skip
    moved = [p.detach() for p in found.network.parameters()]
    torch.testing.assert_close(moved[0], (weight - 0.5 * want[0]).detach())
    torch.testing.assert_close(moved[1], (bias - 0.5 * want[1]).detach())


@method(
    family="defenses",
    references=[
        Reference(
            key="madry2018",
            title="Towards Deep Learning Models Resistant to Adversarial Attacks",
            authors="Madry, Makelov, Schmidt, Tsipras, Vladu",
            year=2018,
            url="https://arxiv.org/abs/1706.06083",
        ),
        Reference(
            key="zhang2019",
            title="Theoretically Principled Trade-off between Robustness and Accuracy",
            authors="Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan",
            year=2019,
            url="https://arxiv.org/abs/1901.08573",
        ),
        Reference(
            key="wong2020",
            title="Fast is better than free: Revisiting adversarial training",
            authors="Wong, Rice, Kolter",
            year=2020,
            url="https://arxiv.org/abs/2001.03994",
        ),
    ],
    invariants=[PixelRange(field="previews")],
    needs=["gradients", "dataset", "training"],
    cost=Cost(
        forward=param.steps * param.batch * (param.attack_steps + 4)
        + 108 * minimum(64, ceil(param.held_out * size.dataset))
        + 80,
        backward=param.steps * param.batch * (param.attack_steps + 2)
        + 90 * minimum(64, ceil(param.held_out * size.dataset))
        + 60,
    ),
    batch_independent=False,
    tags=["training"],
    oracle=is_training_on_the_smaller_margin,
    quick={"steps": 2, "batch": 2, "attack_steps": 1, "held_out": 0.2},
    demo={
        "dataset": "builtin:scenes/64",
        "eps": 4 / 255,
        "attack_steps": 2,
        "warm_up": 0.5,
        "steps": 24,
        "batch": 16,
        "held_out": 0.2,
    },
)
def adversarial_training(
    model: Model,
    dataset: Dataset,
    *,
    algorithm: Annotated[
        Literal["pgd", "trades", "fast"], Field(description="PGD-AT, TRADES, or one step from a random point")
    ] = "pgd",
    eps: Annotated[float, Field(gt=0, le=1000, description="radius of the ball, pixels in [0, 1]")] = 8 / 255,
    norm: Annotated[Literal["linf", "l2"], Field(description="what the ball is measured in")] = "linf",
    step_size: Annotated[
        float | None,
        Field(gt=0, le=1000, description="of the attack; eps / 4, or fast 1.25 eps"),
    ] = None,
    attack_steps: Annotated[
        int, Field(ge=1, le=1000, description="steps of the attack; a fast one takes one")
    ] = 7,
    warm_up: Annotated[
        float, Field(ge=0, le=1, description="share of the steps in which the ball grows to its size")
    ] = 0.0,
    beta: Annotated[float, Field(ge=0, le=1000, description="weight of the divergence in TRADES")] = 6.0,
    steps: Annotated[int, Field(ge=1, le=1_000_000, description="steps of SGD")] = 1000,
    batch: Batch = 64,
    lr: FallingRate = 3e-3,
    weight_decay: Annotated[float, Field(ge=0, le=1, description="how strongly weights shrink")] = 5e-4,
    labels: LabelsFrom = "truth",
    held_out: HeldOut = 0.1,
    seed: Seed = None,
) -> TrainedModel:
    """Train a copy of the model on the worst pictures within eps, made anew by an attack in every step.

    "pgd", "fast":  min_theta E max_{|d| <= eps} CE(f(x + d), y)
    "trades":       min_theta E CE(f(x), y) + beta max_{|d| <= eps} KL(f(x) || f(x + d))

    with the inner maximum by ``attack_steps`` of projected ascent from a random point of the ball; for "fast"
    by a single one, 1.25 eps long; for TRADES from 0.001 N(0, 1) beside the picture. SGD with momentum 0.9
    goes on from the weights that the model has, all of them, at a rate that falls linearly to zero; a network
    that a large ball would drive into answering always the same needs a ``warm_up``. The attack sees the
    network in eval mode, the loss in training mode; pictures (N, C, H, W) in [0, 1].

    The last pictures of the data set, a share ``held_out``, take no part: ``curves`` has their accuracy as
    they are and under PGD-10. Single-step training may all of a sudden learn to mislead its own attack
    (catastrophic overfitting): where the accuracy under PGD alone falls below half of what it was, ``note``
    says so. ``previews`` are held-out pictures, and what PGD-10 makes of them before and after. A run that
    was cut off goes on; ``result.model()`` is the model, ``load_model("trained:folder")`` the same later.

    Raises DivergenceError if the loss is no longer finite, InputError where no classes are known.
    Source: Madry et al. 2018, section 2; Zhang et al. 2019, algorithm 1; Wong et al. 2020, algorithm 3.
    """
    wanted = classes_of(model, dataset, labels)
    trained = trainable(model)
    count, held = split(dataset, held_out)
    trial = Trial(model, trained, dataset, held, wanted, eps=eps, norm=norm)
    inner = 1 if algorithm == "fast" else attack_steps
    step_size = step_size or (1.25 * eps if algorithm == "fast" else eps / 4)

    def madry(images: Tensor, y: Tensor, grown: float) -> Tensor:
        ball: dict[str, Any] = {"eps": grown * eps, "norm": norm}
        start = [random_point(image[None], **ball, generator=torch.default_generator) for image in images]
        attack = ball | {"start": torch.cat(start), "step_size": grown * step_size, "steps": inner}
        found = worst(trained, images, y, **attack)
        trained.module.train()
        return cross_entropy(trained(found), y)

    def trades(images: Tensor, y: Tensor, grown: float) -> Tensor:
        with torch.no_grad():
            p = trained(images).softmax(1)
        ball: dict[str, Any] = {"eps": grown * eps, "norm": norm}
        start = project(images + 0.001 * torch.randn_like(images), images, **ball)
        attack = ball | {"start": start, "step_size": grown * step_size, "steps": inner}
        found = worst(trained, images, p, divergence, **attack)
        trained.module.train()
        clean = trained(images)
        return cross_entropy(clean, y) + beta * divergence(trained(found), clean.softmax(1))

    def loss(images: Tensor, places: Sequence[int], share: float) -> Tensor:
        grown = min(1.0, share / warm_up) if warm_up else 1.0
        value = (trades if algorithm == "trades" else madry)(images, wanted(places), grown)
        trained.module.eval()
        return value

    optimizer = torch.optim.SGD(trained.module.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
    course = train(
        trained.module, dataset, loss, optimizer, steps=steps, batch=batch, seed=seed or 0, count=count,
        at_once=batch_size(model), schedule=lambda share: 1 - share, watch=trial,
    )  # fmt: skip
    clean, robust = (course.curves[name].tolist() for name in ("clean", UNDER_PGD))
    note = collapse(clean, robust, course.measured.tolist(), len(trial.images))
    name = "defenses.adversarial_training"
    return TrainedModel.of(name, trained, model, course, note=note, **trial.shown())


def collapse(clean: Sequence[float], robust: Sequence[float], measured: Sequence[int], pictures: int) -> str:
    """When the accuracy under PGD fell below half of its best, and the plain one did not fall with it.

    By more than so few pictures do by chance: twice the standard error of the difference.
    """
    best, then = 0.0, 0.0
    for plain, attacked, step in zip(clean, robust, measured, strict=True):
        chance = 2 * ((best * (1 - best) + attacked * (1 - attacked)) / pictures) ** 0.5
        if attacked < best / 2 and best - attacked > chance and plain > 0.8 * then:
            return f"catastrophic overfitting: under PGD {best:.0%}, then {attacked:.0%} after {step} steps"
        if attacked > best:
            best, then = attacked, plain
    return ""


@hookimpl
def phosphene_methods():
    return [adversarial_training]
