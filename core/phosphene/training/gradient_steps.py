"""``GradientSteps``: the optimizer steps of a training, computed by one process or by a group of them."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..data.datasets import Dataset, TensorDataset
from ..errors import DivergenceError
from ..finite_values import NotFiniteError
from ..models.batch_size import batch_limit
from ..models.batch_size import max_batch as limit_batches
from ..progress import report_progress
from ..torch_state import TorchSettings

#: ``loss(images (n, C, H, W), indices, progress) -> (n,)``: the loss of each image. ``indices`` are the
#: images' positions in the data set, ``progress`` in [0, 1) the share of the steps that is done.
Loss = Callable[[Tensor, Sequence[int], float], Tensor]

#: Bytes of images that are cached in memory; a larger data set is read again in every epoch.
_CACHE_BYTES = 2**28


class ProcessGroup(Protocol):
    """Processes that compute the same steps: this one is number ``rank`` of ``size``."""

    rank: int
    size: int

    def add(self, values: Tensor) -> Tensor:
        """The sum over all processes of a tensor, of the same shape in each."""
        ...

    def first(self, values: Tensor) -> Tensor:
        """The tensor of the first process, of the same shape in each."""
        ...


class TrainingExecutor(Protocol):
    """Starts the processes of a training."""

    def group(self, task: GradientSteps) -> AbstractContextManager[ProcessGroup]:
        """The group of this process, the first, and of others that run ``task.follow(group)``."""
        ...


class OneProcess:
    """The group of this process alone."""

    rank, size = 0, 1

    def add(self, values: Tensor) -> Tensor:
        return values

    def first(self, values: Tensor) -> Tensor:
        return values


_executor: ContextVar[TrainingExecutor | None] = ContextVar("phosphene_training_executor", default=None)


@contextmanager
def use_training_executor(executor: TrainingExecutor | None) -> Iterator[None]:
    """Inside, trainings are computed by the processes of ``executor``; by this process where it is None."""
    token = _executor.set(executor)
    try:
        yield
    finally:
        _executor.reset(token)


def process_group(task: GradientSteps) -> AbstractContextManager[ProcessGroup]:
    """The processes that compute a training's steps."""
    executor = _executor.get()
    complete = task.first >= task.steps
    return nullcontext(OneProcess()) if executor is None or complete else executor.group(task)


@dataclass
class GradientSteps:
    """The optimizer steps of a training from ``first`` to ``steps``.

    w <- optimizer(w, sum_r g_r),  g_r the gradient of the batch's mean loss over the share of process r

    All processes of a group have the same weights. In each step every process reads its share of the batch,
    the gradients are added, and every process takes the same step. The buffers, such as running statistics,
    are those of the first process. For a given number of processes the weights are the same, bit for bit, in
    every run; those of other numbers differ by rounding, by what is drawn at random for each image and by
    batch normalization, whose statistics are those of a share.

    A task can be pickled by ``cloudpickle`` where its network, data set and loss can.
    """

    network: nn.Module
    dataset: Dataset
    loss: Loss
    optimizer: torch.optim.Optimizer
    schedule: Callable[[float], float]
    first: int
    steps: int
    batch: int
    max_batch: int
    count: int
    seed: int
    settings: TorchSettings = field(default_factory=TorchSettings.current)
    batch_limit: int | None = field(default_factory=batch_limit)

    def __post_init__(self) -> None:
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self._prepare()

    def _prepare(self) -> None:
        self._permutation = _permutations(self.count, self.seed)
        in_memory = isinstance(self.dataset, TensorDataset)
        self._read = self.dataset.read if in_memory else _cached_reader(self.dataset)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_permutation", "_read")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()

    def run(self, step: int, group: ProcessGroup) -> float:
        """Take a step, and return the batch's mean loss. Raises DivergenceError where it is not finite."""
        torch.manual_seed(self._seed(step, group.rank))
        start, stop = (step * self.batch + self.batch * r // group.size for r in (group.rank, group.rank + 1))
        indices = [self._permutation(n // self.count)[n % self.count] for n in range(start, stop)]
        for options, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            options["lr"] = rate * self.schedule(step / self.steps)
        self.optimizer.zero_grad()
        try:
            mean_loss = self._accumulate_gradients(indices, step / self.steps)
        except (NotFiniteError, DivergenceError):  # the network's output, or logits of it, overflowed
            mean_loss = math.nan
        if group.size > 1:
            mean_loss = self._add_gradients(mean_loss, group)
        if not math.isfinite(mean_loss):
            raise DivergenceError(
                f"step {step}: the loss is no longer finite; lower lr (now {self.rates[0]:g})"
            )
        self.optimizer.step()
        return mean_loss

    def follow(self, group: ProcessGroup) -> None:
        """Take all steps, in a process that is not the first of the group."""
        with self.settings.apply(), limit_batches(self.batch_limit), report_progress(False):
            try:
                for step in range(self.first, self.steps):
                    self.run(step, group)
            except DivergenceError:  # the first process raises it as well
                pass

    def _seed(self, step: int, rank: int) -> int:
        """The seed of what a process draws in a step."""
        seed = (self.seed + step) % 2**63
        return seed if rank == 0 else int(hashlib.sha256(f"{seed}/{rank}".encode()).hexdigest()[:15], 16)

    def _accumulate_gradients(self, indices: Sequence[int], progress: float) -> float:
        """Backpropagate the share's part of the mean loss in passes of at most ``max_batch`` images."""
        if not indices:
            return 0.0
        images = self._read(indices).to(next(self.network.parameters()))
        total = 0.0
        for part in torch.arange(len(indices)).tensor_split(math.ceil(len(indices) / self.max_batch)):
            loss = self.loss(images[part], [indices[n] for n in part], progress).sum() / self.batch
            loss.backward()
            total += loss.item()
        return total

    def _add_gradients(self, mean_loss: float, group: ProcessGroup) -> float:
        """Set gradients to their sums over the processes, and return the sum of the losses."""
        parameters = [p for options in self.optimizer.param_groups for p in options["params"]]
        # A parameter without a gradient in any process stays without: an optimizer skips it.
        numbers = torch.tensor([mean_loss, *(p.grad is not None for p in parameters)], dtype=torch.float64)
        total, *counts = group.add(numbers).tolist()
        used = [p for p, count in zip(parameters, counts, strict=True) if count]
        if math.isfinite(total) and used:
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in used]
            sums = group.add(torch.cat([gradient.flatten() for gradient in gradients]))
            for p, value in zip(used, sums.split([p.numel() for p in used]), strict=True):
                p.grad = value.view_as(p)
        buffers = [b for b in self.network.buffers() if b.is_floating_point()]
        if buffers:
            values = group.first(torch.cat([b.flatten() for b in buffers]))
            for b, value in zip(buffers, values.split([b.numel() for b in buffers]), strict=True):
                b.copy_(value.view_as(b))
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
