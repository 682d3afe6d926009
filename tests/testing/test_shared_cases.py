"""What several checks of an examination share: drawn cases, and a case that a check makes of several."""

from dataclasses import replace

from right_methods import RIGHT

from phosphene.testing import Case
from phosphene.testing.checks import CHECKS
from phosphene.testing.kit import Examination

PLAIN_GRADIENT = next(m for m in RIGHT if m.spec.short_name == "plain_gradient")


def test_case_that_a_check_makes_of_several_runs_once() -> None:
    cases: list[Case] = []
    check = replace(CHECKS["batch_equals_single"], function=lambda method, case: cases.append(case))
    outcome = Examination(PLAIN_GRADIENT, "quick").outcome(check)
    assert outcome.verdict == "passed" and outcome.cases > 1
    assert len(cases) == 1


def test_drawn_cases_are_those_of_hypothesis_and_fail_as_they_do() -> None:
    def cases_of(examination: Examination) -> list[Case]:
        cases: list[Case] = []
        check = replace(CHECKS["same_seed_same_bits"], function=lambda method, case: cases.append(case))
        assert examination.outcome(check).verdict == "passed"
        return cases

    shared = Examination(PLAIN_GRADIENT, "ci")
    own, first = cases_of(Examination(PLAIN_GRADIENT, "ci")), cases_of(shared)
    shared.passed.clear()
    assert own == first == cases_of(shared)

    def fail(method: object, case: Case) -> None:
        assert case != own[-1]

    shared.passed.clear()
    outcome = shared.outcome(replace(CHECKS["same_seed_same_bits"], function=fail))
    assert outcome.verdict == "failed" and repr(own[-1]) in outcome.example
