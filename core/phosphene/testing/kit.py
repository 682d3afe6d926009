"""Running the checks: every promise of a method on many cases, and the smallest case that breaks one."""

from __future__ import annotations

import inspect
import itertools
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from unittest import SkipTest

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis.errors import Flaky
from pydantic import BaseModel

from ..errors import UnknownName
from ..registry.lookup import methods
from .cases import Case, drawn_cases, plain_cases
from .checks import Check, checks_of
from .observation import Observation, observe

if TYPE_CHECKING:
    from ..registry.method import Method

    AnyMethod = Method[..., Any]

Verdict = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Profile:
    """How thorough to be: cases drawn, cases for checks of several runs, every network with every picture."""

    drawn: int
    several: int
    #: No new cases are drawn after so many seconds.
    seconds: float = 60
    all_pairs: bool = False
    plain: int | None = None


PROFILES = {
    "quick": Profile(drawn=3, several=1, plain=8),
    "ci": Profile(drawn=12, several=2),
    "thorough": Profile(drawn=100, several=20, seconds=600, all_pairs=True),
}


class Outcome(BaseModel):
    """What one check found: on how many cases, how many the method refused, and what broke the promise."""

    check: str
    promise: str
    verdict: Verdict
    cases: int = 0
    refused: int = 0
    #: Why it was skipped, or what was wrong.
    reason: str = ""
    #: Python code that shows the failure on the smallest case found.
    example: str = ""
    #: Where to look.
    look: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.verdict != "failed":
            tried = f"{self.cases} cases, {self.refused} refused" if self.cases > 1 else "once"
            return f"{self.verdict:8}{self.check}: {self.reason or tried}"
        parts = [f"FAILED  {self.check}: {self.promise}", textwrap.indent(self.reason, "  ")]
        if self.example:
            parts += ["  the smallest case that shows it:", textwrap.indent(self.example, "    ")]
        return "\n".join([*parts, f"  where to look: {self.look}"])


class Report(BaseModel):
    """What the kit found out about a method."""

    method: str
    distribution: str
    profile: str
    outcomes: list[Outcome]

    @property
    def failures(self) -> list[Outcome]:
        """The promises that were broken."""
        return [o for o in self.outcomes if o.verdict == "failed"]

    @property
    def ok(self) -> bool:
        """Whether every promise held."""
        return not self.failures

    def __str__(self) -> str:
        counts = {v: sum(o.verdict == v for o in self.outcomes) for v in ("passed", "failed", "skipped")}
        told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        return "\n".join(
            [f"{self.method} ({self.distribution}), {self.profile}: {told}", *map(str, self.outcomes)]
        )


def check_method(
    method: str | AnyMethod,
    *,
    profile: str = "ci",
    only: Sequence[str] = (),
    tell: Callable[[Outcome], None] = lambda outcome: None,
) -> Report:
    """Test everything a method promises, from its spec alone.

    ``profile``: "quick" (seconds), "ci" or "thorough" (every network with every kind of picture, a
    hundred drawn cases). ``only``: names of checks. ``tell`` hears every outcome as it comes. Raises
    UnknownName for a method, profile or check that does not exist; a broken promise is an outcome.
    """
    examination = Examination(method, profile)
    found = examination.method
    known = {check.name: check for check in checks_of(found)}
    for name in only:
        if name not in known:
            raise UnknownName("check", name, known, found.spec.name)
    outcomes = []
    for check in known.values():
        if not only or check.name in only:
            outcomes.append(examination.outcome(check))
            tell(outcomes[-1])
    return Report(method=found.spec.name, distribution=found.distribution, profile=profile, outcomes=outcomes)


def check(method: AnyMethod, name: str, case: Case | None = None) -> None:
    """One check of a method on one case: AssertionError where the promise is broken."""
    known = {check.name: check for check in checks_of(method)}
    if name not in known:
        raise UnknownName("check", name, known, method.spec.name)
    _try(known[name], method, case or Case(), {})


def _try(check: Check, method: AnyMethod, case: Case, seen: dict[Case, Observation]) -> bool:
    """Whether the method answered at all; AssertionError where a promise is broken, or all breaks down."""
    try:
        if check.on == "method":
            check.function(method)
            return True
        if check.on == "case":
            check.function(method, case)
            return case not in seen or seen[case].refusal is None
        if case not in seen:
            seen[case] = observe(method, case)
        # What a refused or broken run leaves behind counts, too; its result there is none.
        if seen[case].result is not None or check.on == "run":
            check.function(method, seen[case])
        return seen[case].result is not None
    except AssertionError:
        raise
    except Exception as crash:
        raise AssertionError(f"it broke with {type(crash).__name__}: {crash}") from crash


@dataclass
class Examination:
    """A method under test; what one run of a case showed is kept for the next check."""

    given: str | AnyMethod
    profile: str = "ci"
    seen: dict[Case, Observation] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise UnknownName("profile", self.profile, PROFILES)
        self.method: AnyMethod = methods[self.given] if isinstance(self.given, str) else self.given

    def outcome(self, check: Check) -> Outcome:
        """Run one check on everything its profile asks for."""
        outcome = Outcome(check=check.name, promise=check.promise, look=check.look, verdict="passed")
        reason = check.concerns(self.method)
        if reason is not None:
            return outcome.model_copy(update={"verdict": "skipped", "reason": reason})
        clock = time.perf_counter()
        broken = self._broken(check, outcome)
        if broken is None and outcome.refused == outcome.cases > 0:
            reason = f"it refused all of {outcome.cases} cases: {self._refusals()}"
            if check.name != "answers":
                return outcome.model_copy(update={"verdict": "skipped", "reason": reason})
            broken = None, AssertionError(reason)
        if broken is not None:
            case, error = broken
            if case is not None:
                case, error = self._smallest(check, case, error)
            outcome.verdict = "failed"
            outcome.reason = str(error) or repr(error)
            outcome.example = _example(self.method, check, case)
            outcome.look = f"{check.look}\n  {_place(self.method)}"
        outcome.seconds = round(time.perf_counter() - clock, 3)
        return outcome

    def _broken(self, check: Check, outcome: Outcome) -> tuple[Case | None, AssertionError] | None:
        profile = PROFILES[self.profile]
        if check.on == "method":
            outcome.cases = 1
            error = self._error(check, Case(), outcome)
            return None if error is None else (None, error)
        every = plain_cases(self.method, all_pairs=profile.all_pairs)
        cases = every if profile.plain is None else every[:: max(1, len(every) // profile.plain)]
        # A method may be made for some networks only: of those that it refuses there is little to see.
        if not any(map(self._answered, cases)):
            cases = [*cases, *itertools.islice(filter(self._answered, every), 1)]
        if check.on == "case":
            cases = list(filter(self._answered, cases)) or cases
            cases = cases[:: max(1, -(-len(cases) // profile.several))]
        for case in cases:
            error = self._error(check, case, outcome)
            if error is not None:
                return case, error
        return self._drawn(check, outcome, profile.several if check.on == "case" else profile.drawn)

    def _answered(self, case: Case) -> bool:
        """Whether a case is not refused."""
        if case not in self.seen:
            try:
                self.seen[case] = observe(self.method, case)
            except Exception:  # which the check tells, when it meets it as well
                return True
        return self.seen[case].refusal is None

    def _error(self, check: Check, case: Case, outcome: Outcome | None = None) -> AssertionError | None:
        try:
            answered = _try(check, self.method, case, self.seen)
        except AssertionError as error:
            return error
        finally:
            if outcome is not None and check.on != "method":
                outcome.cases += 1
        if outcome is not None and not answered:
            outcome.refused += 1
        return None

    def _drawn(self, check: Check, outcome: Outcome, count: int) -> tuple[Case, AssertionError] | None:
        """Cases from hypothesis, the same ones for every check; a failing one is shrunk."""
        failing: list[tuple[Case, AssertionError]] = []
        end = time.perf_counter() + PROFILES[self.profile].seconds

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
        def hold(case: Case) -> None:
            if time.perf_counter() > end:
                return
            error = self._error(check, case, None if failing else outcome)
            if error is not None:
                failing.append((case, error))
                raise error

        try:
            hold()
        except (AssertionError, Flaky):  # what fails now and then has failed
            if not failing:
                raise
            return failing[-1]
        return None

    def _smallest(self, check: Check, case: Case, error: AssertionError) -> tuple[Case, AssertionError]:
        """The case with everything made plain that can be without the failure going away."""
        simpler = True
        while simpler:
            simpler = False
            for candidate in case.simpler():
                found = self._error(check, candidate)
                if found is not None:
                    case, error, simpler = candidate, found, True
                    break
        return case, error

    def _refusals(self) -> str:
        said = dict.fromkeys(str(o.refusal) for o in self.seen.values() if o.refusal)
        return "; ".join(list(said)[:3])


def _example(method: AnyMethod, check: Check, case: Case | None) -> str:
    found = inspect.unwrap(method)
    if method.distribution == "unregistered":
        origin = f"from {found.__module__} import {method.spec.short_name} as method"
    else:
        origin = f'from phosphene import methods\n\nmethod = methods["{method.spec.name}"]'
    if case is None and check.on == "method":
        return f'from phosphene.testing import check\n{origin}\n\ncheck(method, "{check.name}")'
    if case is None:  # of many cases together
        what = f'assert check_method(method, only=["{check.name}"]).ok'
        return f"from phosphene.testing import check_method\n{origin}\n\n{what}"
    return (
        f"from phosphene.testing import Case, check\n{origin}\n\ncase = {case!r}\n"
        f'check(method, "{check.name}", case)\n# the call itself: case.run(method)'
    )


def _place(method: AnyMethod) -> str:
    function = inspect.unwrap(method)
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}, line {code.co_firstlineno}" if code else function.__module__


def parametrize_with_checks(given: Sequence[str | AnyMethod], *, profile: str = "ci") -> Callable[..., Any]:
    """A pytest decorator: the test function is called with every ``check`` of every method.

    ::

        @parametrize_with_checks(["my_method"])
        def test_conformance(check): check()
    """
    import pytest

    bound = [b for one in given for b in bound_checks(one, profile)]
    return pytest.mark.parametrize("check", [pytest.param(b, id=b.id, marks=b.marks()) for b in bound])


@dataclass(frozen=True)
class BoundCheck:
    """A check of one method, ready to be called."""

    examination: Examination
    check: Check

    @property
    def id(self) -> str:
        """``method-check``, as test reports show it."""
        return f"{self.examination.method.spec.name}-{self.check.name}"

    def marks(self) -> list[Any]:
        """What pytest should know: checks of one method share runs, so they belong in one process."""
        import pytest

        return [pytest.mark.xdist_group(self.examination.method.spec.name)]

    def __call__(self) -> None:
        outcome = self.examination.outcome(self.check)
        if outcome.verdict == "skipped":
            raise SkipTest(outcome.reason)
        if outcome.verdict == "failed":
            raise AssertionError(str(outcome))


def bound_checks(method: str | AnyMethod, profile: str = "ci") -> list[BoundCheck]:
    """All checks of a method, sharing what its runs showed."""
    examination = Examination(method, profile)
    return [BoundCheck(examination, check) for check in checks_of(examination.method)]
