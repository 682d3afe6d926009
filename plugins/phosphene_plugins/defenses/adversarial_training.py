"""Adversarial training (PGD-AT, TRADES, fast): a network trained on adversarial examples of its own."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, TensorDataset, batch_size, hookimpl, method
from phosphene.attacks import project, random_point
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import InvariantTo, PixelRange, param
from phosphene.testing import linear_model
from phosphene.training import (
    TrainedModel,
    label_reader,
    linear_decay,
    train,
    train_test_split,
    trainable_copy,
)

from ._training_evaluation import UNDER_PGD, HeldOutEvaluation, TrainingOptions, pgd_points, training_cost
from ._training_reference import (
    SHORT_TRAINING,
    PlainLoss,
    assert_trained_plainly,
    cost_by_hand,
    evaluation_by_hand,
    sample_training,
)


def kl_divergence(logits: Tensor, probabilities: Tensor) -> Tensor:
    """KL(p || softmax(z)) of each image, (N,)."""
    return F.kl_div(logits.log_softmax(1), probabilities, reduction="none").sum(1)


def step_on_a_linear_model_maximizes_the_worst_case_margin() -> None:
    """A step on a linear model is one on the margin m - eps |w|_q of w = w_own - w_other, in closed form."""
    model = linear_model(bias=[0.1, -0.1])
    linear: Any = model.module[1]  # type: ignore[index]
    generator = torch.Generator().manual_seed(0)
    images = 0.3 + 0.4 * torch.rand(5, 1, 2, 2, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0, 0])
    dataset = TensorDataset(images, [str(label) for label in labels.tolist()])
    weight, bias = (p.detach().clone().requires_grad_() for p in (linear.weight, linear.bias))
    x, y = model.normalize(images[:4]).flatten(1), labels[:4]
    difference = weight[y] - weight[1 - y]
    clean = (difference * x).sum(1) + bias[y] - bias[1 - y]
    options: dict[str, Any] = {"steps": 1, "batch": 4, "lr": 0.5, "held_out": 0.2, "seed": 0}
    norms: tuple[tuple[Literal["linf", "l2"], int], ...] = (("linf", 1), ("l2", 2))
    for norm, dual in norms:
        margin = clean - 0.1 * (difference / model.std).norm(dual, dim=1)
        loss = F.softplus(-margin).mean()
        gradients = torch.autograd.grad(loss, (weight, bias), retain_graph=True)
        # Steps so long that the random start does not matter.
        result = adversarial_training(
            model, dataset, eps=0.1, norm=norm, step_size=1000.0, attack_steps=3, weight_decay=0.0, **options
        )
        trained = [p.detach() for p in result.network.parameters()]
        torch.testing.assert_close(trained[0], (weight - 0.5 * gradients[0]).detach())
        torch.testing.assert_close(trained[1], (bias - 0.5 * gradients[1]).detach())
        if norm == "l2":
            assert (result.previews[1:] - images[4]).flatten(1).norm(dim=1).amax() <= 0.1 + 1e-9


def training_equals_a_plain_loop() -> None:
    """Each algorithm equals a plain loop with the attack written out, the ball growing in the warm-up."""
    model, dataset = sample_training(nn.BatchNorm1d(3), nn.Tanh())

    def reference(algorithm: str, steps: int, step_size: float, warm_up: float) -> PlainLoss:
        def loss(trained: Model, images: Tensor, labels: Tensor, progress: float) -> Tensor:
            scale = min(1.0, progress / warm_up) if warm_up else 1.0
            trained.module.eval()
            answer = trained(images).softmax(1).detach()
            if algorithm == "trades":
                offset = (0.001 * torch.randn_like(images)).clamp(-0.08 * scale, 0.08 * scale)
            else:
                offset = scale * 0.08 * torch.stack([2 * torch.rand(1, 2, 2) - 1 for _ in images]).double()
            for _ in range(steps):
                x = (images + offset).detach().requires_grad_()
                log_p = trained(x).log_softmax(1)
                divergence = (answer * (answer.log() - log_p)).sum(1)
                ascent = divergence if algorithm == "trades" else F.nll_loss(log_p, labels, reduction="none")
                (gradient,) = torch.autograd.grad(ascent.sum(), x)
                offset = (offset + scale * step_size * gradient.sign()).clamp(-0.08 * scale, 0.08 * scale)
            trained.module.train()
            if algorithm != "trades":
                return F.cross_entropy(trained(images + offset), labels, reduction="none")
            log_p, log_q = trained(images).log_softmax(1), trained(images + offset).log_softmax(1)
            return F.nll_loss(log_p, labels, reduction="none") + 5 * (log_p.exp() * (log_p - log_q)).sum(1)

        return loss

    options: dict[str, Any] = {"eps": 0.08, "beta": 5.0, "weight_decay": 0.02, **SHORT_TRAINING}
    momentum = partial(torch.optim.SGD, momentum=0.9, weight_decay=0.02)
    for algorithm, steps, step_size, warm_up in (
        ("pgd", 2, 0.02, 0.5), ("trades", 2, 0.02, 0.0), ("trades", 1, 0.02, 0.5), ("fast", 1, 0.1, 0.0)
    ):  # fmt: skip
        own: dict[str, Any] = {
            "algorithm": algorithm,
            "attack_steps": steps if algorithm != "fast" else 7,
            "warm_up": warm_up,
        }
        assert_trained_plainly(
            partial(adversarial_training, model, dataset, **own, **options), model, dataset,
            reference(algorithm, steps, step_size, warm_up), momentum,
        )  # fmt: skip


def note_reports_a_drop_beyond_chance() -> None:
    """80 %, then 30 % of 7 images is beyond chance, of 5 images not; nor is a drop of the clean accuracy."""
    assert "80%, then 30% after 9 steps" in overfitting_note([1, 0.9, 0.81], [0.5, 0.8, 0.3], [0, 4, 9], 7)
    assert not overfitting_note([1, 0.9, 0.81], [0.5, 0.8, 0.3], [0, 4, 9], 5)
    assert not overfitting_note([1, 0.9, 0.71], [0.5, 0.8, 0.3], [0, 4, 9], 7)
    assert not overfitting_note([1, 0.9, 0.81], [0.5, 0.8, 0.41], [0, 4, 9], 1000)
    assert not overfitting_note([1, 0.9], [0.5, 0.8], [0, 4], 1000)


def trains_on_the_worst_case() -> None:
    """A linear model in closed form, a plain loop for each algorithm, evaluation, cost, and the note."""
    step_on_a_linear_model_maximizes_the_worst_case_margin()
    training_equals_a_plain_loop()
    evaluation_by_hand()
    cost_by_hand()
    note_reports_a_drop_beyond_chance()


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
    relations=[InvariantTo("logit_shift", fields=("losses",))],
    needs=["gradients", "dataset", "training"],
    # TRADES, the most expensive: labels, p, the attack, f(x) and f(x + d); backward f(x) and f(x + d).
    cost=training_cost(param.attack_steps + 4, param.attack_steps + 2),
    batch_independent=False,
    tags=["training"],
    oracle=trains_on_the_worst_case,
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
        Literal["pgd", "trades", "fast"],
        Field(description="PGD-AT, TRADES, or fast: one step from a random point"),
    ] = "pgd",
    eps: Annotated[float, Field(gt=0, le=1000, description="radius of the ball, pixels in [0, 1]")] = 8 / 255,
    norm: Annotated[Literal["linf", "l2"], Field(description="norm of the ball")] = "linf",
    step_size: Annotated[
        float | None,
        Field(gt=0, le=1000, description="step size of the attack; default: eps / 4, fast: 1.25 eps"),
    ] = None,
    attack_steps: Annotated[
        int, Field(ge=1, le=1000, description="steps of the attack; fast always takes one")
    ] = 7,
    warm_up: Annotated[
        float, Field(ge=0, le=1, description="share of the training in which eps grows from 0")
    ] = 0.0,
    beta: Annotated[float, Field(ge=0, le=1000, description="weight of the KL divergence in TRADES")] = 6.0,
    weight_decay: Annotated[float, Field(ge=0, le=1, description="weight decay of SGD")] = 5e-4,
    training: TrainingOptions = TrainingOptions(steps=1000, batch=64, lr=3e-3),
    seed: Seed = None,
) -> TrainedModel:
    """Adversarial training (PGD-AT, TRADES, fast): a copy of the model trained on adversarial examples.

    "pgd", "fast":  min_theta E max_{|d| <= eps} CE(f(x + d), y)
    "trades":       min_theta E CE(f(x), y) + beta max_{|d| <= eps} KL(f(x) || f(x + d))

    The inner maximum is approximated by ``attack_steps`` of PGD from a random point of the ball; for "fast"
    by one step of 1.25 eps; for "trades" from x + 0.001 N(0, 1). The attack uses the network in eval mode,
    the loss in training mode. SGD with momentum 0.9 starts from the model's weights and trains all of them.
    A network that collapses to one class under a large ball (loss stays at log K) needs a ``warm_up``.

    An interrupted run with an ``out`` resumes. ``load_model("trained:folder")`` loads the saved model.

    Returns:
        ``model()`` is the trained model. ``losses`` (steps,); ``curves`` has the accuracy on held-out images,
        "clean" and "under PGD-10", after ``evaluation_steps``. ``previews`` are held-out images: clean,
        attacked before and attacked after the training. ``note`` reports catastrophic overfitting: the
        accuracy under PGD alone fell below half of its best, which happens with single-step training.

    Raises:
        DivergenceError: the loss or a weight is not finite.
        InputError: the data set has no labels.

    Example::
        from phosphene import run

        options = {"steps": 2, "batch": 2, "attack_steps": 1}
        result = run("adversarial_training", dataset="builtin:scenes/8", **options)
        result.losses.shape  # (2,)

    Source: Madry et al. 2018, section 2; Zhang et al. 2019, algorithm 1; Wong et al. 2020, algorithm 3.
    """
    read_labels = label_reader(model, dataset, training.labels)
    trained = trainable_copy(model)
    count, test_indices = train_test_split(dataset, training.held_out)
    evaluation = HeldOutEvaluation(model, trained, dataset, test_indices, read_labels, eps=eps, norm=norm)
    steps_of_attack = 1 if algorithm == "fast" else attack_steps
    step_size = step_size or (1.25 * eps if algorithm == "fast" else eps / 4)

    def pgd_loss(images: Tensor, labels: Tensor, scale: float) -> Tensor:
        """CE(f(x + d), y), the ball scaled by ``scale``."""
        ball: dict[str, Any] = {"eps": scale * eps, "norm": norm}
        start = [random_point(image[None], **ball, generator=torch.default_generator) for image in images]
        attack = ball | {"step_size": scale * step_size, "steps": steps_of_attack}
        examples = pgd_points(trained, images, labels, start=torch.cat(start), **attack)
        trained.module.train()
        return F.cross_entropy(trained(examples), labels, reduction="none")

    def trades_loss(images: Tensor, labels: Tensor, scale: float) -> Tensor:
        """CE(f(x), y) + beta KL(f(x) || f(x + d)), the ball scaled by ``scale``."""
        with torch.no_grad():
            probabilities = trained(images).softmax(1)
        ball: dict[str, Any] = {"eps": scale * eps, "norm": norm}
        start = project(images + 0.001 * torch.randn_like(images), images, **ball)
        attack = ball | {"start": start, "step_size": scale * step_size, "steps": steps_of_attack}
        examples = pgd_points(trained, images, probabilities, kl_divergence, **attack)
        trained.module.train()
        clean = trained(images)
        clean_loss = F.cross_entropy(clean, labels, reduction="none")
        return clean_loss + beta * kl_divergence(trained(examples), clean.softmax(1))

    def loss(images: Tensor, indices: Sequence[int], progress: float) -> Tensor:
        scale = min(1.0, progress / warm_up) if warm_up else 1.0
        adversarial_loss = trades_loss if algorithm == "trades" else pgd_loss
        value = adversarial_loss(images, read_labels(indices), scale)
        trained.module.eval()
        return value

    parameters = trained.module.parameters()
    optimizer = torch.optim.SGD(parameters, training.lr, momentum=0.9, weight_decay=weight_decay)
    history = train(
        trained.module, dataset, loss, optimizer, steps=training.steps, batch=training.batch, seed=seed or 0,
        count=count, max_batch=batch_size(model), schedule=linear_decay, evaluate=evaluation,
        checkpoints=training.checkpoints,
    )  # fmt: skip
    clean, robust = (history.curves[name].tolist() for name in ("clean", UNDER_PGD))
    note = overfitting_note(clean, robust, history.evaluation_steps.tolist(), len(evaluation.images))
    name = "defenses.adversarial_training"
    return TrainedModel.from_training(name, trained, model, history, note=note, **evaluation.previews())


def overfitting_note(
    clean: Sequence[float], robust: Sequence[float], steps: Sequence[int], images: int
) -> str:
    """A note on catastrophic overfitting, "" where there is none.

    That is an accuracy under PGD below half of its best while the clean accuracy stayed. The drop must exceed
    chance, twice the standard error of the difference of two shares of so many ``images``.
    """
    best_robust, clean_at_best = 0.0, 0.0
    for clean_now, robust_now, step in zip(clean, robust, steps, strict=True):
        variance = (best_robust * (1 - best_robust) + robust_now * (1 - robust_now)) / images
        is_halved = robust_now < best_robust / 2 and best_robust - robust_now > 2 * variance**0.5
        if is_halved and clean_now > 0.8 * clean_at_best:
            drop = f"under PGD {best_robust:.0%}, then {robust_now:.0%} after {step} steps"
            return f"catastrophic overfitting: {drop}"
        if robust_now > best_robust:
            best_robust, clean_at_best = robust_now, clean_now
    return ""


@hookimpl
def phosphene_methods():
    return [adversarial_training]
