"""The calls of a method in its oracle, recorded once for all checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock
from weakref import WeakKeyDictionary

from ...registry.method import Method

if TYPE_CHECKING:
    from ...results import Result
    from .base import AnyMethod


@dataclass
class OracleCall:
    """One call of the method in its oracle: inputs, parameters and result."""

    inputs: dict[str, Any]
    params: dict[str, Any]
    result: Result


@contextmanager
def answer_calls(
    method: AnyMethod, answer: Callable[[Callable[[], Result], dict[str, Any], dict[str, Any]], Result]
) -> Iterator[None]:
    """Inside this block, calls of the method return ``answer(execute, inputs, params)``."""
    execute = Method.execute

    def answered(called: AnyMethod, inputs: Any, params: Any, digest: str | None = None) -> Result:
        def run() -> Result:
            return execute(called, inputs, params, digest)

        if called.spec.name != method.spec.name:
            return run()
        return answer(run, dict(inputs), dict(params))

    with mock.patch.object(Method, "execute", answered):
        yield


_recordings: WeakKeyDictionary[AnyMethod, list[OracleCall]] = WeakKeyDictionary()


@contextmanager
def record_calls(method: AnyMethod) -> Iterator[None]:
    """Record the calls of the method in this block, in which its oracle runs; not if the block raises."""
    calls: list[OracleCall] = []

    def record(run: Callable[[], Result], inputs: dict[str, Any], params: dict[str, Any]) -> Result:
        calls.append(OracleCall(inputs, params, run()))
        return calls[-1].result

    with answer_calls(method, record):
        yield
    _recordings[method] = calls


def recorded_calls(method: AnyMethod) -> list[OracleCall]:
    """The calls of the method in its oracle, in order; the oracle runs once for all checks.

    Raises what the oracle raises.
    """
    if method not in _recordings:
        assert method.spec.oracle is not None
        with record_calls(method):
            method.spec.oracle()
    return _recordings[method]
