"""The training loop: seeded, resumable, evaluated at intervals."""

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
from ..progress import progress_bar

#: ``loss(images (n, C, H, W), places, share) -> (n,)``: what is minimised, of pictures, the places where
#: they stand in the data set, and the share of all steps that is done.
Loss = Callable[[Tensor, Sequence[int], float], Tensor]


#: What a training is watched by: shares in [0, 1] by name.
Metrics = Callable[[], Mapping[str, float]]


#: How often it is looked at, the beginning aside.
EVALUATIONS = 8


#: Bytes of pictures that are not read or drawn again in every round.
_MEMORY = 2**28


@dataclass(frozen=True)
class TrainingHistory:
    """How a training went: ``losses`` (steps,); after ``measured`` (M,) steps the ``curves``, each (M,).

    ``frames`` (F, P, C, H, W), bytes, are what was drawn on the way, where that was asked for.
    """

    losses: Tensor
    measured: Tensor
    curves: dict[str, Tensor]
    frames: Tensor | None = None


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
    at_once: int | None = None,
    schedule: Callable[[float], float] = lambda share: 1.0,
    watch: Metrics | None = None,
    frames: int = 0,
    draw: Callable[[], Tensor] | None = None,
    stage: int = 0,
) -> TrainingHistory:
    """Minimise the mean of ``loss`` over the first ``count`` pictures of a data set, ``batch`` a step.

    Pictures come in random orders, each once before any comes again. All that is random in a step depends
    on ``seed`` and its number alone, so a method that was cut off goes on bit by bit when ``run`` is given
    the same ``out``. At most ``at_once`` pictures go through the network together; their gradients are
    summed. ``schedule``, told the share of the steps that is done, gives what the learning rates are
    multiplied by. ``watch`` is asked before, at the end and between; ``draw`` for pictures (P, C, H, W) in
    [0, 1], ``frames`` times, evenly over the steps, the last at the end. Leaves the network frozen in eval
    mode. A method that trains several networks one after another gives all of them as one ``network`` each
    time, and numbers the ``stage``: what is done is then not done again. Raises DivergenceError if the loss
    or a weight is no longer finite.
    """
    count = len(dataset) if count is None else count
    parameter = next(network.parameters())
    rates = [group["lr"] for group in optimizer.param_groups]
    marks = {round(n * steps / EVALUATIONS) for n in range(EVALUATIONS + 1)} if watch else set()
    losses: list[float] = []
    seen: list[tuple[int, Mapping[str, float]]] = []
    film: list[Tensor] = []
    state = saved_progress()
    if state and state["stage"] >= stage:
        later = state["stage"] > stage
        losses, seen = [0.0] * steps if later else state["losses"].tolist(), [] if later else state["seen"]
        film = [] if later else list(state.get("frames", ()))
        _fill(network, None if later else optimizer, state)
    elif watch:
        seen.append((0, watch()))

    @functools.lru_cache(2)
    def order(epoch: int) -> list[int]:
        return torch.randperm(count, generator=_generator(seed + epoch)).tolist()

    read = dataset.read if isinstance(dataset, TensorDataset) else _cached_reader(dataset)
    first = len(losses)
    work = progress_bar(range(first, steps), "training", steps - first, note=lambda: f"loss {losses[-1]:.3f}")
    for step in work:
        torch.manual_seed((seed + step) % 2**63)
        places = [order(n // count)[n % count] for n in range(step * batch, (step + 1) * batch)]
        images = read(places).to(parameter)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step / steps)
        optimizer.zero_grad()
        total = 0.0
        parts = math.ceil(batch / (at_once or batch))
        for part in torch.arange(batch).tensor_split(parts):
            value = loss(images[part], [places[n] for n in part], step / steps).sum() / batch
            value.backward()
            total += value.item()
        if not math.isfinite(total):
            raise DivergenceError(f"Step {step}: the loss is no longer finite; lower lr (now {rates[0]:g}).")
        optimizer.step()
        losses.append(total)
        if step + 1 in marks and watch:
            seen.append((step + 1, watch()))
        if draw and len(film) < (step + 1) * min(frames, steps) // steps:
            film.append((draw() * 255).round().byte().cpu())
        if is_checkpointing():
            done = {"losses": torch.tensor(losses, dtype=torch.float64)} | _state(network, optimizer)
            save_progress(stage=stage, seen=seen, **done, **({"frames": torch.stack(film)} if film else {}))
    optimizer.zero_grad()
    network.eval().requires_grad_(False)
    if not all(t.isfinite().all() for t in network.state_dict().values() if t.is_floating_point()):
        raise DivergenceError(f"The last step left weights that are not finite; lower lr (now {rates[0]:g}).")
    names = seen[0][1] if seen else ()
    return TrainingHistory(
        losses=torch.tensor(losses).to(parameter),
        measured=torch.tensor([step for step, _ in seen], device=parameter.device),
        curves={name: torch.tensor([float(told[name]) for _, told in seen]).to(parameter) for name in names},
        frames=torch.stack(film).to(parameter.device) if film else None,
    )


def _cached_reader(dataset: Dataset) -> Callable[[Sequence[int]], Tensor]:
    """Read pictures of a data set, and those that there is memory for once only."""
    known: dict[int, Tensor] = {}

    def read(places: Sequence[int]) -> Tensor:
        new = [place for place in dict.fromkeys(places) if place not in known]
        found = known | (dict(zip(new, dataset.read(new), strict=True)) if new else {})
        if len(found) * found[places[0]].nbytes <= _MEMORY:
            known.update(found)
        return torch.stack([found[place] for place in places])

    return read


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed % 2**63)


def _state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that the next step depends on, as copies: the originals may be cut off half-way through a step."""
    found = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for number, known in optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{number}.{name}": v for name, v in known.items() if isinstance(v, Tensor)}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def _fill(network: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Any]) -> None:
    """Bring both to where ``_state`` found them."""
    network.load_state_dict({n.removeprefix("network."): t for n, t in state.items() if n[:8] == "network."})
    if optimizer is None:
        return
    known: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith("optimizer."):
            _, number, what = name.split(".", 2)
            known.setdefault(int(number), {})[what] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": known})
