"""``Check``: one promise and the function that tests it; the registry of checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from unittest import SkipTest

from ...errors import PhospheneError
from ..cases import Case

if TYPE_CHECKING:
    from ...models import Model
    from ...registry.method import Method

    AnyMethod = Method[..., Any]

#: What a check's function is called with; see ``Check``.
On = Literal["method", "run", "observation", "case"]


@dataclass(frozen=True)
class Check:
    """One promise and the function that tests it, which raises AssertionError where it is not met.

    ``hint``: the likely cause of a failure. ``on``: what ``function`` is called with, beside the method:
    "method": nothing, once; "run": the observation of each case; "observation": the observation of each
    case that has a result; "case": some cases, which the function runs itself, ``tested`` being the case that
    it makes of one. ``exempt`` returns the reason why a method is not checked, or None. ``exemptible``: it is
    a default expectation, from which an author may exempt a method by ``@method(exempt={name: reason})``.
    ``requires``: names of checks, and kinds of invariants, without which this one says nothing, each with the
    reason for which it is skipped where they fail. A function raises ``unittest.SkipTest`` where it cannot
    decide.
    """

    name: str
    promise: str
    hint: str
    on: On
    function: Callable[..., None]
    exempt: Callable[[AnyMethod], str | None] = lambda method: None
    exemptible: bool = False
    tested: Callable[[Case], Case] = lambda case: case
    requires: Mapping[str, str] = field(default_factory=dict)

    def reason_to_skip(self, method: AnyMethod) -> str | None:
        """Why a method is not checked: it does not apply, or its author exempts it. None if it is checked."""
        if (reason := self.exempt(method)) is not None:
            return reason
        reason = method.spec.exempt.get(self.name)
        return None if reason is None else f"exempt: {reason}"


CHECKS: dict[str, Check] = {}

#: What the report of a method says that has neither an oracle nor a relation.
ARITHMETIC_UNTESTED = "its arithmetic is not tested: declare an oracle or relations"
#: What the report of a method says that has relations and no oracle.
ORACLE_MISSING = (
    "it has no oracle, and relations seldom determine a formula: a wrong one can pass. Declare an oracle"
)

#: The requirements of checks that examine an oracle, and of checks of where the values of a map are.
ORACLE_PASSES = {"oracle": "the oracle fails on the unchanged method"}
MAP_PER_PIXEL = {"map_per_pixel": "the maps have no value for each pixel"}


class UntestedError(SkipTest):
    """Raised by a check that cannot decide, where its author should be warned of what is not tested."""

    def __init__(self, reason: str, warning: str) -> None:
        super().__init__(reason)
        self.warning = warning


def register_check(
    on: On,
    promise: str,
    hint: str,
    exempt: Callable[[AnyMethod], str | None] = lambda method: None,
    exemptible: bool = False,
    tested: Callable[[Case], Case] = lambda case: case,
    requires: Mapping[str, str] = {},
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the check of its name."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__
        CHECKS[name] = Check(name, promise, hint, on, function, exempt, exemptible, tested, requires)
        return function

    return register


def result_of(method: AnyMethod, case: Case, model: Model | None = None, **changed: Any) -> Any:
    """A case's result; None where the method refuses the case."""
    try:
        return case.run(method, model, **changed)
    except PhospheneError:
        return None
