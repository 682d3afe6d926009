"""``Check``: one promise and the function that tests it; the registry of checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

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
    why a method is not checked, or None.
    """

    name: str
    promise: str
    hint: str
    on: On
    function: Callable[..., None]
    exempt: Callable[[AnyMethod], str | None] = lambda method: None


CHECKS: dict[str, Check] = {}


def register_check(
    on: On,
    promise: str,
    hint: str,
    exempt: Callable[[AnyMethod], str | None] = lambda method: None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the check of its name."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        CHECKS[function.__name__] = Check(function.__name__, promise, hint, on, function, exempt)
        return function

    return register


def checks_of(method: AnyMethod) -> list[Check]:
    """The checks of a method: those of every method, and one for each invariant that it declares."""
    return [*CHECKS.values(), *(_invariant_check(i) for i in method.spec.invariants)]


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
