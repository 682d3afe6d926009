"""The checks of one method: those of every method, and those of the invariants and relations it declares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ...errors import PluginError, UnknownName
from ...spec.invariants import Invariant
from ..observation import Observation
from .base import CHECKS, Check
from .choices import choice_checks
from .relations import relation_check

if TYPE_CHECKING:
    from .base import AnyMethod


def checks_of(method: AnyMethod) -> list[Check]:
    """The checks of a method: those of every method, and one for each parameter with named choices, invariant
    and relation.

    Raises UnknownName where the method is exempt from a check that does not exist, PluginError where from one
    that every method has to pass.
    """
    general = [*CHECKS.values(), *choice_checks(method)]
    exemptible = [check.name for check in general if check.exemptible]
    for name in method.spec.exempt:
        if name in CHECKS and name not in exemptible:
            raise PluginError(
                f"{method.spec.name} is exempt from {name!r}, which every method has to pass; "
                f"a method can be exempt from {', '.join(exemptible)}"
            )
        if name not in exemptible:
            raise UnknownName("check (used in exempt)", name, exemptible, f"method '{method.spec.name}'")
    declared = [*map(_invariant_check, method.spec.invariants), *map(relation_check, method.spec.relations)]
    return [*general, *declared]


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
