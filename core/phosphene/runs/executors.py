"""Executors: where a prepared run is carried out."""

from __future__ import annotations

from collections.abc import Callable

from ..registry.lookup import extensions
from ..results import Result
from .prepared_run import PreparedRun


def executors() -> dict[str, Callable[[PreparedRun], Result]]:
    """Where runs can be carried out, by name."""
    return {"local": PreparedRun.execute_locally, **extensions.gather("phosphene_executors")}


def run_with_observers(request: PreparedRun, execute: Callable[[PreparedRun], Result]) -> Result:
    """Carry out a run and tell every observer of its start and its end."""
    extensions.notify("phosphene_before_run", run=request)
    try:
        result = execute(request)
    except BaseException as error:
        extensions.notify("phosphene_after_run", run=request, result=None, error=error)
        raise
    extensions.notify("phosphene_after_run", run=request, result=result, error=None)
    return result
