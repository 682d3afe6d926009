"""Every registered method keeps every promise: the kit's ci profile over all of them."""

from __future__ import annotations

import pytest

from phosphene import methods
from phosphene.testing import BoundCheck, parametrize_with_checks


@parametrize_with_checks(sorted(methods))
def test_conformance(check: BoundCheck) -> None:
    check()


@pytest.mark.parametrize("name", sorted(methods))
def test_a_first_party_method_names_its_sources_cost_and_oracle(name: str) -> None:
    spec = methods[name].spec
    assert spec.references
    # What a score costs is what the method costs that it is told to score; a budget bounds it. So it is with
    # an evaluation that is told its attacks.
    assert (spec.cost is None) == (spec.family == "scores" or name == "robustness.robust_accuracy")
    assert spec.oracle is not None
