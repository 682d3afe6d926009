"""``executor="ray"``: the shards of a data set, computed by the workers of a Ray cluster.

Ray and torch are imported when a run starts: this module is imported for every run.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from phosphene import InputError, MissingExtra, PhospheneError, hookimpl

from .processes import execute_training, warn_not_shared

if TYPE_CHECKING:
    from phosphene import PreparedRun, Result

    from ._ray_shards import RayShards


@dataclass(frozen=True)
class RayCluster:
    """Runs in which the workers of a Ray cluster compute the shards of the data set.

    ``ray`` uses the connection that this process has, else the cluster that the environment variable
    RAY_ADDRESS names, as in a Ray job; without either it starts Ray on this machine for the run. ``ray:auto``
    is the cluster that this machine belongs to, ``ray:HOST:PORT`` that of an address. Phosphene, and what
    defines the model and the data set, must be installed on the cluster's machines, and data sets of files
    need the same paths there.

    Results are those of ``local``, bit for bit on CPUs of the same type: every task computes with as many
    threads as this process has, and reserves as many CPUs.

    A training is computed by as many processes as the cluster has CPUs for, this one among them, each of
    which has a share of every batch; its result depends on their number,
    ``phosphene.training.GradientSteps``.
    """

    address: str | None = None

    def configure(self, argument: str) -> RayCluster:
        """The executor with the address of a cluster. Raises MissingExtra, InputError."""
        if find_spec("ray") is None:
            raise MissingExtra("executor='ray'", "ray")
        if argument.strip() != argument or "local" in argument.split(":"):
            raise InputError(
                f"executor='ray:{argument}' should be the address of a cluster, such as 'ray:auto' or "
                "'ray:10.0.0.1:6379'; 'ray' alone starts Ray on this machine"
            )
        return RayCluster(argument or None)

    def __call__(self, run: PreparedRun) -> Result:
        """Execute a run; what it does not compute over a data set is computed in this process."""
        from phosphene.data import use_shard_executor

        from ._sending import check_sendable, sent_inputs

        if "training" in run.implementation.spec.needs:
            from ._ray_training import RayTrainingProcesses

            check_sendable(sent_inputs(run), run.executor)
            with _connection(self.address):
                return execute_training(run, RayTrainingProcesses())
        with self.shard_executor(sent_inputs(run), run.executor) as shards, use_shard_executor(shards):
            result = run.execute_locally()
        if not shards.was_used:
            warn_not_shared(run)
        return result

    @contextmanager
    def shard_executor(self, inputs: Mapping[str, Any], executor: str) -> Iterator[RayShards]:
        """The tasks that compute shards from these inputs. Raises InputError for one that cannot be sent."""
        from ._ray_shards import RayShards
        from ._sending import check_sendable

        check_sendable(inputs, executor)
        with _connection(self.address), RayShards() as shards:
            yield shards


@contextmanager
def _connection(address: str | None) -> Iterator[None]:
    """Ray connected inside the block; where it was not, it is disconnected or ended afterwards."""
    import ray

    if ray.is_initialized():
        current = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", current):
            raise InputError(
                f"this process is connected to the Ray cluster {current}, not to {address}: executor='ray' "
                "uses it, and ray.shutdown() ends the connection"
            )
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    usage = os.environ.get("RAY_USAGE_STATS_ENABLED")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        os.environ["RAY_USAGE_STATS_ENABLED"] = usage or "0"  # a run sends nothing anywhere
        ray.init(
            address,
            logging_level=logging.ERROR,
            log_to_driver=False,  # it is written to standard output, which may be a document
            **({"include_dashboard": False} if address == "local" else {}),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        if address == "auto":
            raise PhospheneError(
                "no Ray cluster runs on this machine: start one with `ray start --head`, join one with "
                "`ray start --address=HOST:6379`, or use executor='ray', which starts Ray for this run"
            ) from error
        text = " ".join(str(error).split())
        raise PhospheneError(f"no connection to the Ray cluster {address!r}: {text}") from error
    finally:
        if usage is None:
            del os.environ["RAY_USAGE_STATS_ENABLED"]
        # Ray replaces the handler of the process, by one that ends a run without its result.
        if handler is not None and signal.getsignal(signal.SIGTERM) is not handler:
            signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


@hookimpl
def phosphene_executors() -> dict[str, Any]:
    return {"ray": RayCluster()}
