"""The shards of folds as tasks of Ray."""

from __future__ import annotations

import secrets
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from phosphene import Dataset, Fold, PhospheneError
from phosphene.data import ComputedShard, FoldTask, State

from ._sending import ATTEMPTS, describe_error, pack, unpack

#: Tasks for each that the cluster computes at once: the running ones, and as many that wait.
_IN_FLIGHT = 2

#: The task of the last fold that this worker computed shards of, by its key.
_loaded: dict[str, FoldTask] = {}


class RayShards:
    """A ``ShardExecutor`` of the cluster that this process is connected to.

    The model, the data set and the fold are put into Ray's object store once, and read once by each worker
    process. A shard whose worker or machine is lost is computed again.
    """

    def __init__(self) -> None:
        self._pending: deque[Any] = deque()
        #: Whether a fold was run.
        self.was_used = False

    def __enter__(self) -> RayShards:
        return self

    def __exit__(self, *error: object) -> None:
        self._cancel()

    def _cancel(self) -> None:
        """Cancel the tasks whose results were not read."""
        while self._pending:
            ray.cancel(self._pending[-1], force=True)
            self._pending.pop()

    def states(
        self, fold: Fold[Any], dataset: Dataset, size: int, shards: Sequence[range], seed: int | None
    ) -> Iterator[State]:
        """The state of every shard, in their order."""
        self.was_used = True
        task = FoldTask.capture(fold, dataset, size, seed)
        key = secrets.token_hex(8)
        # As an array, which workers of this machine read without a copy.
        stored = ray.put(np.frombuffer(pack(task), dtype=np.uint8))
        cpus = min(task.settings.threads, _largest_machine())
        options = {"num_cpus": cpus, "max_retries": ATTEMPTS - 1}
        if _uses_gpu(fold):
            options["num_gpus"] = 1
        compute = ray.remote(**options)(_compute)
        waiting = deque(shards)
        try:
            for shard in shards:
                while waiting and len(self._pending) < _IN_FLIGHT * max(1, cluster_cpus() // cpus):
                    sent = compute.remote(key, [stored], waiting.popleft(), sys.path)
                    self._pending.append(sent)
                answer = _result(self._pending[0], shard)
                self._pending.popleft()
                yield task.receive(answer)
        finally:
            self._cancel()


def _uses_gpu(fold: Fold[Any]) -> bool:
    """Whether a model or a tensor of the fold is on a GPU."""
    devices = [getattr(value, "device", None) for value in vars(fold).values()]
    return any(getattr(device, "type", None) == "cuda" for device in devices)


def _compute(key: str, stored: list[Any], shard: range, path: list[str]) -> bytes:
    """The task of Ray: the packed ``ComputedShard``, or the error. ``path`` is that of the run's modules."""
    try:
        if key not in _loaded:
            sys.path += [entry for entry in path if entry not in sys.path]
            _loaded.clear()
            _loaded[key] = unpack(ray.get(stored[0]).data)
        return pack(_loaded[key].compute(shard))
    except Exception as error:
        return pack(describe_error(error))


def _result(reference: Any, shard: range) -> ComputedShard:
    """The result of a task. Raises its error, or PhospheneError where its workers died."""
    try:
        answer = unpack(ray.get(reference))
    except (WorkerCrashedError, OutOfMemoryError) as error:
        raise PhospheneError(
            f"the workers of Ray that computed images {shard.start} to {shard.stop - 1} died {ATTEMPTS} "
            "times, as they do when memory runs out; a smaller batch_size needs less memory"
        ) from error
    except RayTaskError as error:  # before the task could begin
        raise PhospheneError(
            f"a worker of Ray could not start: {error.cause}; the cluster's machines need this version of "
            "Phosphene"
        ) from error
    except RayError as error:
        raise PhospheneError(
            f"Ray could not compute images {shard.start} to {shard.stop - 1}: {error}"
        ) from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def cluster_cpus() -> int:
    """The CPUs of all machines of the cluster."""
    return int(ray.cluster_resources().get("CPU", 0))


def _largest_machine() -> int:
    """The CPUs of the largest machine of the cluster: a task that reserves more would wait forever."""
    return max([1, *(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])])
