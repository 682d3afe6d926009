"""The processes of a training on this machine, which add their gradients by torch's gloo backend."""

from __future__ import annotations

import datetime
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed
from torch import Tensor

from phosphene import PhospheneError
from phosphene.training import GradientSteps, OneProcess, ProcessGroup

from ._process_pool import end_process, end_text, in_memory, start_process
from ._sending import pickle_error, unpack

HOST = "127.0.0.1"

#: torch.distributed does not declare these names to type checkers.
_dist: Any = torch.distributed

#: Longer than an evaluation by the first process takes; the end of a process is noticed at once.
_TIMEOUT = datetime.timedelta(days=7)


class TrainingProcesses:
    """A ``TrainingExecutor`` of at most ``count`` processes, this one among them."""

    def __init__(self, count: int) -> None:
        self._count = count
        #: The number of processes of the largest group so far.
        self.largest_group = 1

    @contextmanager
    def group(self, task: GradientSteps) -> Iterator[ProcessGroup]:
        """The group of the processes, which are started here and killed at the end."""
        count = count_processes(task, self._count)
        if count == 1:
            yield OneProcess()
            return
        self.largest_group = max(self.largest_group, count)
        members: list[_Member] = []
        try:
            with in_memory(task) as path:
                for rank in range(1, count):
                    members.append(_Member(rank, path))
                for member in members:
                    member.receive()  # it has read the task
            store = open_store(HOST, 0, count)
            for member in members:
                member.send(store.port, count)
            yield GlooGroup(store, 0, count)
        except ConnectionError:
            for member in members:
                member.raise_error()
            raise
        finally:
            for member in members:
                member.kill()


def count_processes(task: GradientSteps, most: int) -> int:
    """At most ``most`` processes, and at most one for each image of a batch.

    For a task that cannot be sent it is 1, with a warning.
    """
    count = max(1, min(most, task.batch))
    if count > 1 and (error := pickle_error(task)) is not None:
        reason = " ".join(str(error).split())
        warnings.warn(f"the training runs in this process: it cannot be sent ({reason})", stacklevel=4)
        return 1
    return count


class _Member:
    """A process other than the first of a group."""

    def __init__(self, rank: int, path: str) -> None:
        self._process: subprocess.Popen[bytes]
        self._connection: Connection
        self._process, self._connection = start_process("_training_worker")
        self._rank = rank
        self._connection.send(path)

    def send(self, port: int, count: int) -> None:
        self._connection.send((port, self._rank, count))

    def receive(self) -> None:
        """Wait for its answer. Raises its error, or PhospheneError where it ended."""
        try:
            answer = unpack(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            code = end_process(self._process)
            raise PhospheneError(
                f"process {self._rank} of the training {end_text(code)}; the same run with the same output "
                "folder resumes, and executor='local' trains in this process"
            ) from error
        if isinstance(answer, Exception):
            raise answer

    def raise_error(self) -> None:
        """Raise the error for which it ended, if it did."""
        if self._connection.poll(1):
            self.receive()

    def kill(self) -> None:
        """Kill the process."""
        self._connection.close()
        end_process(self._process)


def open_store(host: str, port: int, count: int) -> Any:
    """The store through which ``count`` processes meet; with port 0, a new one of this process."""
    return _dist.TCPStore(host, port, count, is_master=port == 0, wait_for_workers=False)


class GlooGroup:
    """A ``ProcessGroup`` by torch's gloo backend; the default group of the process is not used.

    Methods raise ConnectionError where another process ended.
    """

    def __init__(self, store: Any, rank: int, size: int, host: str = HOST) -> None:
        self.rank, self.size = rank, size
        options = _dist.ProcessGroupGloo._Options()
        options._devices = [_dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = _TIMEOUT
        self._group = _dist.ProcessGroupGloo(store, rank, size, options)

    def add(self, values: Tensor) -> Tensor:
        total = values.detach().cpu().contiguous().clone()
        self._wait(lambda: self._group.allreduce([total]))
        return total.to(values.device)

    def first(self, values: Tensor) -> Tensor:
        copy = values.detach().cpu().contiguous().clone()
        self._wait(lambda: self._group.broadcast(copy, 0))
        return copy.to(values.device)

    def _wait(self, start: Callable[[], Any]) -> None:
        try:
            start().wait()
        except RuntimeError as error:
            raise ConnectionError("another process of the training ended") from error
