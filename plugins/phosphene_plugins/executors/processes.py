"""``executor="processes"``: the shards of a data set, computed by worker processes of this machine.

torch is imported when a run starts: this module is imported for every run.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from phosphene import InputError, hookimpl

if TYPE_CHECKING:
    from phosphene import PreparedRun, Result

    from ._process_pool import ProcessPool
    from ._ray_training import RayTrainingProcesses
    from ._training_processes import TrainingProcesses


@dataclass(frozen=True)
class Processes:
    """Runs in which worker processes compute the shards of the data set: ``processes`` or ``processes:4``.

    Results are those of ``local``, bit for bit: every worker computes with as many threads as this process
    has (``torch.get_num_threads()``). By default there are as many workers as the cores allow.

    A training is computed by that many processes, this one among them, each of which has a share of every
    batch; its result depends on their number, ``phosphene.training.GradientSteps``.
    """

    workers: int | None = None

    def configure(self, argument: str) -> Processes:
        """The executor with this number of workers. Raises InputError."""
        if argument == "":
            return Processes()
        if not (argument.isascii() and argument.isdigit() and 1 <= int(argument) <= 4096):
            raise InputError(
                f"executor='processes:{argument}' should be the number of worker processes, from 1 to 4096, "
                "such as 'processes:4'"
            )
        return Processes(int(argument))

    def __call__(self, run: PreparedRun) -> Result:
        """Execute a run; what it does not compute over a data set is computed in this process."""
        from phosphene.data import use_shard_executor

        from ._sending import check_sendable, sent_inputs
        from ._training_processes import TrainingProcesses

        if "training" in run.implementation.spec.needs:
            check_sendable(sent_inputs(run), run.executor)
            return execute_training(run, TrainingProcesses(self.workers or default_workers()))
        with self.shard_executor(sent_inputs(run), run.executor) as pool, use_shard_executor(pool):
            result = run.execute_locally()
        if not pool.was_used:
            warn_not_shared(run)
        return result

    @contextmanager
    def shard_executor(self, inputs: Mapping[str, Any], executor: str) -> Iterator[ProcessPool]:
        """The pool that computes shards from these inputs. Raises InputError for one that cannot be sent."""
        from ._process_pool import ProcessPool
        from ._sending import check_sendable

        check_sendable(inputs, executor)
        with ProcessPool(self.workers or default_workers()) as pool:
            yield pool


def execute_training(run: PreparedRun, executor: TrainingProcesses | RayTrainingProcesses) -> Result:
    """Execute a training by several processes; their number is part of the result's provenance."""
    from phosphene.training import use_training_executor

    with use_training_executor(executor):
        result = run.execute_locally()
    if result.provenance is None:
        return result
    provenance = result.provenance.model_copy(update={"processes": executor.largest_group})
    return replace(result, provenance=provenance)


def default_workers() -> int:
    """As many processes as the cores allow with the threads of this one. Warns where that is one."""
    import torch

    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    if cores > 1 and cores // threads < 2:
        warnings.warn(
            f"executor='processes' has one worker on {cores} cores, since each worker computes with "
            f"{threads} threads, as this process does; torch.set_num_threads(1), or OMP_NUM_THREADS=1 in the "
            f"environment, allows {cores} workers",
            stacklevel=3,
        )
    return max(1, cores // threads)


def warn_not_shared(run: PreparedRun) -> None:
    """Warn of a run without work over a data set."""
    warnings.warn(
        f"{run.method} was executed in this process: it has no work over a data set that "
        f"executor={run.executor!r} could distribute. Results of many images are computed on several "
        "processes as a stream: stream=True",
        stacklevel=3,
    )


@hookimpl
def phosphene_executors() -> dict[str, Any]:
    return {"processes": Processes()}
