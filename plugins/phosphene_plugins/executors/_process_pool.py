"""A pool of worker processes that compute the shards of folds."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle
import torch

from phosphene import Dataset, Fold, PhospheneError
from phosphene.data import ComputedShard, FoldTask, State

from ._sending import ATTEMPTS, unpack

#: The number of a fold in its run, and the file with its task.
SentTask = tuple[int, str]

#: Shards that a worker has at once: the one that it computes, and the next.
_IN_FLIGHT = 2


class ProcessPool:
    """A ``ShardExecutor`` of ``count`` processes, which are started by the first fold that is run.

    The model, the data set and the fold are written once, into memory that all workers map; a worker reads
    them once. A worker that dies is replaced, and its shard is computed again.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._workers: list[_Worker] = []
        self._folds = 0

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def was_used(self) -> bool:
        """Whether a fold was run."""
        return self._folds > 0

    def close(self) -> None:
        """Kill all workers, and wait for their end."""
        while self._workers:
            self._workers[-1].kill()
            self._workers.pop()

    def states(
        self, fold: Fold[Any], dataset: Dataset, size: int, shards: Sequence[range], seed: int | None
    ) -> Iterator[State]:
        """The state of every shard, in their order."""
        task = FoldTask.capture(fold, dataset, size, seed)
        self._folds += 1
        with in_memory(task) as path:
            workers = min(self._count, len(shards))
            run = _FoldRun(self._workers, workers, (self._folds, path), shards)
            for computed in run.results():
                yield task.receive(computed)


class _FoldRun:
    """The computation of the shards of one fold by workers."""

    def __init__(self, workers: list[_Worker], count: int, task: SentTask, shards: Sequence[range]) -> None:
        self._workers, self._count, self._task, self._shards = workers, count, task, shards
        self._queue = deque(range(len(shards)))
        self._computed: dict[int, ComputedShard] = {}
        self._deaths: Counter[int] = Counter()

    def results(self) -> Iterator[ComputedShard]:
        """The computed shards, in their order."""
        for number in range(len(self._shards)):
            while number not in self._computed:
                self._send(number)
                self._receive()
            yield self._computed.pop(number)

    def _send(self, first: int) -> None:
        """Send shards to workers. Those far ahead of the first that is missing wait: results need memory."""
        while len(self._workers) < self._count:
            self._workers.append(_Worker())
        ahead = first + 2 * _IN_FLIGHT * self._count
        while self._queue and self._queue[0] < ahead:
            worker = min(self._workers[: self._count], key=lambda worker: len(worker.shards))
            if len(worker.shards) >= _IN_FLIGHT:
                return
            worker.send(self._task, number := self._queue.popleft(), self._shards[number])

    def _receive(self) -> None:
        """Wait for a result or for the death of a worker."""
        ready = wait([worker.connection for worker in self._workers])
        for worker in [worker for worker in self._workers if worker.connection in ready]:
            try:
                answer = unpack(worker.connection.recv_bytes())
            except (EOFError, OSError):
                self._replace(worker)
                continue
            task, number = worker.shards.popleft()
            if task != self._task:  # of an earlier fold, which an error ended
                continue
            if isinstance(answer, Exception):
                raise answer
            self._computed[number] = answer

    def _replace(self, worker: _Worker) -> None:
        """Remove a dead worker; its shards are computed by others."""
        code = worker.kill()
        self._workers.remove(worker)
        own = [number for task, number in worker.shards if task == self._task]
        if own and worker.shards[0][0] == self._task:  # which it was computing
            self._deaths[own[0]] += 1
            if self._deaths[own[0]] >= ATTEMPTS:
                shard = self._shards[own[0]]
                raise PhospheneError(
                    f"the worker process that computed images {shard.start} to {shard.stop - 1} "
                    f"{end_text(code)}, {ATTEMPTS} times; a smaller batch_size needs less memory, and "
                    "executor='local' computes them in this process"
                )
        self._queue.extendleft(reversed(own))


class _Worker:
    """A worker process, and the shards that it was sent with their folds; it computes the first."""

    def __init__(self) -> None:
        self.shards: deque[tuple[SentTask, int]] = deque()
        self._process, self.connection = start_process("_process_worker")

    def send(self, task: SentTask, number: int, shard: range) -> None:
        """Send a shard. That the worker is dead is noticed when its answer is read."""
        self.shards.append((task, number))
        with suppress(OSError):
            self.connection.send((task, shard))

    def kill(self) -> int:
        """Kill the process, and those that it started; its exit code, negative for a signal."""
        self.connection.close()
        return end_process(self._process)


def start_process(module: str) -> tuple[subprocess.Popen[bytes], Connection]:
    """A process that runs ``main`` of a module of this package with its end of the connection."""
    ours, theirs = socket.socketpair()
    with theirs:
        path = [str(entry) for entry in sys.path]
        code = (
            f"import sys; sys.path[:] = {path!r}; "
            f"from phosphene_plugins.executors.{module} import main; main({theirs.fileno()})"
        )
        # A process group of its own: the terminal's Ctrl-C is for this process, which ends the others.
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=2,  # standard output may be a document
            pass_fds=[theirs.fileno()],
            process_group=0,
        )
    return process, Connection(ours.detach())


def end_process(process: subprocess.Popen[bytes]) -> int:
    """Kill a process, and those that it started; its exit code, negative for a signal."""
    code = process.poll()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait() if code is None else code


def end_text(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = ", as it is when memory runs out" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"


@contextmanager
def in_memory(task: Any) -> Iterator[str]:
    """The path of a file in memory with the task; it has no name and ends with this process."""
    descriptor = os.memfd_create("phosphene")
    try:
        with open(descriptor, "wb", closefd=False) as stream:
            torch.save(task, stream, pickle_module=cloudpickle)
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)
