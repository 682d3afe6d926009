"""The conformance kit's runner: every check of a method on many cases, and the smallest failing case."""

from __future__ import annotations

import functools
import itertools
import json
import textwrap
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from unittest import SkipTest

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis.errors import Flaky
from pydantic import BaseModel

from ..errors import UnknownName
from ..graceful_stop import Terminated
from ..registry.lookup import methods
from .cases import Case, drawn_cases, fixed_cases
from .checks import ARITHMETIC_UNTESTED, ORACLE_MISSING, Check, UntestedError, checks_of
from .observation import Observation, Observations, observe
from .reproduction import case_code, crash_of, location, method_import

if TYPE_CHECKING:
    from ..registry.method import Method

    AnyMethod = Method[..., Any]

Verdict = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Profile:
    """How many cases to run.

    ``drawn``: cases from hypothesis; ``several``: cases for checks that run a method more than once;
    ``seconds``: no case is drawn after this time; ``all_pairs``: every network with every kind of image;
    ``fixed``: how many of the fixed cases, all by default.
    """

    drawn: int
    several: int
    seconds: float = 60
    all_pairs: bool = False
    fixed: int | None = None


PROFILES = {
    "quick": Profile(drawn=3, several=1, fixed=8),
    "ci": Profile(drawn=12, several=2),
    "thorough": Profile(drawn=100, several=20, seconds=600, all_pairs=True),
}


#: Checks that start a process or train for long: not in the profile "quick", unless they are named.
SLOW_CHECKS = frozenset({"arithmetic_is_tested", "same_in_another_process"})


class Outcome(BaseModel):
    """The outcome of one check: how many cases it ran, how many the method refused, and the failure."""

    check: str
    promise: str
    verdict: Verdict
    cases: int = 0
    refused: int = 0
    #: Why it was skipped, or the failure.
    reason: str = ""
    #: Python code that reproduces the failure on the smallest failing case.
    example: str = ""
    #: The likely cause in the method.
    hint: str = ""
    #: What a check that is skipped could not test, where the author should know.
    warning: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.verdict != "failed":
            count = f"{self.cases} cases, {self.refused} refused" if self.cases > 1 else "once"
            return f"{self.verdict:8}{self.check}: {self.reason or count}"
        parts = [f"FAILED  {self.check}: {self.promise}", textwrap.indent(self.reason, "  ")]
        if self.example:
            parts += ["  smallest failing case:", textwrap.indent(self.example, "    ")]
        return "\n".join([*parts, f"  where to look: {self.hint}"])


class Report(BaseModel):
    """The outcomes of all checks of a method."""

    method: str
    distribution: str
    profile: str
    outcomes: list[Outcome]
    #: Whether the method has an oracle or declares a relation.
    arithmetic_tested: bool = True
    has_oracle: bool = True

    @property
    def failures(self) -> list[Outcome]:
        """Outcomes of the checks that failed."""
        return [o for o in self.outcomes if o.verdict == "failed"]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def warnings(self) -> list[str]:
        """What the checks could not test."""
        if not self.arithmetic_tested:
            return [ARITHMETIC_UNTESTED]
        warnings = [outcome.warning for outcome in self.outcomes if outcome.warning]
        # Without an oracle relations are enough where they notice every change of the method.
        passed = {outcome.check for outcome in self.outcomes if outcome.verdict == "passed"}
        if not warnings and not self.has_oracle and "arithmetic_is_tested" not in passed:
            return [f"{ORACLE_MISSING}; --profile ci names the lines that the relations do not test"]
        return warnings

    def __str__(self) -> str:
        counts = {v: sum(o.verdict == v for o in self.outcomes) for v in ("passed", "failed", "skipped")}
        summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        title = f"{self.method} ({self.distribution}), {self.profile}: {summary}"
        warnings = [f"WARNING {warning}" for warning in self.warnings]
        return "\n".join([title, *warnings, *map(str, self.outcomes)])


def check_method(
    method: str | AnyMethod,
    *,
    profile: str = "ci",
    only: Sequence[str] = (),
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> Report:
    """Run every check of a method, from its spec alone.

    ``profile``: "quick" (seconds), "ci" or "thorough" (every network with every kind of image, a hundred
    drawn cases). ``only``: names of checks. ``on_outcome`` is called with every outcome as it is ready.

    Raises UnknownName for a method, profile or check that does not exist; a failed check is an outcome.
    """
    examination = Examination(method, profile)
    tested = examination.method
    checks = {check.name: check for check in checks_of(tested)}
    for name in only:
        if name not in checks:
            raise UnknownName("check", name, checks, tested.spec.name)
    outcomes = []
    for check in checks.values():
        if check.name in only or (not only and _is_run(check, profile)):
            outcomes.append(examination.outcome(check))
            on_outcome(outcomes[-1])
    return Report(
        method=tested.spec.name,
        distribution=tested.distribution,
        profile=profile,
        outcomes=outcomes,
        arithmetic_tested=tested.spec.oracle is not None or bool(tested.spec.relations),
        has_oracle=tested.spec.oracle is not None,
    )


def check(method: AnyMethod, name: str, case: Case | None = None) -> None:
    """Run one check of a method on one case. Raises AssertionError where it fails."""
    checks = {check.name: check for check in checks_of(method)}
    if name not in checks:
        raise UnknownName("check", name, checks, method.spec.name)
    run_check(checks[name], method, case or Case(), {})


def run_check(check: Check, method: AnyMethod, case: Case, observations: dict[Case, Observation]) -> bool:
    """Whether the method accepted the case. Raises AssertionError where the check fails or crashes."""
    try:
        if check.on == "method":
            check.function(method)
            return True
        if check.on == "case":
            check.function(method, case)
            return case not in observations or observations[case].refusal is None
        if case not in observations:
            observations[case] = observe(method, case)
        # A refused or failed run has no result, but what it leaves behind is checked as well.
        if observations[case].result is not None or check.on == "run":
            check.function(method, observations[case])
        return observations[case].result is not None
    except (AssertionError, SkipTest):
        raise
    except Exception as crash:
        raise AssertionError(f"it raised {type(crash).__name__}: {crash}") from crash


@dataclass
class Examination:
    """A method under test. The observation of a case's run is shared by all checks."""

    name_or_method: str | AnyMethod
    profile: str = "ci"
    observations: Observations = field(default_factory=Observations, repr=False)
    #: The cases that hypothesis draws, by their number: the same ones for every check.
    drawn: dict[int, list[Case]] = field(default_factory=dict, repr=False)
    #: The cases that passed the checks which run them, by check, and whether the method accepted them.
    passed: dict[tuple[str, Case], bool] = field(default_factory=dict, repr=False)
    #: The outcomes of checks that others require, by name.
    _required: dict[str, Outcome] = field(default_factory=dict, init=False, repr=False)
    #: The error that the method raises in the check "answers": its type, and the line of the method's file.
    _crash: tuple[str, str] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise UnknownName("profile", self.profile, PROFILES)
        self.method: AnyMethod = (
            methods[self.name_or_method] if isinstance(self.name_or_method, str) else self.name_or_method
        )

    def outcome(self, check: Check) -> Outcome:
        """Run one check on all cases of the profile."""
        return self._required.get(check.name) or self._run(check)

    def _run(self, check: Check) -> Outcome:
        outcome = Outcome(check=check.name, promise=check.promise, hint=check.hint, verdict="passed")
        reason = check.reason_to_skip(self.method) or self._unmet_requirement(check)
        if reason is not None:
            return outcome.model_copy(update={"verdict": "skipped", "reason": reason})
        clock = time.perf_counter()
        try:
            failure = self._first_failure(check, outcome)
        except SkipTest as undecided:
            warning = undecided.warning if isinstance(undecided, UntestedError) else ""
            seconds = round(time.perf_counter() - clock, 3)
            skipped = {"verdict": "skipped", "reason": str(undecided), "warning": warning, "seconds": seconds}
            return outcome.model_copy(update=skipped)
        if failure is None and outcome.refused == outcome.cases > 0:
            reason = f"it refused all of {outcome.cases} cases: {self._refusals()}"
            if check.name != "answers":
                return outcome.model_copy(update={"verdict": "skipped", "reason": reason})
            failure = None, AssertionError(reason)
        if failure is not None:
            case, error = failure
            crash = crash_of(self.method, error)
            if crash is not None and crash == self._crash and check.name != "answers":
                reason = 'it raises the error of the check "answers"'
                return outcome.model_copy(update={"verdict": "skipped", "reason": reason})
            if case is not None:
                case, error = self._smallest(check, case, error)
            if check.name == "answers":
                self._crash = crash_of(self.method, error)
            outcome.verdict = "failed"
            outcome.reason = str(error) or repr(error)
            outcome.example = _example(self.method, check, case)
            function = self.method.spec.oracle if check.name.startswith("oracle") else None
            outcome.hint = f"{check.hint}\n  {location(function or self.method, error)}"
        outcome.seconds = round(time.perf_counter() - clock, 3)
        return outcome

    def _unmet_requirement(self, check: Check) -> str | None:
        """Why a check says nothing: another one fails, whose failure would show in it."""
        for kind, reason in check.requires.items():
            for other in checks_of(self.method):
                if other.name.partition("(")[0] != kind:
                    continue
                if other.name not in self._required:
                    self._required[other.name] = self._run(other)
                if self._required[other.name].verdict == "failed":
                    return f"{reason} ({other.name})"
        return None

    def _first_failure(self, check: Check, outcome: Outcome) -> tuple[Case | None, AssertionError] | None:
        profile = PROFILES[self.profile]
        if check.on == "method":
            outcome.cases = 1
            error = self._error(check, Case(), outcome)
            return None if error is None else (None, error)
        every = self._fixed_cases
        cases = every if profile.fixed is None else every[:: max(1, len(every) // profile.fixed)]
        # A method may accept few networks: at least one accepted case is needed.
        if not any(map(self._accepted, cases)):
            cases = [*cases, *itertools.islice(filter(self._accepted, every), 1)]
        if check.on == "case":
            cases = list(filter(self._accepted, cases)) or cases
            cases = cases[:: max(1, -(-len(cases) // profile.several))]
        for case in cases:
            error = self._error(check, case, outcome)
            if error is not None:
                return case, error
        return self._drawn(check, outcome, profile.several if check.on == "case" else profile.drawn)

    @functools.cached_property
    def _fixed_cases(self) -> list[Case]:
        return fixed_cases(self.method, all_pairs=PROFILES[self.profile].all_pairs)

    def _accepted(self, case: Case) -> bool:
        """Whether the method does not refuse a case."""
        if case not in self.observations:
            try:
                self.observations[case] = observe(self.method, case)
            except Exception:  # reported by the check that runs the case
                return True
        return self.observations[case].refusal is None

    def _error(self, check: Check, case: Case, outcome: Outcome | None = None) -> AssertionError | None:
        # Of several cases a check may make the same one.
        tested = check.name, check.tested(case)
        try:
            if check.on != "case":
                accepted = run_check(check, self.method, case, self.observations)
            else:
                if tested not in self.passed:
                    self.passed[tested] = run_check(check, self.method, case, self.observations)
                accepted = self.passed[tested]
        except AssertionError as error:
            return error
        finally:
            if outcome is not None and check.on != "method":
                outcome.cases += 1
        if outcome is not None and not accepted:
            outcome.refused += 1
        return None

    def _drawn(self, check: Check, outcome: Outcome, count: int) -> tuple[Case, AssertionError] | None:
        """Run cases drawn by hypothesis, the same ones for every check; a failing one is shrunk."""
        failing: list[tuple[Case, AssertionError]] = []
        drawn: list[Case] = []
        end = time.perf_counter() + PROFILES[self.profile].seconds
        first: tuple[Case, AssertionError] | None = None
        if count in self.drawn:
            counts = outcome.cases, outcome.refused
            for case in self.drawn[count]:
                if time.perf_counter() > end:
                    return None
                if (error := self._error(check, case, outcome)) is not None:
                    first = case, error
                    break
            else:
                return None
            outcome.cases, outcome.refused = counts  # drawn again below, to be shrunk

        @settings(
            max_examples=count,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
            report_multiple_bugs=False,
        )
        @given(case=drawn_cases(self.method))
        def run_case(case: Case) -> None:
            if time.perf_counter() > end:
                return
            drawn.append(case)
            try:
                error = self._error(check, case, None if failing else outcome)
            except Terminated:  # a SystemExit, which Hypothesis would take for a failure of the case
                raise KeyboardInterrupt from None
            if error is not None:
                failing.append((case, error))
                raise error

        try:
            run_case()
        except (AssertionError, Flaky):
            if not failing:
                raise
            return failing[-1]
        if first is None and time.perf_counter() <= end:
            self.drawn[count] = drawn
        return first  # an intermittent failure is one, too

    def _smallest(self, check: Check, case: Case, error: AssertionError) -> tuple[Case, AssertionError]:
        """The simplest case that still fails: each property is set to its default where possible."""
        simpler = True
        while simpler:
            simpler = False
            for candidate in case.simpler():
                candidate_error = self._error(check, candidate)
                if candidate_error is not None:
                    case, error, simpler = candidate, candidate_error, True
                    break
        return case, error

    def _refusals(self) -> str:
        messages = dict.fromkeys(str(o.refusal) for o in self.observations.values() if o.refusal)
        return "; ".join(list(messages)[:3])


def _example(method: AnyMethod, check: Check, case: Case | None) -> str:
    name, origin = json.dumps(check.name, ensure_ascii=False), method_import(method)
    if case is None and check.on == "method":
        return f"from phosphene.testing import check\n{origin}\n\ncheck(method, {name})"
    if case is None:  # a failure of all cases together
        call = f"assert check_method(method, only=[{name}]).ok"
        return f"from phosphene.testing import check_method\n{origin}\n\n{call}"
    return (
        f"from phosphene.testing import Case, check\n{origin}\n\n{case_code(method, case)}\n"
        f"check(method, {name}, case)\n# the call alone: case.run(method)"
    )


def parametrize_with_checks(
    names: Sequence[str | AnyMethod], *, profile: str = "ci", only_declared: bool = False
) -> Callable[..., Any]:
    """A pytest decorator: the test function is called with every ``check`` of every method.

    ``only_declared`` leaves out the checks that skip a method because of what it declares; in a project of
    many methods they are most of the tests, and none of the time.

    ::

        @parametrize_with_checks(["my_method"])
        def test_conformance(check): check()
    """
    import pytest

    bound = [b for name in names for b in bound_checks(name, profile)]
    if only_declared:
        bound = [b for b in bound if b.check.reason_to_skip(b.examination.method) is None]
    return pytest.mark.parametrize("check", [pytest.param(b, id=b.id, marks=b.marks()) for b in bound])


@dataclass(frozen=True)
class BoundCheck:
    """A check of one method as a callable without arguments."""

    examination: Examination
    check: Check

    @property
    def id(self) -> str:
        """``method-check``, the test id."""
        return f"{self.examination.method.spec.name}-{self.check.name}"

    def marks(self) -> list[Any]:
        """Pytest marks: checks of one method share runs, so they run in one process."""
        import pytest

        return [pytest.mark.xdist_group(self.examination.method.spec.name)]

    def __call__(self) -> None:
        outcome = self.examination.outcome(self.check)
        if outcome.warning:
            warnings.warn(f"{self.examination.method.spec.name}: {outcome.warning}", stacklevel=2)
        if outcome.verdict == "skipped":
            raise SkipTest(outcome.reason)
        if outcome.verdict == "failed":
            raise AssertionError(str(outcome))


def bound_checks(method: str | AnyMethod, profile: str = "ci") -> list[BoundCheck]:
    """All checks of a method, which share their observations."""
    examination = Examination(method, profile)
    checks = (check for check in checks_of(examination.method) if _is_run(check, profile))
    return [BoundCheck(examination, check) for check in checks]


def _is_run(check: Check, profile: str) -> bool:
    return profile != "quick" or check.name not in SLOW_CHECKS
