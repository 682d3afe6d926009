"""``Check``: one promise and the function that tests it; the registry of checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

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
    it makes of one. ``exempt`` returns the reason
    why a method is not checked, or None. ``exemptible``: it is a default expectation, from which an author
    may exempt a method by ``@method(exempt={name: reason})``. A function raises ``unittest.SkipTest`` where
    it cannot decide.
    """

    name: str
    promise: str
    hint: str
    on: On
    function: Callable[..., None]
    exempt: Callable[[AnyMethod], str | None] = lambda method: None
    exemptible: bool = False
    tested: Callable[[Case], Case] = lambda case: case

    def reason_to_skip(self, method: AnyMethod) -> str | None:
        """Why a method is not checked: it does not apply, or its author exempts it. None if it is checked."""
        if (reason := self.exempt(method)) is not None:
            return reason
        reason = method.spec.exempt.get(self.name)
        return None if reason is None else f"exempt: {reason}"


CHECKS: dict[str, Check] = {}

#: What the report of a method says that has neither an oracle nor a relation.
ARITHMETIC_UNTESTED = "its arithmetic is not tested: declare an oracle or relations"


def register_check(
    on: On,
    promise: str,
    hint: str,
    exempt: Callable[[AnyMethod], str | None] = lambda method: None,
    exemptible: bool = False,
    tested: Callable[[Case], Case] = lambda case: case,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the check of its name."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__
        CHECKS[name] = Check(name, promise, hint, on, function, exempt, exemptible, tested)
        return function

    return register


def result_of(method: AnyMethod, case: Case, model: Model | None = None, **changed: Any) -> Any:
    """A case's result; None where the method refuses the case."""
    try:
        return case.run(method, model, **changed)
    except PhospheneError:
        return None
