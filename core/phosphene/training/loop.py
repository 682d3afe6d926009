"""The training loop: seeded, resumable, evaluated at regular steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import is_checkpointing, save_progress, saved_progress
from ..data.datasets import Dataset, TensorDataset
from ..errors import DivergenceError
from ..finite_values import NotFiniteError
from ..progress import progress_bar

#: ``loss(images (n, C, H, W), indices, progress) -> (n,)``: the loss of each image. ``indices`` are the
#: images' positions in the data set, ``progress`` in [0, 1) the share of the steps that is done.
Loss = Callable[[Tensor, Sequence[int], float], Tensor]
#: ``evaluate() -> {name: value}``: metrics in [0, 1] of the network as it is.
Metrics = Callable[[], Mapping[str, float]]

#: How often a training is evaluated after its start.
EVALUATIONS = 8
#: Bytes of images that are cached in memory; a larger data set is read again in every epoch.
_CACHE_BYTES = 2**28


@dataclass(frozen=True)
class TrainingHistory:
    """The course of a training.

    ``losses`` (steps,) is the mean loss of each batch. ``curves`` has the metrics by name, each (M,), after
    ``evaluation_steps`` (M,) steps. ``frames`` (F, P, C, H, W), uint8, are the previews, or None.
    """

    losses: Tensor
    evaluation_steps: Tensor
    curves: dict[str, Tensor]
    frames: Tensor | None = None


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
    stage: a method that trains several networks in turn passes all of them as one ``network`` each time and
        numbers its calls. A stage that was completed before an interruption is not run again.

    Leaves the network in eval mode without gradients. Raises DivergenceError where the loss or a weight is
    not finite.
    """
    count = len(dataset) if count is None else count
    parameter = next(network.parameters())
    initial_rates = [group["lr"] for group in optimizer.param_groups]
    evaluation_steps = {round(n * steps / EVALUATIONS) for n in range(EVALUATIONS + 1)} if evaluate else set()
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
        _load_state(network, optimizer, state)

    permutation = _permutations(count, seed)
    read = dataset.read if isinstance(dataset, TensorDataset) else _cached_reader(dataset)
    first = len(losses)
    bar = progress_bar(range(first, steps), "training", steps - first, note=lambda: f"loss {losses[-1]:.3f}")
    for step in bar:
        torch.manual_seed((seed + step) % 2**63)
        indices = [permutation(n // count)[n % count] for n in range(step * batch, (step + 1) * batch)]
        images = read(indices).to(parameter)
        for group, rate in zip(optimizer.param_groups, initial_rates, strict=True):
            group["lr"] = rate * schedule(step / steps)
        optimizer.zero_grad()
        try:
            mean_loss = _accumulate_gradients(loss, images, indices, step / steps, max_batch or batch)
        except (NotFiniteError, DivergenceError):  # the network's output, or logits of it, overflowed
            mean_loss = math.nan
        if not math.isfinite(mean_loss):
            raise DivergenceError(
                f"step {step}: the loss is no longer finite; lower lr (now {initial_rates[0]:g})"
            )
        optimizer.step()
        losses.append(mean_loss)

        try:
            if evaluate and step + 1 in evaluation_steps:
                evaluations.append((step + 1, evaluate()))
            if preview and len(previews) < (step + 1) * min(frames, steps) // steps:
                previews.append((preview() * 255).round().byte().cpu())
        except NotFiniteError as error:
            raise DivergenceError(f"step {step}: {error}; lower lr (now {initial_rates[0]:g})") from error
        if is_checkpointing():
            progress = {"losses": torch.tensor(losses, dtype=torch.float64), "evaluations": evaluations}
            drawn = {"frames": torch.stack(previews)} if previews else {}
            save_progress(stage=stage, **progress, **drawn, **_copy_state(network, optimizer))

    optimizer.zero_grad()
    network.eval().requires_grad_(False)
    if not all(t.isfinite().all() for t in network.state_dict().values() if t.is_floating_point()):
        raise DivergenceError(
            f"after the last step the weights are not finite; lower lr (now {initial_rates[0]:g})"
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
    )


def _accumulate_gradients(
    loss: Loss, images: Tensor, indices: Sequence[int], progress: float, max_batch: int
) -> float:
    """Backpropagate the batch's mean loss in passes of at most ``max_batch`` images, and return it."""
    batch, total = len(images), 0.0
    for part in torch.arange(batch).tensor_split(math.ceil(batch / max_batch)):
        value = loss(images[part], [indices[n] for n in part], progress).sum() / batch
        value.backward()
        total += value.item()
    return total


def _permutations(count: int, seed: int) -> Callable[[int], list[int]]:
    """A function from an epoch's number to its order of the images."""

    @functools.lru_cache(2)  # a batch may cross from one epoch into the next
    def permutation(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed((seed + epoch) % 2**63)
        return torch.randperm(count, generator=generator).tolist()

    return permutation


def _cached_reader(dataset: Dataset) -> Callable[[Sequence[int]], Tensor]:
    """A function that reads images by index, each only once while they fit into ``_CACHE_BYTES``."""
    cache: dict[int, Tensor] = {}

    def read(indices: Sequence[int]) -> Tensor:
        missing = [index for index in dict.fromkeys(indices) if index not in cache]
        images = cache | (dict(zip(missing, dataset.read(missing), strict=True)) if missing else {})
        if len(images) * images[indices[0]].nbytes <= _CACHE_BYTES:
            cache.update(images)
        return torch.stack([images[index] for index in indices])

    return read


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
