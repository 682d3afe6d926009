"""Every registered method passes the conformance kit.

The profile is "quick", or that of the environment variable ``PHOSPHENE_PROFILE``: ``make test-nightly`` runs
"ci".
"""

from __future__ import annotations

import os

import pytest

from phosphene import methods
from phosphene.testing import check_method

PROFILE = os.environ.get("PHOSPHENE_PROFILE", "quick")


# One test for all checks of a method, as thousands of short tests take longer than what they run.
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in sorted(methods)])
def test_conformance(name: str) -> None:
    report = check_method(name, profile=PROFILE)
    assert report.ok, "\n\n".join(map(str, report.failures))


#: Scores and the first two have no cost of their own: it depends on the methods that they run. The last two
#: run a model of answers, whose passes depend on the length of the answer.
WITHOUT_COST = (
    "robustness.robust_accuracy",
    "comparison.model_difference",
    "vision_language.answer_attribution",
    "vision_language.question_attack",
)


def test_first_party_methods_declare_references_cost_and_oracle() -> None:
    specs = {name: methods[name].spec for name in methods}
    assert not [name for name, spec in specs.items() if not spec.references or spec.oracle is None]
    without_cost = {name for name, spec in specs.items() if spec.family == "scores"} | {*WITHOUT_COST}
    assert {name for name, spec in specs.items() if spec.cost is None} == without_cost
