"""Every registered method passes the conformance kit.

The profile is "quick", or that of the environment variable ``PHOSPHENE_PROFILE``: ``make test-nightly`` runs
"ci".
"""

from __future__ import annotations

import os

import pytest

from phosphene import methods
from phosphene.testing import BoundCheck, parametrize_with_checks

PROFILE = os.environ.get("PHOSPHENE_PROFILE", "quick")


@parametrize_with_checks(sorted(methods), profile=PROFILE, only_declared=True)
def test_conformance(check: BoundCheck) -> None:
    check()


#: Scores and the first two have no cost of their own: it depends on the methods that they run. The last two
#: run a model of answers, whose passes depend on the length of the answer.
WITHOUT_COST = (
    "robustness.robust_accuracy",
    "comparison.model_difference",
    "vision_language.answer_attribution",
    "vision_language.question_attack",
)


@pytest.mark.parametrize("name", sorted(methods))
def test_first_party_method_declares_references_cost_and_oracle(name: str) -> None:
    spec = methods[name].spec
    assert spec.references
    assert (spec.cost is None) == (spec.family == "scores" or name in WITHOUT_COST)
    assert spec.oracle is not None
