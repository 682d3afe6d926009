"""Executors: where a prepared run is executed."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import UnknownName
from ..registry.extensions import extensions
from ..results import Result
from .prepared_run import PreparedRun

Executor = Callable[[PreparedRun], Result]


def executors() -> dict[str, Executor]:
    """Every executor by name: "local" and those of plugins."""
    return {"local": PreparedRun.execute_locally, **extensions.gather("phosphene_executors")}


def find_executor(name: str) -> Executor:
    """The executor of this name. Raises UnknownName."""
    if isinstance(name, str) and name == "local":
        return PreparedRun.execute_locally
    available = executors()
    if not isinstance(name, str) or name not in available:
        raise UnknownName("executor", name, available)
    return available[name]


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
