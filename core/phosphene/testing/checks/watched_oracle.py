"""The check of the oracle's first run, which is watched like any call."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..side_effects import is_first_use, record_side_effects
from .base import register_check
from .oracle_calls import record_calls

if TYPE_CHECKING:
    from .base import AnyMethod


@register_check(
    "method",
    "The oracle has no side effects: no file, setting, random state, output or patched function.",
    "what the oracle, or the method inside it, changes and does not restore",
    lambda method: None if method.spec.oracle else "it has no oracle",
)
def oracle_has_no_side_effects(method: AnyMethod) -> None:
    oracle = method.spec.oracle
    assert oracle is not None
    side_effects: list[str] = []
    imported = set(sys.modules)
    for _ in range(2):
        side_effects.clear()
        try:
            with record_calls(method), record_side_effects(side_effects):
                oracle()
        except AssertionError:
            return  # the check "oracle" reports it
        if not is_first_use(side_effects, imported):
            break
    # An oracle may seed the generators that it draws its own inputs from.
    side_effects = [effect for effect in side_effects if not effect.endswith("random state changed")]
    assert not side_effects, "; ".join(side_effects)
