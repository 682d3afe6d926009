"""Executors: where a prepared run is executed."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import InputError, UnknownName
from ..registry.extensions import extensions
from ..results import Result
from .prepared_run import PreparedRun

Executor = Callable[[PreparedRun], Result]


def executors() -> dict[str, Executor]:
    """Every executor by name: "local" and those of plugins."""
    return {"local": PreparedRun.execute_locally, **extensions.gather("phosphene_executors")}


def find_executor(name: str) -> Executor:
    """The executor of this name; in "processes:4", "4" is the argument of the executor "processes".

    An executor with an argument, or with requirements, has a method ``configure(argument: str)``, which
    returns the configured executor or raises an error before anything runs; without an argument it is "".
    One that computes the batches of a stream elsewhere has a method ``shard_executor(inputs, executor)``, a
    context manager that yields a ``ShardExecutor``; ``executor`` is the name as it was passed. An executor
    without it executes each batch as a run. Raises UnknownName, and InputError for an argument that is not
    taken.
    """
    if isinstance(name, str) and name == "local":
        return PreparedRun.execute_locally
    available = executors()
    base, argument = name, ""
    if isinstance(name, str) and name not in available:
        base, _, argument = name.partition(":")
    if not isinstance(name, str) or base not in available or (argument == "" and name != base):
        raise UnknownName("executor", name, available)
    executor = available[base]
    configure = getattr(executor, "configure", None)
    if configure is not None:
        executor = configure(argument)
    elif argument:
        raise InputError(f"the executor {base!r} takes no argument, so it is {base!r}, not {name!r}")
    return executor


def execute(prepared: PreparedRun) -> Result:
    """Execute a prepared run with its executor; what was checked is not checked again.

    Observers are notified of the start and of the end, with the result or the error.
    """
    executor = find_executor(prepared.executor)
    extensions.notify("phosphene_before_run", run=prepared)
    try:
        result = executor(prepared)
    except BaseException as error:
        extensions.notify("phosphene_after_run", run=prepared, result=None, error=error)
        raise
    extensions.notify("phosphene_after_run", run=prepared, result=result, error=None)
    return result
