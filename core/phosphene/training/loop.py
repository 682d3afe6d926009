"""The training loop: seeded, resumable, evaluated at regular steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import is_checkpointing, save_progress, saved_progress
from ..data.datasets import Dataset
from ..errors import DivergenceError
from ..finite_values import NotFiniteError
from ..progress import progress_bar
from .gradient_steps import GradientSteps, Loss, process_group

#: ``evaluate() -> {name: value}``: metrics in [0, 1] of the network as it is.
Metrics = Callable[[], Mapping[str, float]]

#: How often a training is evaluated after its start.
EVALUATIONS = 8


@dataclass(frozen=True)
class TrainingHistory:
    """The course of a training.

    ``losses`` (steps,) is the mean loss of each batch. ``curves`` has the metrics by name, each (M,), after
    ``evaluation_steps`` (M,) steps. ``frames`` (F, P, C, H, W), uint8, are the previews, or None.
    ``checkpoints`` are the state dicts after ``checkpoint_steps`` steps.
    """

    losses: Tensor
    evaluation_steps: Tensor
    curves: dict[str, Tensor]
    frames: Tensor | None = None
    checkpoints: tuple[dict[str, Tensor], ...] = ()
    checkpoint_steps: tuple[int, ...] = ()


def linear_decay(progress: float) -> float:
    """A learning-rate schedule that falls linearly from 1 to 0."""
    return 1 - progress


def train(
    network: nn.Module,
    dataset: Dataset,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch: int,
    seed: int,
    count: int | None = None,
    max_batch: int | None = None,
    schedule: Callable[[float], float] = lambda progress: 1.0,
    evaluate: Metrics | None = None,
    frames: int = 0,
    preview: Callable[[], Tensor] | None = None,
    checkpoints: int = 0,
    weights: Callable[[], Mapping[str, Tensor]] | None = None,
    stage: int = 0,
) -> TrainingHistory:
    """Minimize the mean of ``loss`` over the first ``count`` images of a data set.

    steps, batch: number of optimizer steps and of images in each.
    seed: fixes the order of the images and, with the step's number, all that is random in a step. A run that
        was interrupted therefore continues bit by bit when ``run`` is called again with the same ``out``.
    count: number of images to train on; default: all. Every epoch is a random permutation of them.
    max_batch: the most images in one pass; the gradients of several passes are summed. Default: ``batch``.
    schedule: from the share of the steps that is done to the factor of the learning rates.
    evaluate: called before the first step and ``EVALUATIONS`` times after it, the last time at the end.
    frames, preview: ``preview()`` returns images (P, C, H, W) in [0, 1]; it is called ``frames`` times at
        equal intervals, the last time at the end.
    checkpoints, weights: how often ``weights()``, the state dict of the trained network, is stored, at equal
        intervals, the last time at the end. Default: ``network.state_dict``.
    stage: a method that trains several networks in turn passes all of them as one ``network`` each time and
        numbers its calls. A stage that was completed before an interruption is not run again.

    Inside ``use_training_executor`` other processes compute the gradients with this one, ``GradientSteps``.

    Leaves the network in eval mode without gradients. Raises DivergenceError where the loss or a weight is
    not finite.
    """
    count = len(dataset) if count is None else count
    parameter = next(network.parameters())
    evaluation_steps = {round(n * steps / EVALUATIONS) for n in range(EVALUATIONS + 1)} if evaluate else set()
    stored = min(checkpoints, steps)
    checkpoint_steps = tuple(math.ceil(n * steps / stored) for n in range(1, stored + 1))
    weights = weights or network.state_dict
    states: list[dict[str, Tensor]] = []
    losses: list[float] = []
    evaluations: list[tuple[int, Mapping[str, float]]] = []
    previews: list[Tensor] = []

    state = saved_progress()
    if not state or state["stage"] < stage:
        if evaluate:
            evaluations.append((0, evaluate()))
    elif state["stage"] > stage:  # this stage is complete: its losses are no longer needed
        losses = [0.0] * steps
        _load_state(network, None, state)
    else:
        losses, evaluations = state["losses"].tolist(), state["evaluations"]
        previews = list(state.get("frames", ()))
        states = _saved_checkpoints(state, sum(step <= len(losses) for step in checkpoint_steps))
        _load_state(network, optimizer, state)

    first, most = len(losses), max_batch or batch
    task = GradientSteps(network, dataset, loss, optimizer, schedule, first, steps, batch, most, count, seed)
    with process_group(task) as group:
        note = lambda: f"loss {losses[-1]:.3f}"
        bar = progress_bar(range(first, steps), "training", steps - first, note=note)
        for step in bar:
            losses.append(task.run(step, group))
            try:
                if evaluate and step + 1 in evaluation_steps:
                    evaluations.append((step + 1, evaluate()))
                if preview and len(previews) < (step + 1) * min(frames, steps) // steps:
                    previews.append((preview() * 255).round().byte().cpu())
            except NotFiniteError as error:
                raise DivergenceError(f"step {step}: {error}; lower lr (now {task.rates[0]:g})") from error
            if step + 1 in checkpoint_steps:
                states.append({name: tensor.detach().clone() for name, tensor in weights().items()})
            if is_checkpointing():
                progress = {"losses": torch.tensor(losses, dtype=torch.float64), "evaluations": evaluations}
                drawn = {"frames": torch.stack(previews)} if previews else {}
                drawn |= {
                    f"checkpoint.{n}.{k}": t for n, saved in enumerate(states) for k, t in saved.items()
                }
                save_progress(stage=stage, **progress, **drawn, **_copy_state(network, optimizer))

    optimizer.zero_grad()
    network.eval().requires_grad_(False)
    if not all(t.isfinite().all() for t in network.state_dict().values() if t.is_floating_point()):
        raise DivergenceError(
            f"after the last step the weights are not finite; lower lr (now {task.rates[0]:g})"
        )
    names = evaluations[0][1] if evaluations else ()
    return TrainingHistory(
        losses=torch.tensor(losses, dtype=torch.float64).to(parameter.dtype).to(parameter.device),
        evaluation_steps=torch.tensor([step for step, _ in evaluations], device=parameter.device),
        curves={
            name: torch.tensor([float(metrics[name]) for _, metrics in evaluations]).to(parameter)
            for name in names
        },
        frames=torch.stack(previews).to(parameter.device) if previews else None,
        checkpoints=tuple(states),
        checkpoint_steps=checkpoint_steps if states else (),
    )


def _saved_checkpoints(state: Mapping[str, Any], count: int) -> list[dict[str, Tensor]]:
    """The first ``count`` state dicts that an interrupted training had stored."""
    prefixes = [f"checkpoint.{n}." for n in range(count)]
    return [{n.removeprefix(p): t for n, t in state.items() if n.startswith(p)} for p in prefixes]


def _copy_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of weights and optimizer state: the originals may be interrupted in the middle of a step."""
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for number, slots in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{number}.{name}": v for name, v in slots.items() if isinstance(v, Tensor)}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _load_state(
    network: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Any]
) -> None:
    """Load what ``_copy_state`` returned."""
    network.load_state_dict({n.removeprefix("network."): t for n, t in state.items() if n[:8] == "network."})
    if optimizer is None:
        return
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith("optimizer."):
            _, number, slot = name.split(".", 2)
            slots.setdefault(int(number), {})[slot] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
