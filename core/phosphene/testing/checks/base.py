"""``Check``: one promise and the function that tests it; the registry of checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ...errors import PluginError, UnknownName
from ...spec.invariants import Invariant
from ..observation import Observation

if TYPE_CHECKING:
    from ...registry.method import Method

    AnyMethod = Method[..., Any]

#: What a check's function is called with; see ``Check``.
On = Literal["method", "run", "observation", "case"]


@dataclass(frozen=True)
class Check:
    """One promise and the function that tests it, which raises AssertionError where it is not met.

    ``hint``: the likely cause of a failure. ``on``: what ``function`` is called with, beside the method:
    "method": nothing, once; "run": the observation of each case; "observation": the observation of each
    case that has a result; "case": some cases, which the function runs itself. ``exempt`` returns the reason
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
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the check of its name."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        CHECKS[function.__name__] = Check(function.__name__, promise, hint, on, function, exempt, exemptible)
        return function

    return register


def checks_of(method: AnyMethod) -> list[Check]:
    """The checks of a method: those of every method, and one for each invariant and relation it declares.

    Raises UnknownName where the method is exempt from a check that does not exist, PluginError where from one
    that every method has to pass.
    """
    from .relations import relation_check

    exemptible = [check.name for check in CHECKS.values() if check.exemptible]
    for name in method.spec.exempt:
        if name in CHECKS and name not in exemptible:
            raise PluginError(
                f"{method.spec.name} is exempt from {name!r}, which every method has to pass; "
                f"a method can be exempt from {', '.join(exemptible)}"
            )
        if name not in exemptible:
            raise UnknownName("check (used in exempt)", name, exemptible, f"method '{method.spec.name}'")
    declared = [*map(_invariant_check, method.spec.invariants), *map(relation_check, method.spec.relations)]
    return [*CHECKS.values(), *declared]


def _invariant_check(invariant: Invariant) -> Check:
    declared = invariant.model_dump(exclude={"kind", "when"}, exclude_none=True)
    arguments = ", ".join(f"{name}={value!r}" for name, value in declared.items())
    if invariant.when is not None:
        arguments = ", ".join(filter(None, [arguments, f"when={invariant.when}"]))

    def check_invariant(method: AnyMethod, run: Observation) -> None:
        params = method.validate(run.result.provenance.params)
        if invariant.applies(params):
            before = {n: t for n, t in run.tensors_before.items() if isinstance(run.inputs[n], Tensor)}
            invariant.check(run.inputs | before, params, run.result)

    return Check(
        name=f"{invariant.kind}({arguments})",
        promise=(type(invariant).__doc__ or invariant.kind).strip().partition("\n")[0],
        hint=f"the spec declares {type(invariant).__name__}({arguments}): meet it, or change the declaration",
        on="observation",
        function=check_invariant,
    )
