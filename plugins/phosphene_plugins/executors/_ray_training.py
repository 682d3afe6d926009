"""The processes of a training on a Ray cluster, which add their gradients by torch's gloo backend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError

from phosphene import PhospheneError
from phosphene.training import GradientSteps, OneProcess, ProcessGroup

from ._ray_shards import cluster_cpus
from ._sending import describe_error, pack, unpack
from ._training_processes import GlooGroup, count_processes, open_store


class RayTrainingProcesses:
    """A ``TrainingExecutor`` of this process and of actors, as many in all as the cluster has CPUs for."""

    def __init__(self) -> None:
        #: The number of processes of the largest group so far.
        self.largest_group = 1

    @contextmanager
    def group(self, task: GradientSteps) -> Iterator[ProcessGroup]:
        """The group of the processes, which are started here and killed at the end."""
        cpus = task.settings.threads
        count = count_processes(task, cluster_cpus() // cpus)
        if count == 1:
            yield OneProcess()
            return
        self.largest_group = max(self.largest_group, count)
        # As an array, which workers of one machine read without a copy.
        stored = ray.put(np.frombuffer(pack(task), dtype=np.uint8))
        actor = ray.remote(num_cpus=cpus, num_gpus=int(_is_on_gpu(task)))(_Member)
        members = [actor.remote() for _ in range(1, count)]
        following: list[Any] = []
        try:
            host = ray.util.get_node_ip_address()
            _answers([member.read.remote([stored], sys.path) for member in members])
            store = open_store(host, 0, count)
            following += [
                member.follow.remote(host, store.port, rank, count) for rank, member in enumerate(members, 1)
            ]
            yield GlooGroup(store, 0, count, host)
        except ConnectionError:
            _answers(following, timeout=1)
            raise
        finally:
            for member in members:
                ray.kill(member)


class _Member:
    """The actor of a process other than the first of a group. Its answers are packed errors, or None."""

    def __init__(self) -> None:
        self._task: GradientSteps | None = None

    def read(self, stored: list[Any], path: list[str]) -> bytes:
        """Read the task. ``path`` is that of the run's modules."""
        try:
            sys.path += [entry for entry in path if entry not in sys.path]
            self._task = unpack(ray.get(stored[0]).data)
            return pack(None)
        except Exception as error:
            return pack(describe_error(error))

    def follow(self, host: str, port: int, rank: int, count: int) -> bytes:
        """Take the steps of the first process."""
        assert self._task is not None
        try:
            store = open_store(host, port, count)
            self._task.follow(GlooGroup(store, rank, count, ray.util.get_node_ip_address()))
            return pack(None)
        except Exception as error:
            return pack(describe_error(error))


def _answers(references: list[Any], timeout: float | None = None) -> None:
    """Wait for the answers of actors. Raises the first error, and PhospheneError where an actor ended."""
    for rank, reference in enumerate(references, 1):
        try:
            answer = unpack(ray.get(reference, timeout=timeout))
        except GetTimeoutError:
            continue
        except RayError as error:
            raise PhospheneError(
                f"process {rank} of the training ended ({type(error).__name__}); the same run with the same "
                "output folder resumes, and executor='local' trains in this process"
            ) from error
        if isinstance(answer, Exception) and not isinstance(answer, ConnectionError):
            raise answer


def _is_on_gpu(task: GradientSteps) -> bool:
    return any(parameter.is_cuda for parameter in task.network.parameters())
